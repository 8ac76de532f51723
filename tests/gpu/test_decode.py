"""On a CUDA device: the decode product, compiled and in Triton, for 1 to 16 tokens; streams, graphs, bits."""

import dataclasses

import pytest
import torch

from fastlora import reference
from fastlora.native import cuda
from fastlora.ops import nf4
from tests.support.numerics import assert_as_accurate

pytest.importorskip("triton")
from fastlora.kernels import decode as triton_decode

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 2.0


@pytest.fixture(params=["compiled", "triton"])
def decode(request):
    if request.param == "triton":
        return triton_decode.decode
    usable, reason = cuda.usable(torch.device("cuda"))
    if not usable:
        pytest.skip(reason)
    return cuda.decode


class Case:
    """Operands of a product, and what the oracle and the baseline make of them."""

    def __init__(self, m, k, n, r, dtype, adapter=FP32, blocksize=64, nested=True, bias=None, seed=0):
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.weight = nf4.quantize(self.draw(n, k, std=k**-0.5), blocksize, nested)
        self.x = self.draw(m, k, dtype=dtype)
        self.a = self.draw(r, k, dtype=adapter, std=k**-0.5) if r else None
        self.b = self.draw(n, r, dtype=adapter, std=r**-0.5) if r else None
        self.bias = self.draw(n, dtype=bias) if bias else None

    def draw(self, *shape, dtype=FP32, std=1.0):
        return (torch.randn(*shape, generator=self.generator, device="cuda") * std).to(dtype)

    def run(self, decode, x=None):
        adapters = (self.a, self.b, SCALING) if self.a is not None else (None, None, 0.0)
        x = self.x if x is None else x
        return decode(x, self.weight, *adapters, self.bias)

    def expected(self, dtype):
        """y in the reference's arithmetic of `dtype`; the oracle where it is fp64."""
        x, weight = self.x.to(dtype), self.weight.dequantize(FP32).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.a is None:
            return torch.nn.functional.linear(x, weight, bias)
        a, b = (self.a.double(), self.b.double()) if dtype == torch.float64 else (self.a, self.b)
        return reference.lora_linear(x, weight, a, b, SCALING, bias)

    def check(self, decode):
        y = self.run(decode)
        assert y.dtype == self.x.dtype
        assert_as_accurate(y, self.expected(y.dtype), self.expected(torch.float64), "y")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("m", range(1, 17))
def test_any_number_of_tokens(decode, m, dtype):
    Case(m, 1024, 1000, 16, dtype, FP32 if m % 2 else dtype, bias=dtype).check(decode)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize(
    ("k", "n"), [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (3584, 513), (896, 4864), (18944, 3584)]
)
def test_shapes_of_models(decode, m, k, n):
    Case(m, k, n, 16, BF16).check(decode)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("m", [1, 3, 13])
@pytest.mark.parametrize(("k", "n", "blocksize"), [(320, 133, 32), (64, 401, 64), (1152, 257, 128), (4096, 300, 4096)])
def test_scales(decode, m, k, n, blocksize, nested):
    Case(m, k, n, 8, BF16, FP32, blocksize, nested).check(decode)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize(("r", "adapter"), [(0, FP32), (1, FP32), (5, BF16), (64, BF16), (128, FP32), (256, FP32)])
def test_ranks(decode, m, r, adapter):
    Case(m, 2048, 1111, r, BF16, adapter, bias=FP32).check(decode)


def test_strides_and_addresses(decode):
    case = Case(3, 1024, 512, 16, BF16)
    y = case.run(decode)
    wide = case.draw(3, 1104, dtype=BF16)
    for start in (8, 3):
        wide[:, start : start + 1024] = case.x
        assert torch.equal(case.run(decode, wide[:, start : start + 1024]), y)
    assert torch.equal(case.run(decode, case.x.t().contiguous().t()), y)
    codes = case.weight.codes
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(codes)
    case.weight = dataclasses.replace(case.weight, codes=shifted)
    assert torch.equal(case.run(decode), y)


@pytest.mark.parametrize("m", [1, 8, 16])
def test_the_same_input_gives_the_same_bits(decode, m):
    case = Case(m, 4096, 4096, 64, BF16)
    first = case.run(decode)
    for _ in range(20):
        assert torch.equal(case.run(decode), first)


def test_calls_in_a_row_wait_for_one_another(decode):
    """A kernel may start before the last one ends, and memory is used again: each must still see its operands."""
    layers = [Case(2, 1024, 1024, 16, BF16, seed=seed) for seed in range(8)]

    def chain(finish):
        x = layers[0].x
        for layer in layers * 8:
            x = layer.run(decode, x)
            x = x / x.float().square().mean().sqrt().to(BF16)
            finish()
        return x

    expected = chain(torch.cuda.synchronize)
    for _ in range(5):
        assert torch.equal(chain(lambda: None), expected)


@pytest.mark.parametrize("m", [1, 16])
def test_a_side_stream_and_a_captured_graph(decode, m):
    case = Case(m, 2048, 1000, 16, BF16, bias=BF16)
    expected = case.run(decode)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = case.run(decode)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = case.run(decode)
        captured = case.run(decode, first[:, :1].expand(m, 2048).contiguous())
    case.x.mul_(2)
    for _ in range(3):
        graph.replay()
    doubled = case.run(decode)
    assert torch.equal(first, doubled)
    assert torch.equal(captured, case.run(decode, doubled[:, :1].expand(m, 2048).contiguous()))


def test_two_streams_at_once(decode):
    cases = [Case(m, 4096, 4096, 16, BF16, seed=m) for m in (1, 16)]
    expected = [case.run(decode) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = [[] for _ in cases]
    for _ in range(20):
        for case, stream, found in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(case.run(decode))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(y, right) for y in found)


def test_no_call_waits_for_the_device(decode):
    case = Case(1, 1024, 512, 16, BF16)
    case.run(decode)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(decode)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_agree_with_the_weight_as_dequantized():
    usable, reason = cuda.usable(torch.device("cuda"))
    if not usable:
        pytest.skip(reason)
    case = Case(1, 4096, 4096, 0, FP16)
    compiled, interpreted = case.run(cuda.decode), case.run(triton_decode.decode)
    limit = 2 * (case.expected(FP16).double() - case.expected(torch.float64)).abs().max()
    assert (compiled.double() - interpreted.double()).abs().max() <= limit


@pytest.mark.parametrize("lookup", ["shfl", "gather"])
@pytest.mark.parametrize("m", [1, 2, 9])
def test_both_lookups_of_triton(monkeypatch, m, lookup):
    monkeypatch.setattr(triton_decode, "lookup", lambda device: lookup)
    Case(m, 1024, 520, 16, BF16).check(triton_decode.decode)


def test_what_does_not_fit_is_refused(decode):
    case = Case(1, 1024, 512, 16, BF16)
    with pytest.raises(ValueError, match="17 tokens"):
        case.run(decode, torch.zeros(17, 1024, dtype=BF16, device="cuda"))
    case.bias = torch.zeros(511, device="cuda")
    with pytest.raises(ValueError, match=r"expected \[512\]"):
        case.run(decode)
