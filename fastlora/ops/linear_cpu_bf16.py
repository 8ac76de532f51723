"""The linear by one C++ call forward and one backward: bf16 on a CPU with AVX512_BF16, for any number of tokens.

Where `takes` says yes, `torch_path` hands its work over to this module. `linear` is the same with an autograd function
of its own: at one token, what Python does around the call costs more than a small layer. See `native_linear` for the
arithmetic. Saved for backward: x (where dA is wanted), h in fp32 (where dB is wanted), the adapters and the weight.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.native import linear as native_linear
from fastlora.ops.autograd import refuse_second_derivative
from fastlora.ops.backend import backend
from fastlora.ops.operands import Base, Gradients, Lora, Needs

_CPU = torch.device("cpu")


def takes(x: Tensor, base: Base, lora: Lora | None) -> bool:
    """Whether this path computes the linear, forward as well as backward. x: [..., K], or dy [..., N]; not empty."""
    if x.dtype is not torch.bfloat16 or not x.is_cpu or backend(_CPU).name != "cpp":
        return False
    if not base.is_nf4 and base.weight.stride(1) != 1:
        return False
    tokens = x.numel() // x.shape[-1]
    return native_linear.supports(tokens, base.n, base.k, 0 if lora is None else lora.a.shape[0], base.is_nf4)


def serves(x: Tensor, base: Base, lora: Lora | None, bias: Tensor | None) -> bool:
    """Whether `linear` can be called: this path takes the operands, and nobody trains the weight or the bias."""
    if x.dtype is not torch.bfloat16 or x.numel() == 0 or not takes(x, base, lora):
        return False
    return not (base.weight.requires_grad or (bias is not None and bias.requires_grad))


def linear(x: Tensor, base: Base, lora: Lora | None, bias: Tensor | None) -> Tensor:
    """y [..., N], differentiable in x and the adapters. x: [..., K]."""
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    return _Linear.apply(x, a, b, base, lora, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, base: Base, lora: Lora | None,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = x if x.dim() == 2 else x.reshape(-1, base.k)
        need_x, need_a, need_b, *_ = ctx.needs_input_grad
        y, h = forward(rows, base, lora, bias, need_b)
        ctx.save_for_backward(rows if need_a else None, h, lora_a, lora_b, base.weight)
        ctx.needs, ctx.base, ctx.lora, ctx.shape = Needs(need_x, need_a, need_b), base, lora, x.shape
        return y if x.dim() == 2 else y.view(*x.shape[:-1], base.n)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, lora_a, lora_b, weight = ctx.saved_tensors
        lora = None if ctx.lora is None else ctx.lora._replace(a=lora_a, b=lora_b)
        rows = dy if dy.dim() == 2 else dy.reshape(-1, ctx.base.n)
        grads = backward(rows, x, h, ctx.base._replace(weight=weight), lora, ctx.needs)
        dx = grads.x if grads.x is None or dy.dim() == 2 else grads.x.view(ctx.shape)
        return dx, grads.lora_a, grads.lora_b, None, None, None


def forward(
    x: Tensor, base: Base, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h = dropout(x) Aᵀ [M, R] in fp32 where it is to be saved. x: [M, K]."""
    weight, update = _operands(base, lora)
    x = _rows(x)
    y = x.new_empty((x.shape[0], base.n))
    h = None
    if save_h and update is not None:
        h = x.new_empty((x.shape[0], update.lora_a.shape[0]), dtype=torch.float32)
    native_linear.linear(x, weight, update, bias if bias is None else bias.float().contiguous(), y, h)
    return y, h


def backward(dy: Tensor, x: Tensor | None, h: Tensor | None, base: Base, lora: Lora | None, needs: Needs) -> Gradients:
    """Gradients of everything but a dense weight and the bias. dy: [M, N]; x is needed for dA, h for dB."""
    weight, update = _operands(base, lora)
    dy = _rows(dy)
    dx = dy.new_empty((dy.shape[0], base.k)) if needs.x else None
    if lora is None or update is None:
        native_linear.linear_backward(dy, None, None, weight, None, dx)
        return Gradients(dx, None, None)
    da = torch.empty_like(update.lora_a) if needs.lora_a else None
    db = torch.empty_like(update.lora_b) if needs.lora_b else None
    native_linear.linear_backward(dy, None if x is None else _rows(x), h, weight, update, dx, da, db)
    return Gradients(dx, None if da is None else da.to(lora.a.dtype), None if db is None else db.to(lora.b.dtype))


def _operands(base: Base, lora: Lora | None) -> tuple[Tensor | native_linear.Packed, native_linear.Update | None]:
    weight: Tensor | native_linear.Packed = base.weight
    if base.absmax is not None:
        weight = native_linear.Packed(
            base.weight, base.absmax, base.absmax2, base.code2, base.offset, base.blocksize, base.n, base.k
        )
    if lora is None:
        return weight, None
    seed = None if lora.seed is None else int(lora.seed.item())
    a, b = lora.a, lora.b
    if a.dtype is not b.dtype:
        a, b = a.float(), b.float()
    return weight, native_linear.Update(a.contiguous(), b.contiguous(), lora.scaling, seed, lora.dropout_p)


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()
