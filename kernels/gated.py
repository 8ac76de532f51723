"""Gated activations, act(gate) · up, and their gradients: computed in fp32, rounded once.

act is one of `ACTIVATIONS`: "silu" (SwiGLU), "gelu" and "gelu_tanh" (GEGLU). Nothing is written in place.

Source: arXiv:2002.05202, section 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels.launch import Launcher
from fastlora.kernels.operands import as_rows
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_COLUMNS, _WARPS = 2048, 4  # of a program


@triton.jit
def _activated(x, ACT: tl.constexpr):
    """(act(x), its derivative)."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y, slope = x * s, s * (1 + x * (1 - s))
    elif ACT == "gelu":
        half = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y, slope = x * half, half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi) ...: tanh(t) = 2 sigmoid(2 t) - 1
        s = tl.sigmoid(inner)
        y = x * s
        slope = s + y * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return y, slope


@triton.jit(do_not_specialize=["M"])
def _gated_kernel(
    gate_ptr, up_ptr, out_ptr, M, N, stride_gm, stride_um, ACT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    gate = tl.load(gate_ptr + row * stride_gm + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + columns, mask=inside, other=0.0).to(tl.float32)
    y, _ = _activated(gate, ACT)
    tl.store(out_ptr + row * N + columns, (y * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, M, N, stride_dm, stride_gm, stride_um, stride_om,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    dy = tl.load(dy_ptr + row * stride_dm + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gm + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_um + columns, mask=inside, other=0.0).to(tl.float32)
    y, slope = _activated(gate, ACT)
    tl.store(dgate_ptr + row * stride_om + columns, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * stride_om + columns, (dy * y).to(dup_ptr.dtype.element_ty), mask=inside)


def _constants(act: str, *_: Any) -> dict[str, Any]:
    return {"ACT": act, "BLOCK_N": _COLUMNS, "num_warps": _WARPS}


_launcher = Launcher(_gated_kernel, _constants)
_backward_launcher = Launcher(_gated_backward_kernel, _constants)


def forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) · up, [..., N]. gate, up: [..., N] in one dtype."""
    gates, ups = as_rows(gate), as_rows(up)
    m, n = gates.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if m and n:
        strides = gates.stride(0), ups.stride(0)
        key, grid = (act, m, n, strides, gate.dtype), (m, triton.cdiv(n, _COLUMNS))
        _launcher(key, grid, (gates, ups, out), (m, n, *strides))
    return out


def backward(dy: Tensor, gate: Tensor, up: Tensor, act: str, joined: bool = False) -> tuple[Tensor, Tensor]:
    """(d gate, d up), [..., N] each, in their dtype. dy: [..., N]. joined: as the columns of one tensor [..., 2 N]."""
    dys, gates, ups = as_rows(dy), as_rows(gate), as_rows(up)
    m, n = gates.shape
    if joined:
        dgate, dup = torch.empty((*gate.shape[:-1], 2 * n), dtype=gate.dtype, device=gate.device).split(n, -1)
    else:
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if m and n:
        strides = dys.stride(0), gates.stride(0), ups.stride(0), 2 * n if joined else n
        key, grid = (act, m, n, strides, gate.dtype, dy.dtype), (m, triton.cdiv(n, _COLUMNS))
        _backward_launcher(key, grid, (dys, gates, ups, dgate, dup), (m, n, *strides))
    return dgate, dup
