"""RMSNorm over rows: y = x / sqrt(mean(x²) + eps) · (weight + offset), summed in fp32 and rounded once.

Few columns, as in the norms of a head, share a program; a row of up to `MOST_COLUMNS` is held in registers, so that
each value is read once. Backward reads x and dy, and takes 1 / sqrt(...) from forward:

    dx = rstd · (g - x̂ · mean(g · x̂)),      g = dy · (weight + offset),      x̂ = x · rstd

Source: arXiv:1910.07467.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels.launch import Launcher
from fastlora.kernels.operands import as_rows
from torch import Tensor

MOST_COLUMNS = 16384
_VALUES = 4096  # of a program, at least; up to so many a warp has 512


@triton.jit
def _rows(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, M, N, heads, stride_xm, stride_xh, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, columns = _rows(BLOCK_M, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    places = rows // heads * stride_xm + rows % heads * stride_xh
    x = tl.load(x_ptr + places[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32) + offset
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / N + eps)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, M, N, heads, stride_dym, stride_xm, stride_xh, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows, columns = _rows(BLOCK_M, BLOCK_N)
    places = rows // heads * stride_xm + rows % heads * stride_xh
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    dy = tl.load(dy_ptr + rows[:, None] * stride_dym + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + places[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32) + offset
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
    x *= rstd
    g = dy * weight[None, :]
    dx = rstd * (g - x * (tl.sum(g * x, 1) / N)[:, None])
    tl.store(dx_ptr + rows[:, None] * N + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


def tile(n: int) -> dict[str, int]:
    """Rows and columns of a program's tile, and its warps, for rows of n values."""
    columns = triton.next_power_of_2(n)
    rows = max(1, _VALUES // columns)
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": min(16, max(4, rows * columns // 512))}


def _constants(n: int, *_: Any) -> dict[str, Any]:
    return tile(n)


_launcher = Launcher(_rms_norm_kernel, _constants)
_backward_launcher = Launcher(_rms_norm_backward_kernel, _constants)


def _headed(x: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """(x or a copy of it, rows, columns, heads, strides of a token and of a head).

    Heads that are columns of a wider tensor are read where they are; else a row is a token of one head.
    """
    n = x.shape[-1]
    if x.dim() > 2 and x.stride(-1) == 1 and not x.is_contiguous() and all(x.shape):
        tokens, heads = x.shape[:-2], x.shape[-2]
        step = x.stride(-3)
        even = all(x.stride(d) == x.stride(d + 1) * tokens[d + 1] for d in range(len(tokens) - 1))
        if even and x.stride(-2) * heads != step:
            return x, x.numel() // n, n, heads, step, x.stride(-2)
    rows = as_rows(x)
    return rows, rows.shape[0], n, 1, rows.stride(0), 0


def forward(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y [..., N] in `dtype`, 1 / sqrt(mean(x²) + eps) [M] in fp32). x: [..., N]; weight: [N]."""
    rows, m, n, heads, *strides = _headed(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        grid, key = (triton.cdiv(m, tile(n)["BLOCK_M"]),), (n, m, heads, *strides, x.dtype, weight.dtype, dtype)
        _launcher(key, grid, (rows, weight, y, rstd), (m, n, heads, *strides, eps, offset))
    return y, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """dx [..., N] in x's dtype. dy, x: [..., N]; rstd: [M], of `forward`."""
    dy, (rows, m, n, heads, *strides) = as_rows(dy), _headed(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if m:
        strides.insert(0, dy.stride(0))
        grid, key = (triton.cdiv(m, tile(n)["BLOCK_M"]),), (n, m, heads, *strides, dy.dtype, x.dtype, weight.dtype)
        _backward_launcher(key, grid, (dy, rows, weight, rstd, dx), (m, n, heads, *strides, offset))
    return dx
