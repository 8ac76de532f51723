"""Sums of any length whose error is known: what the tests of long sums draw, and the bounds they check.

A sum in order drifts: each addition rounds the whole sum so far, at random or, where the terms are equal, always the
same way. Sums of short sums do not. The bounds follow from that, and not from what torch computes for the same sum.
There are three kinds of terms, and n of them may err by so much:

    normal     of either sign                                             eps (2 + log2(n) / 2) of the sums' rms
    positive   between 0.5 and 1.5                                        eps (2 + log2(n) / 2) of the sum
    drift      2n/3 times v, then n/3 times -2v: each rounds its own way  eps (48 + sqrt(n) / 4) of the magnitudes

In order the first two err by about eps sqrt(n) / 5, the last by up to eps n / 8. The sum of `drift` is zero, so it
shows all of the error where results are rounded to 16 bits too.
"""

import math

import torch
from torch import Tensor

from tests.support.numerics import rms

KINDS = ["normal", "positive", "drift"]
LENGTHS = [128, 1_024, 10_240, 200_000]
EPS = 2.0**-23


def drawn(kind: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Factors of the terms: those that vary along the last dimension, which is summed over."""
    generator = torch.Generator().manual_seed(seed + shape[-1])
    if kind == "normal":
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == "positive":
        return (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    third = shape[-1] // 3
    row = torch.zeros(shape[-1])
    row[: 2 * third], row[2 * third : 3 * third] = 1, -2
    return (row * odd(shape[0])[:, None]).to(dtype).expand(shape)


def other(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The other factors; with `drift` the same along the last dimension."""
    if kind != "drift":
        return drawn(kind, *shape, dtype=dtype, seed=1)
    return odd(shape[0] + 3)[3:, None].expand(shape).to(dtype).contiguous()


def odd(count: int) -> Tensor:
    """Values whose last bit in bf16 is 1, so that their products need 16 bits."""
    return 1 + (2 * torch.arange(count).mul(7).remainder(61) + 1) / 128


def check(kind: str, n: int, found: Tensor, left: Tensor, right: Tensor, floor: float = 0.0) -> None:
    """`found` against left rightᵀ, a sum over n terms. floor: what else rounds, relative to the terms' magnitudes."""
    exact = left.double() @ right.double().t()
    error = rms(found.double() - exact)
    if kind == "drift":
        bound, scale = EPS * (48 + math.sqrt(n) / 4), rms(left.double().abs() @ right.double().abs().t())
    else:
        bound, scale = EPS * (2 + math.log2(n) / 2), rms(exact)
    print(f"{kind} {n}: {error / scale / EPS:.2f} eps, bound {bound / EPS:.2f} {'floor' if floor else ''}")
    assert error <= (bound + floor) * scale, f"{kind}, {n} terms: {error / scale:.2e} above {bound + floor:.2e}"
