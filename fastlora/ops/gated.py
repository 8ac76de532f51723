"""Gated activations with a backward of its own: gate and up are saved, nothing that they become on the way.

Source: arXiv:2002.05202, section 2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops.autograd import refuse_second_derivative
from fastlora.ops.group import neighbours

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) · up by Triton's kernels, computed in fp32 and rounded once; differentiable in both.

    Args:
        gate, up: [..., N] in one dtype. act: one of `ACTIVATIONS`.
    Returns:
        [..., N], contiguous.
    Source: arXiv:2002.05202, section 2.
    """
    y: Tensor = _apply(gate, up, act)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        from fastlora.kernels import gated as kernel

        ctx.save_for_backward(gate, up)
        # two linears in one product, whose gradients are then multiplied as one; aligned, as kernels want it
        ctx.act, ctx.joined = act, gate.shape[-1] % 16 == 0 and neighbours([gate, up]) is not None
        return kernel.forward(gate, up, act)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from fastlora.kernels import gated as kernel

        refuse_second_derivative()
        return *kernel.backward(dy, *ctx.saved_tensors, ctx.act, ctx.joined), None


_apply = super(torch.autograd.Function, _Gated).apply  # without its search for torch.func's wrappers
