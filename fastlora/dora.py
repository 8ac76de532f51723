"""DoRA over the fused linear: y = (m / ‖W + s · B A‖) ∘ (x Wᵀ + s · x Aᵀ Bᵀ) + bias, the norm taken of each row.

The norm counts as a constant in the backward pass, as in the paper. It takes a pass over the whole weight, so on the
CPU it is kept until A, B or the weight change: gradient accumulation, recomputation under checkpointing and evaluation
find it there. A and B are compared with copies, for writes through `.data`, by bitsandbytes' optimizers, and by FSDP
leave no trace on a tensor. On other devices that comparison would wait for the device, and the norm is formed anew.

Source: arXiv:2402.09353, equation 5 and section 4.3.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora import functional
from fastlora.nf4 import NF4Weight

ROWS_AT_ONCE = 1024  # of a dense weight, widened to fp32 for its norm


def row_norms(weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row: [N], fp32, detached.

    Args:
        weight: [N, K], dense or NF4. lora_a: [R, K]. lora_b: [N, R].
    """
    with torch.no_grad():
        if isinstance(weight, NF4Weight):
            merged = functional.nf4_dequantize(weight, None, lora_a, lora_b, scaling)
            return torch.linalg.vector_norm(merged, dim=1, dtype=torch.float32)
        a, b = lora_a.float(), lora_b.float()
        norms = [
            torch.addmm(rows.float(), part, a, alpha=scaling).norm(dim=1)
            for rows, part in zip(weight.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
        ]
        return torch.cat(norms)


class KeptNorms:
    """The row norms of one layer, formed anew when A, B, the weight or the scaling have changed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Form them anew at the next call."""
        self._weight: Tensor | NF4Weight | None = None
        self._facts: tuple[Any, ...] = ()
        self._adapters: tuple[Tensor, ...] = ()
        self._norms: Tensor | None = None

    def of(self, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """‖W + scaling · B A‖: [N], fp32."""
        frozen = weight.codes if isinstance(weight, NF4Weight) else weight
        if torch.compiler.is_compiling() or not frozen.is_cpu or frozen.is_inference() or frozen.requires_grad:
            return row_norms(weight, lora_a, lora_b, scaling)
        facts, adapters = (frozen.data_ptr(), frozen._version, scaling), (lora_a.detach(), lora_b.detach())
        if self._norms is None or self._weight is not weight or self._facts != facts or not self._same(adapters):
            self._weight, self._facts = weight, facts
            self._adapters = tuple(adapter.clone() for adapter in adapters)
            self._norms = row_norms(weight, lora_a, lora_b, scaling)
        return self._norms

    def _same(self, adapters: tuple[Tensor, Tensor]) -> bool:
        pairs = zip(self._adapters, adapters, strict=True)
        return all(kept.dtype == now.dtype and torch.equal(kept, now) for kept, now in pairs)

    def __getstate__(self) -> dict[str, Any]:
        return vars(KeptNorms())  # a copy lies elsewhere


def rescale(y: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """(magnitude / norms) ∘ y + bias, in fp32, rounded once to y's dtype; differentiable in y, magnitude and bias.

    Args:
        y: [..., N]. magnitude, norms: [N]. bias: [N].
    """
    scaled = y.float() * (magnitude.float() / norms)
    return (scaled if bias is None else scaled + bias.float()).to(y.dtype)
