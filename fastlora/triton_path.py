"""The fused linear on CUDA: Triton kernels around one cuBLAS product each way.

NF4 without dropout: expand the weight with s · B A merged in, multiply once; what LoRA costs is the
shrink, the dy pass and the x pass, each one read of an activation. With dropout, or over a dense
weight, where merging would round small updates away: write the update first (`expand`), then let
cuBLAS add the base product to it with beta = 1. A separate [M, N] product is never made.

The expanded weight comes from torch's caching allocator, which hands the same block to every layer
in turn on a stream: a scratch buffer in effect, with nothing to size or to free.
"""

import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels import lora as kernel
from fastlora.kernels.lora import Dropout
from fastlora.operands import Base, Gradients, Lora, Needs


def forward(
    x: Tensor, base: Base, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h = dropout(x) Aᵀ [M, R] in fp32 where it is to be saved. x: [M, K]."""
    if lora is None:
        return F.linear(x, base.dense(x.dtype), bias), None
    dropout = Dropout(lora.dropout_p, lora.seed)
    if _merges(base, lora):
        h = kernel.shrink(x, lora.a.to(lora.dtype), dropout) if save_h else None
        return F.linear(x, base.merged(x.dtype, lora), bias), h
    h = kernel.shrink(x, lora.a.to(lora.dtype), dropout)
    y = kernel.expand(h, lora.b.to(lora.dtype), lora.scaling, x.dtype, Dropout(), bias)
    return y.addmm_(x, base.dense(x.dtype).t()), h if save_h else None


def backward(dy: Tensor, x: Tensor | None, h: Tensor | None, base: Base, lora: Lora | None, needs: Needs) -> Gradients:
    """Gradients of everything but a dense weight and the bias. dy: [M, N]; x is needed for dA, h for dB."""
    if lora is None:
        return Gradients(dy @ base.dense(dy.dtype) if needs.x else None, None, None)
    dropout = Dropout(lora.dropout_p, lora.seed)
    merges = _merges(base, lora)
    needs_g = needs.lora_a or (needs.x and not merges)
    g, da, db = None, None, None
    if needs_g or needs.lora_b:
        g, db = kernel.dy_pass(
            dy, lora.b.to(lora.dtype), h if h is not None else dy, lora.scaling, needs_g, needs.lora_b
        )
    if needs.lora_a:
        assert g is not None
        assert x is not None
        da = kernel.x_pass(x, g, dropout, lora.dtype).to(lora.a.dtype)
    db = db.to(lora.b.dtype) if db is not None else None
    if not needs.x:
        return Gradients(None, da, db)
    if merges:
        return Gradients(dy @ base.merged(dy.dtype, lora), da, db)
    assert g is not None
    dx = kernel.expand(g, lora.a.to(lora.dtype).t(), 1.0, dy.dtype, dropout)
    return Gradients(dx.addmm_(dy, base.dense(dy.dtype)), da, db)


def _merges(base: Base, lora: Lora) -> bool:
    return base.is_nf4 and lora.seed is None
