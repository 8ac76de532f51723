"""What an adapted linear layer is made of, as the two code paths take it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.dequantize import nf4_expand


class Base(NamedTuple):
    """The frozen part: a dense weight, or NF4 codes with their scales."""

    weight: Tensor  # [N, K], or uint8 codes [ceil(N*K/2)] where absmax is given
    absmax: Tensor | None
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    n: int
    k: int
    blocksize: int

    @property
    def is_nf4(self) -> bool:
        """Whether the weight must be expanded before a product."""
        return self.absmax is not None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] in `dtype`. An expanded NF4 weight is for use at once: the next one may take its memory."""
        return self._expanded(dtype) if self.is_nf4 else self.weight

    def merged(self, dtype: torch.dtype, lora: "Lora") -> Tensor:
        """W + scaling · B A [N, K], rounded once from fp32; sound for NF4 alone."""
        return self._expanded(dtype, lora.a, lora.b, lora.scaling)

    def _expanded(
        self, dtype: torch.dtype, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 0.0
    ) -> Tensor:
        assert self.absmax is not None
        return nf4_expand(
            self.weight, self.absmax, self.absmax2, self.code2, self.offset,
            self.n, self.k, self.blocksize, dtype, lora_a, lora_b, scaling,
        )  # fmt: skip


class Lora(NamedTuple):
    """The trained part: y += scaling · dropout(x) Aᵀ Bᵀ."""

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scaling: float
    dropout_p: float
    seed: Tensor | None  # int64, one element; None where nothing is dropped

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the low-rank products: fp32 where either adapter has it."""
        return torch.promote_types(self.a.dtype, self.b.dtype)


class Gradients(NamedTuple):
    """What a backward pass gives; None for what nobody asked for."""

    x: Tensor | None  # [M, K]
    lora_a: Tensor | None  # [R, K]
    lora_b: Tensor | None  # [N, R]


class Needs(NamedTuple):
    """What a backward pass is asked for."""

    x: bool
    lora_a: bool
    lora_b: bool


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [M, N] in x's dtype; a wider bias is added as it is. x: [M, K]; weight: [N, K]; bias: [N]."""
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return torch.add(y, bias, out=y)
