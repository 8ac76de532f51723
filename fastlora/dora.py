"""DoRA over the fused linear: y = (m / ‖W + s · B A‖) ∘ (x Wᵀ + s · x Aᵀ Bᵀ) + bias, the norm taken of each row.

The norm counts as a constant in the backward pass, as in the paper. It takes a pass over the whole weight, so on the
CPU it is kept until A, B or the weight change: gradient accumulation, recomputation under checkpointing and evaluation
find it there. A and B are compared with copies, for writes through `.data`, by bitsandbytes' optimizers, and by FSDP
leave no trace on a tensor; of the frozen weight such writes are not seen. On other devices that comparison would wait
for the device, and the norm is formed anew.

Source: arXiv:2402.09353, equation 5 and section 4.3.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora import functional
from fastlora.nf4 import NF4Weight
from fastlora.operands import refuse_second_derivative

ROWS_AT_ONCE = 1024  # of a dense weight, widened to fp32 for its norm


def row_norms(weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row: [N], fp32, detached.

    Args:
        weight: [N, K], dense or NF4. lora_a: [R, K]. lora_b: [N, R].
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
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
        facts = (frozen.data_ptr(), frozen.shape, frozen.stride(), frozen.dtype, frozen._version, scaling)
        adapters = (lora_a.detach(), lora_b.detach())
        if self._norms is None or self._facts != facts or not self._same(adapters):
            self._weight, self._facts = weight, facts  # held, so that its memory is nobody else's
            with torch.inference_mode(False):  # training may need them later
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


def over_16_bits(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor, norms: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """DoRA with fp32 adapters over a dense 16-bit weight, the gradients of A and B as exact as the adapters are.

    What `rescale` hands on, (magnitude / norms) ∘ dy, is rounded to 16 bits before the low-rank products see it. Here
    the factor goes into the rows of B, and of dB, in fp32; dy stays as it came.

    Args:
        x: [..., K]. weight: [N, K], frozen, dtype of x. lora_a: [R, K], lora_b: [N, R], fp32.
        magnitude, norms: [N]. bias: [N].
    Returns:
        [..., N], dtype of x; differentiable in x, lora_a, lora_b, magnitude and bias.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _Over16Bits.apply(x, lora_a, lora_b, magnitude, bias, weight, norms, scaling)


class _Over16Bits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor | None, weight: Tensor,
        norms: Tensor, scaling: float,
    ) -> Tensor:  # fmt: skip
        z, h = torch.ops.fastlora.lora_linear(
            x, None, *_dense(weight), lora_a, lora_b, None, float(scaling), 0.0, ctx.needs_input_grad[2]
        )
        ctx.save_for_backward(x, h, z, lora_a, lora_b, magnitude, weight, norms)
        ctx.scaling, ctx.bias_dtype = float(scaling), None if bias is None else bias.dtype
        return rescale(z, magnitude, norms, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, z, lora_a, lora_b, magnitude, weight, norms = ctx.saved_tensors
        need_x, need_a, need_b, need_magnitude, need_bias, *_ = ctx.needs_input_grad
        factor, k = magnitude.float() / norms, weight.shape[1]
        rows = dy.reshape(-1, weight.shape[0])

        def products(dy: Tensor, b: Tensor, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
            operands = (*_dense(weight), lora_a, b, None, ctx.scaling, 0.0)
            return torch.ops.fastlora.lora_linear_backward(dy, x, h, k, *operands, *needs)

        dx = da = db = dm = dbias = None
        if need_x:
            dx, *_ = products((dy.float() * factor).to(dy.dtype), lora_b, True, False, False)
        if need_a or need_b:
            _, da, db = products(dy, factor[:, None] * lora_b, False, need_a, need_b)
            da, db = da if need_a else None, factor[:, None] * db if need_b else None
        if need_magnitude:
            dm = ((rows.float() * z.reshape(rows.shape)).sum(0) / norms).to(magnitude.dtype)
        if need_bias:
            dbias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, da, db, dm, dbias, None, None, None


def _dense(weight: Tensor) -> tuple[Any, ...]:
    """A dense weight as the operators take any weight."""
    return weight, None, None, None, None, weight.shape[0], 0
