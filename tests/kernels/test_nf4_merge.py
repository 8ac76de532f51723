"""Merging s · B A into the weight before its one rounding: sound for NF4, wrong for a bf16 base. Both are tested."""

import pytest
import torch

from fastlora.model.merging import kept
from fastlora.ops import linear, nf4
from fastlora.ops.linear import lora_linear
from tests.support.numerics import rms

N = K = 1024
R = 16


def update(size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Adapters whose product is `size` times as large as the weights of `base`."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(R, K, generator=generator)
    b = torch.randn(N, R, generator=generator)
    return a, b * (size * 0.02 / rms(b @ a))


def gain(realised: torch.Tensor, wanted: torch.Tensor) -> float:
    """Projection of the realised update on the true one: 1 if nothing is lost."""
    return ((realised * wanted).sum() / wanted.square().sum()).item()


@pytest.fixture(scope="module")
def base():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("size", [7e-6, 7e-5, 7e-4, 7e-3])
def test_nf4_dithers_the_rounding_and_keeps_the_update(base, size):
    weight = nf4.quantize(base)
    a, b = update(size)
    plain = linear.nf4_dequantize(weight, torch.bfloat16)
    merged = linear.nf4_dequantize(weight, torch.bfloat16, a, b, 1.0)
    # the smaller the update, the fewer weights carry it: the spread of the gain is about 0.02 at 7e-6
    assert abs(gain(merged.double() - plain.double(), (b @ a).double()) - 1) < 0.06
    # one rounding of W + s B A is at most as far from the truth as rounding W and s B A x apart
    x = torch.randn(256, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.double() @ (weight.dequantize(torch.float32).double() + b.double() @ a.double()).t()
    apart = x @ plain.t() + ((x.float() @ a.t()) @ b.t()).bfloat16()
    assert rms((x @ merged.t()).double() - exact) <= 1.02 * rms(apart.double() - exact)


def test_a_bf16_base_swallows_small_updates(base):
    weight = base.bfloat16()
    for size, most in ((7e-6, 0.2), (7e-5, 0.2), (7e-4, 0.6)):
        a, b = update(size)
        merged = (weight.float() + b @ a).bfloat16()
        assert gain(merged.double() - weight.double(), (b @ a).double()) < most


def test_the_linear_therefore_never_merges_into_a_dense_weight(base):
    weight = base.bfloat16()
    a, b = update(7e-5)
    x = torch.randn(256, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = x.double() @ a.double().t() @ b.double().t()
    plain = torch.nn.functional.linear(x.float(), weight.float()).double()
    ours = lora_linear(x, weight, a, b, 1.0).double()
    merged = torch.nn.functional.linear(x.float(), (weight.float() + b @ a).bfloat16().float()).double()
    assert abs(gain(ours - plain, wanted) - 1) < 0.2  # y itself is rounded to bf16, which dithers
    assert gain(merged - plain, wanted) < 0.2


@pytest.mark.parametrize(
    ("size", "most", "least"), [(7e-4, 0.01, -0.01), (7e-3, 0.05, 0), (7e-2, 0.7, 0.4), (0.3, 1.05, 0.9)]
)
def test_quantizing_again_loses_a_small_update(base, size, most, least):
    """What `merge(model, quantize="nf4")` warns of: values quantized before are in the middle of NF4's steps."""
    before = nf4.quantize(base)
    a, b = update(size)
    merged = linear.nf4_dequantize(before, torch.float32, a, b, 1.0)
    left = kept(before, nf4.quantize(merged), b @ a)
    assert least < left.share < most
    realised = nf4.quantize(merged).dequantize(torch.float32) - before.dequantize(torch.float32)
    assert left.share == pytest.approx(gain(realised, b @ a), rel=1e-3, abs=1e-6)
    assert left.error == pytest.approx(rms(realised - b @ a) / rms(b @ a), rel=1e-3)
