"""Rotary embedding of queries and keys in one launch; the first half of a head turns with the second.

    y₁ = x₁ cos₁ - x₂ sin₁,      y₂ = x₂ cos₂ + x₁ sin₂

A program takes one token, all its heads. Dimensions beyond those of cos and sin are copied. Nothing is overwritten.
Backward turns the other way.

Source: arXiv:2104.09864, section 3.4.2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels.launch import Launcher
from torch import Tensor

_WARPS = 4


@triton.jit
def _turn(
    x_ptr, y_ptr, cos1, sin1, cos2, sin2, stride_h,
    HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The heads of one token; y is [HEADS, SIZE], contiguous."""
    heads, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    inside = (heads[:, None] < HEADS) & (columns[None, :] < HALF)
    x_ptrs = x_ptr + heads[:, None] * stride_h + columns[None, :]
    x1 = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    y_ptrs = y_ptr + heads[:, None] * SIZE + columns[None, :]
    tl.store(y_ptrs, y1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptrs + HALF, y2.to(y_ptr.dtype.element_ty), mask=inside)
    if 2 * HALF < SIZE:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        inside = (heads[:, None] < HEADS) & (rest[None, :] < SIZE)
        x = tl.load(x_ptr + heads[:, None] * stride_h + rest[None, :], mask=inside, other=0.0)
        tl.store(y_ptr + heads[:, None] * SIZE + rest[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, length,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_cb, stride_cs,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, SHARED: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample, place = token // length, token % length
    columns = tl.arange(0, BLOCK_HALF)
    inside = columns < HALF
    angle = sample * stride_cb + place * stride_cs + columns
    cos1 = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2, sin2 = cos1, sin1
    if not SHARED:
        cos2 = tl.load(cos_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
        sin2 = tl.load(sin_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    _turn(
        q_ptr + sample * stride_qb + place * stride_qs, q_out_ptr + token * (Q_HEADS * SIZE),
        cos1, sin1, cos2, sin2, stride_qh, Q_HEADS, SIZE, HALF, BACK, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _turn(
        k_ptr + sample * stride_kb + place * stride_ks, k_out_ptr + token * (K_HEADS * SIZE),
        cos1, sin1, cos2, sin2, stride_kh, K_HEADS, SIZE, HALF, BACK, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


def _constants(q_heads: int, k_heads: int, size: int, half: int, shared: bool, back: bool, *_: Any) -> dict[str, Any]:
    return {
        "Q_HEADS": q_heads, "K_HEADS": k_heads, "SIZE": size, "HALF": half, "SHARED": shared, "BACK": back,
        "BLOCK_Q": triton.next_power_of_2(q_heads), "BLOCK_K": triton.next_power_of_2(k_heads),
        "BLOCK_HALF": triton.next_power_of_2(half), "BLOCK_REST": triton.next_power_of_2(max(1, size - 2 * half)),
        "num_warps": _WARPS,
    }  # fmt: skip


_launcher = Launcher(_rotary_kernel, _constants)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, shared: bool, back: bool = False) -> tuple[Tensor, Tensor]:
    """q and k turned, or with `back` their gradients turned back; each [B, S, H, D], contiguous.

    q: [B, S, Hq, D], k: [B, S, Hk, D], cos, sin: [B or 1, S, rotated], of the same strides; the last dimensions are
    contiguous. shared: the angles are those of both halves, [B or 1, S, rotated / 2].
    """
    batch, length, q_heads, size = q.shape
    k_heads = k.shape[2]
    q_out = torch.empty((batch, length, q_heads, size), dtype=q.dtype, device=q.device)
    k_out = torch.empty((batch, length, k_heads, size), dtype=k.dtype, device=k.device)
    if batch * length:
        strides = *q.stride()[:3], *k.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)
        half = cos.shape[-1] if shared else cos.shape[-1] // 2
        key = q_heads, k_heads, size, half, shared, back, batch, length, q.dtype, k.dtype, cos.dtype, strides
        _launcher(key, (batch * length,), (q, k, cos, sin, q_out, k_out), (length, *strides))
    return q_out, k_out
