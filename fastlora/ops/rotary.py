"""Rotary embedding of queries and keys with a backward of its own: only the angles are saved.

Source: arXiv:2104.09864, section 3.4.2.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops.autograd import refuse_second_derivative


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k turned by Triton's kernel, each value computed in fp32 and rounded once; differentiable in q and k.

    Args:
        q, k: [B, H, S, D], with `unsqueeze_dim=2` [B, S, H, D]; k may have fewer heads.
        cos, sin: [B or 1, S, rotated], at most D; dimensions beyond are left as they are.
        shared: both halves have the same angles, and cos and sin are [B or 1, S, rotated / 2].
    Returns:
        (q, k) turned, new tensors of the same shapes, in memory as [B, S, H, D].
    Source: arXiv:2104.09864, section 3.4.2.
    """
    if unsqueeze_dim == 2:
        return _apply(q, k, cos, sin, shared)  # type: ignore[no-any-return]
    turned_q, turned_k = _apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, shared)
    return turned_q.transpose(1, 2), turned_k.transpose(1, 2)


def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same by plain torch for q and k [B, H, S, D]."""
    return _turned(q, cos[:, None], sin[:, None]), _turned(k, cos[:, None], sin[:, None])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
        from fastlora.kernels.rotary import rotate

        cos, sin = _rows(cos), _rows(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.shared = shared
        return rotate(_rows(q), _rows(k), cos, sin, shared)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from fastlora.kernels.rotary import rotate

        refuse_second_derivative()
        return *rotate(_rows(dq), _rows(dk), *ctx.saved_tensors, ctx.shared, back=True), None, None, None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_apply = super(torch.autograd.Function, _Rotary).apply  # without its search for torch.func's wrappers
