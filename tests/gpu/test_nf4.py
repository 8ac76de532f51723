"""The dequantize kernel on a CUDA device: bitsandbytes' bits, the shuffle against its twin, each option.

Each case is a compilation of a second or more, so options are crossed only where their code paths meet.
"""

import dataclasses

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    from fastlora.kernels import nf4 as module

    return module


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def expand(kernel, weight, dtype, *merged, padding=0):
    """The kernel's output in a poisoned matrix, whose padding must stay as it was. merged: A, B and the scaling."""
    n, k = weight.shape
    whole = torch.full((n, k + padding), float("nan"), device="cuda", dtype=dtype)
    kernel.dequantize(weight, whole[:, :k], *merged)
    assert whole[:, k:].isnan().all()
    return whole[:, :k]


def exact_values(weight):
    """fp32 [N, K], computed on the CPU."""
    parts = [None if part is None else part.cpu() for part in weight.tensors()]
    scales = reference.nf4_scales(*parts[1:])
    return reference.nf4_dequantize(parts[0], scales, weight.shape, weight.blocksize).cuda()


@pytest.mark.gpu(rehearsed=False)
def test_launches_use_the_shuffle(kernel):
    assert kernel.lookup() == "shfl"
    assert kernel.lookup(torch.device("cuda", 0)) == "shfl"


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "blocksize"), [((512, 1024), 64), ((96, 200), 64), ((512, 1024), 4096)])
def test_the_bits_of_bitsandbytes(kernel, shape, blocksize, nested):
    bnb = pytest.importorskip("bitsandbytes")
    for dtype in DTYPES:
        codes, state = bnb.functional.quantize_4bit(
            draw(*shape, dtype=dtype), blocksize=blocksize, quant_type="nf4", compress_statistics=nested
        )
        theirs = bnb.functional.dequantize_4bit(codes, state)
        assert theirs.dtype == dtype
        weight = nf4.NF4Weight.from_quant_state(codes, state)
        assert weight.nested == nested
        assert torch.equal(expand(kernel, weight, dtype), theirs)


@pytest.mark.parametrize("lookup", ["shfl", "gather"])
@pytest.mark.parametrize(
    ("shape", "blocksize", "nested"),
    [((70, 128), blocksize, nested) for blocksize in (32, 64, 4096) for nested in (True, False)]
    + [(shape, 64, True) for shape in ((256, 1024), (40, 72), (33, 70), (5, 7), (3, 4097))],
)
def test_both_lookups_give_the_bits_of_the_cpu(kernel, monkeypatch, shape, blocksize, nested, lookup):
    monkeypatch.setattr(kernel, "lookup", lambda *_: lookup)
    kernel._launcher.forget()
    weight = nf4.quantize(draw(*shape), blocksize, nested)
    exact = exact_values(weight)
    for dtype in DTYPES:
        assert torch.equal(expand(kernel, weight, dtype), exact.to(dtype))
    for padding in (3, 16):  # rows, where the kernel does not see one flat run
        assert torch.equal(expand(kernel, weight, torch.bfloat16, padding=padding), exact.bfloat16())


@pytest.mark.parametrize(
    ("shape", "r", "adapter", "dtype", "lookup"),
    [((256, 1024), 16, torch.bfloat16, torch.bfloat16, "gather")]
    + [((256, 1024), 16, adapter, torch.bfloat16, "shfl") for adapter in DTYPES]
    + [((256, 1024), 16, torch.float32, dtype, "shfl") for dtype in (torch.float16, torch.float32)]
    + [((70, 128), 40, adapter, dtype, "shfl") for adapter, dtype in zip(DTYPES, DTYPES, strict=True)]
    + [((70, 128), 40, torch.float32, dtype, "shfl") for dtype in (torch.bfloat16, torch.float16)]
    + [(shape, 5, torch.float32, torch.bfloat16, "shfl") for shape in ((70, 192), (33, 70))],
)
def test_merging_rounds_once(kernel, monkeypatch, shape, r, adapter, dtype, lookup):
    monkeypatch.setattr(kernel, "lookup", lambda *_: lookup)
    kernel._launcher.forget()
    weight = nf4.quantize(draw(*shape))
    n, k = shape
    a, b = draw(k, r, dtype=adapter, seed=1).t() / k**0.5, draw(n, r, dtype=adapter, seed=2)
    exact = exact_values(weight).double() + 0.5 * b.double() @ a.double()
    products = 0.5 * b.double().abs() @ a.double().abs()
    out = expand(kernel, weight, dtype, a, b, 0.5).double()
    inexact = 2**-14 if kernel.precision(dtype, adapter) == "split" else 2**-18
    assert ((out - exact).abs() <= (HALF_ULP[dtype] + 2**-22) * exact.abs() + inexact * products + 1e-6).all()


def test_codes_at_odd_addresses(kernel):
    weight = nf4.quantize(draw(64, 256))
    shifted = torch.empty(64 * 128 + 1, dtype=torch.uint8, device="cuda")[1:].copy_(weight.codes)
    out = expand(kernel, dataclasses.replace(weight, codes=shifted), torch.bfloat16)
    assert torch.equal(out, exact_values(weight).bfloat16())


def test_more_weights_than_32_bits_count(kernel):
    n, k, tail = 69632, 32768, 64  # 2.3e9 weights
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free device memory")
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(n * k // 64, device="cuda") + 0.5
    weight = nf4.NF4Weight(codes, absmax, (n, k), torch.bfloat16, 64)
    last = torch.empty(tail, k, device="cuda", dtype=torch.bfloat16)
    kernel.dequantize(
        nf4.NF4Weight(
            codes[-tail * k // 2 :].clone(), absmax[-tail * k // 64 :].clone(), (tail, k), torch.bfloat16, 64
        ),
        last,
    )
    for padding in (0, 16):  # the flat run, and rows
        out = torch.empty(n, k + padding, device="cuda", dtype=torch.bfloat16)[:, :k]
        out[-tail:].fill_(float("nan"))
        kernel.dequantize(weight, out)
        assert torch.equal(out[-tail:], last)
        del out


def test_a_captured_graph_expands_what_the_codes_hold_when_it_runs(kernel):
    weight, other = nf4.quantize(draw(256, 512)), nf4.quantize(draw(256, 512, seed=1))
    out = torch.empty(256, 512, device="cuda", dtype=torch.bfloat16)
    a, b = draw(16, 512, seed=2), draw(256, 16, seed=3)
    kernel.dequantize(weight, out, a, b, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.dequantize(weight, out, a, b, 0.5)
    for mine, new in zip(weight.tensors(), other.tensors(), strict=True):
        mine.copy_(new)
    out.fill_(float("nan"))
    graph.replay()
    expected = torch.empty_like(out)
    kernel.dequantize(other, expected, a, b, 0.5)
    assert torch.equal(out, expected)


def test_the_same_input_gives_the_same_bits_on_a_side_stream(kernel):
    weight = nf4.quantize(draw(512, 1024))
    a, b = draw(16, 1024, seed=2), draw(512, 16, seed=3)
    first = expand(kernel, weight, torch.bfloat16, a, b, 0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = expand(kernel, weight, torch.bfloat16, a, b, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(first, second)
