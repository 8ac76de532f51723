"""Dequantization in the interpreter: bit for bit the reference's, merged with one rounding, poisoned outputs."""

import dataclasses

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4
from tests.support import ptx

triton = pytest.importorskip("triton")
from fastlora.kernels import nf4 as nf4_kernel  # noqa: E402
from fastlora.kernels import nf4_tile  # noqa: E402

from tests.support.kernel_cases import DEVICE, KERNELS, draw  # noqa: E402

pytestmark = KERNELS


def nf4_case(n, k, blocksize=64, nested=True):
    """An NF4 weight on the device, and its exact fp32 values."""
    weight = nf4.quantize(draw(n, k).cpu(), blocksize, nested)
    scales = reference.nf4_scales(weight.absmax, weight.absmax2, weight.code2, weight.offset)
    exact = reference.nf4_dequantize(weight.codes, scales, weight.shape, blocksize).to(DEVICE)
    return weight.to(DEVICE), exact


def padded(n, columns, dtype):
    """A NaN matrix with three more elements after each row, and the same with these elements."""
    whole = torch.full((n, columns + 3), float("nan"), device=DEVICE, dtype=dtype)
    return whole[:, :columns], whole


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [
        ((70, 128), 64),
        ((64, 512), 32),
        ((40, 72), 64),
        ((33, 70), 64),
        ((5, 7), 32),
        ((3, 1367), 4096),
        ((16, 1024), 4096),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_dequantize_is_bitwise_the_reference(shape, blocksize, nested):
    weight, exact = nf4_case(*shape, blocksize, nested)
    for dtype in DTYPES:
        out, whole = padded(*shape, dtype)
        nf4_kernel.dequantize(weight, out)
        assert torch.equal(out, exact.to(dtype))
        assert whole[:, shape[1] :].isnan().all()
        contiguous = torch.empty(shape, device=DEVICE, dtype=dtype)  # for the kernel, one flat run of blocks
        nf4_kernel.dequantize(weight, contiguous)
        assert torch.equal(contiguous, out)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="on a device the asm itself runs: tests/gpu/test_nf4.py")
@pytest.mark.parametrize("shape", [(70, 128), (33, 72), (5, 7)])
@pytest.mark.parametrize("nested", [True, False])
def test_the_asm_of_the_shuffle_gives_the_bits_of_gather(shape, nested, monkeypatch):
    weight, exact = nf4_case(*shape, 64, nested)
    ran = []
    ptx.teach_ptx(monkeypatch)
    monkeypatch.setattr(ptx, "run", lambda *block, run=ptx.run: ran.append(block[0]) or run(*block))
    monkeypatch.setattr(nf4_kernel, "lookup", lambda *_: "shfl")
    for dtype in DTYPES:
        out, whole = padded(*shape, dtype)
        for target in (out, torch.empty(shape, device=DEVICE, dtype=dtype)):
            nf4_kernel.dequantize(weight, target)
            assert torch.equal(target, exact.to(dtype))
        assert whole[:, shape[1] :].isnan().all()
    assert any("shfl" in asm for asm in ran)


def test_codes_at_odd_addresses():
    weight, exact = nf4_case(16, 128)
    shifted = torch.empty(weight.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
    shifted.copy_(weight.codes)
    assert not nf4_tile.aligned(shifted, 128, 64)
    out = torch.empty(16, 128, device=DEVICE)
    nf4_kernel.dequantize(dataclasses.replace(weight, codes=shifted), out)
    assert torch.equal(out, exact)


@pytest.mark.parametrize("r", [1, 16, 40])
@pytest.mark.parametrize("k", [192, 72, 37])  # whole blocks, whole words, neither
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_dequantize_merges_with_one_rounding(r, k, adapter):
    weight, base = nf4_case(70, k)
    a, b = draw(k, r, dtype=adapter, seed=1).t() / 14, draw(70, r, dtype=adapter, seed=2)
    exact = base.double() + 0.5 * b.double() @ a.double()
    parts = 2**-14 * 0.5 * b.double().abs() @ a.double().abs()  # fp32 adapters go as two bf16 parts, to be rounded
    for dtype, half_ulp in ((torch.float32, 2**-22), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        out, whole = padded(70, k, dtype)
        nf4_kernel.dequantize(weight, out, a, b, 0.5)
        split = parts if nf4_kernel.precision(dtype, adapter) == "split" else 1e-6
        assert ((out.double() - exact).abs() <= half_ulp * exact.abs() + split).all()
        assert whole[:, k:].isnan().all()


def test_dequantize_refuses_what_does_not_fit():
    weight, _ = nf4_case(8, 64)
    out = torch.zeros(8, 64, device=DEVICE)
    a, b = draw(4, 64), draw(8, 4)
    refused = [
        ({"lora_a": a}, "together"),
        ({"lora_a": a[:, 1:], "lora_b": b}, "lora_a"),
        ({"lora_a": a, "lora_b": b[1:]}, "lora_b"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            nf4_kernel.dequantize(weight, out, **options)
    with pytest.raises(ValueError, match="contiguous rows"):
        nf4_kernel.dequantize(weight, draw(64, 8).t())
    with pytest.raises(ValueError, match=r"out is \[8, 32\], but the weight is \[8, 64\]"):
        nf4_kernel.dequantize(weight, out[:, :32])
    assert not out.any()
