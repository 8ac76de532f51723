"""The decode product in Triton, interpreted: 1 to 16 tokens against the fp64 oracle, every option, poisoned memory."""

import dataclasses

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4
from tests.support import ptx
from tests.support.numerics import assert_as_accurate

triton = pytest.importorskip("triton")
from fastlora.kernels import decode as kernel  # noqa: E402

from tests.support.kernel_cases import DEVICE, KERNELS, draw  # noqa: E402

pytestmark = KERNELS
SCALING = 0.5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def quantized(n, k, blocksize=64, nested=True):
    return nf4.quantize(draw(n, k).cpu() / k**0.5, blocksize, nested).to(DEVICE)


class Case:
    """Operands of a product, and what the oracle and the baseline make of them."""

    def __init__(self, m, k, n, r, dtype, adapter=FP32, blocksize=64, nested=True, bias=True):
        self.weight = quantized(n, k, blocksize, nested)
        self.x = draw(m, k, dtype=dtype, seed=1)
        self.a = draw(r, k, dtype=adapter, seed=2) / k**0.5 if r else None
        self.b = draw(n, r, dtype=adapter, seed=3) / r**0.5 if r else None
        self.bias = draw(n, dtype=dtype, seed=4) if bias else None

    def run(self, x=None):
        x = self.x if x is None else x
        adapters = (self.a, self.b, SCALING) if self.a is not None else (None, None, 0.0)
        return kernel.decode(x, self.weight, *adapters, self.bias)

    def expected(self, dtype):
        """y in the reference's arithmetic of `dtype`; the oracle where it is fp64."""
        x, weight, bias = self.x.to(dtype), self.weight.dequantize(FP32).to(dtype), self.bias
        bias = None if bias is None else bias.to(dtype)
        if self.a is None:
            return torch.nn.functional.linear(x, weight, bias)
        adapters = (t.double() if dtype == torch.float64 else t for t in (self.a, self.b))
        return reference.lora_linear(x, weight, *adapters, SCALING, bias)

    def check(self):
        y = self.run()
        assert y.dtype == self.x.dtype
        assert_as_accurate(y, self.expected(self.x.dtype), self.expected(torch.float64), "y")
        return y


@pytest.mark.parametrize("m", [1, 2, 16])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)])
def test_y_follows_the_oracle(m, dtype, adapter):
    Case(m, 320, 130, 16, dtype, adapter).check()


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("k", "n", "blocksize"), [(32, 300, 32), (320, 67, 64), (1024, 64, 256), (4096, 64, 4096)])
def test_shapes_and_scales(m, k, n, blocksize, nested):
    Case(m, k, n, 5, FP16, FP32, blocksize, nested).check()


@pytest.mark.parametrize(("m", "r"), [(1, 0), (2, 1), (3, 40), (8, 0), (16, 256)])
def test_ranks_without_bias(m, r):
    Case(m, 256, 130, r, FP16, bias=False).check()


def test_many_parts_of_the_sum(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS_PER_SM", 64)
    kernel.plan.cache_clear()
    case = Case(2, 4096, 64, 16, FP16)
    assert kernel.plan(2, 4096, 64, 16, case.x.device.index).splits > 8
    case.check()
    kernel.plan.cache_clear()


@pytest.mark.parametrize("m", [1, 2, 7])
def test_strides_are_followed(m):
    case = Case(m, 256, 70, 8, FP16)
    y = case.run()
    wide = torch.full((m, 300), float("nan"), device=DEVICE, dtype=FP16)
    wide[:, 3:259] = case.x
    assert torch.equal(case.run(wide[:, 3:259]), y)  # rows apart, off a 32-bit address
    assert torch.equal(case.run(case.x.t().contiguous().t()), y)  # columns apart
    case.a, case.b = case.a.t().contiguous().t(), case.b.t().contiguous().t()
    case.bias = torch.stack((case.bias, case.bias), 1)[:, 0]
    assert torch.equal(case.run(), y)


def test_codes_at_odd_addresses():
    case = Case(1, 256, 70, 8, FP16)
    y, codes = case.run(), case.weight.codes
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].copy_(codes)
    case.weight = dataclasses.replace(case.weight, codes=shifted)
    assert torch.equal(case.run(), y)


def test_no_tokens_and_the_same_bits_twice():
    case = Case(3, 256, 70, 8, FP16)
    assert case.run(case.x[:0]).shape == (0, 70)
    assert torch.equal(case.run(), case.run())


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="on a device the asm itself runs: gpu/test_decode.py")
@pytest.mark.parametrize("m", [1, 2, 9])
def test_the_asm_of_the_lookup_gives_the_bits_of_gather(m, monkeypatch):
    case = Case(m, 128, 70, 8, FP16)
    plain = case.run()
    ran = []
    ptx.teach_ptx(monkeypatch)
    monkeypatch.setattr(ptx, "run", lambda *block, run=ptx.run: ran.append(block[0]) or run(*block))
    monkeypatch.setattr(kernel, "lookup", lambda device: "shfl")
    assert torch.equal(case.run(), plain)
    assert any("shfl" in asm for asm in ran)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(17, 256, device=DEVICE)}, "17 tokens"),
        ({"x": torch.zeros(1, 256, dtype=torch.float64, device=DEVICE)}, "float64"),
        ({"x": torch.zeros(256)}, r"expected \[M, K\]"),
        ({"x": torch.zeros(1, 192)}, "the weight's K = 256"),
        ({"x": torch.zeros(1, 256, device="meta")}, "the weight is on"),
        ({"weight": (70, 256, 512)}, "multiples of the blocksize"),
        ({"weight": (71, 256)}, r"do not fit a weight of \[71, 256\]"),
        ({"lora_a": None}, "go together"),
        ({"bias": torch.zeros(69)}, r"expected \[70\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case(1, 256, 70, 8, FP32)
    operands = {"x": case.x, "weight": case.weight, "lora_a": case.a, "lora_b": case.b, "bias": case.bias} | change
    if "weight" in change:
        operands["weight"] = quantized(*change["weight"])
    with pytest.raises(ValueError, match=message):
        kernel.decode(**operands, scaling=SCALING)


def test_supports_names_what_it_cannot_take():
    assert kernel.supports(BF16, 16, 4096, 4097, 64, 256) == ""
    assert kernel.supports(FP32, 1, 32, 1, 32, 0) == ""
    assert "17 tokens" in kernel.supports(BF16, 17, 4096, 4096, 64, 16)
    assert "multiples" in kernel.supports(BF16, 1, 4090, 4096, 64, 16)
    assert "float64" in kernel.supports(torch.float64, 1, 4096, 4096, 64, 16)
