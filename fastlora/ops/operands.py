"""What an adapted linear layer is made of, as every path takes it.

The frozen part is a dense tensor [N, K] or an `NF4Weight`, the trained part is a `Lora`; nothing on the way from a
layer to a kernel wraps them again.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.operands import Lora as Lora
from fastlora.kernels.operands import Packed
from fastlora.ops.dequantize import nf4_expand

ANY_M = 1 << 62  # no bound on the number of tokens


class Step(NamedTuple):
    """What computes y for up to m tokens, in words; a path is named as its file is."""

    m: int
    path: str
    words: str


class Gradients(NamedTuple):
    """What a backward pass returns; None for what is not needed."""

    x: Tensor | None  # [M, K]
    lora_a: Tensor | None  # [R, K]
    lora_b: Tensor | None  # [N, R]


class Needs(NamedTuple):
    """Which gradients a backward pass is to compute."""

    x: bool
    lora_a: bool
    lora_b: bool


def in_dtype(weight: Any, dtype: torch.dtype) -> Any:
    """A dense weight in `dtype`; an NF4 weight as it is, since it goes with any dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight


def dense(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`. An expanded NF4 weight is for use at once: the next one may overwrite it."""
    return nf4_expand(weight, dtype) if isinstance(weight, Packed) else weight


def merged(weight: Packed, dtype: torch.dtype, lora: Lora) -> Tensor:
    """W + scaling · B A [N, K], rounded once from fp32, for use at once. Only for NF4, which is rounded in any case."""
    return nf4_expand(weight, dtype, lora.a, lora.b, lora.scaling)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [M, N] in x's dtype; a wider bias is added as it is. x: [M, K]; weight: [N, K]; bias: [N]."""
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return torch.add(y, bias, out=y)


def wide_product(x: Tensor, w: Tensor) -> Tensor:
    """x w in fp32, accumulated as usual and not rounded. x: [M, K]; w: [K, N], in one dtype."""
    if x.dtype is torch.float32:
        return x @ w
    if x.is_cuda:
        return torch.mm(x, w, out_dtype=torch.float32)
    return x.float() @ w.float()  # a CPU in the place of a GPU


def added_product(update: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """update + x w, rounded once to x's dtype; `update` is overwritten. cuBLAS's addmm rounds x w before it adds."""
    return torch.add(wide_product(x, w), update).to(x.dtype) if x.is_cuda else update.addmm_(x, w)


def with_rows(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
