"""The low-rank products around a linear layer, each reading its activations once.

    shrink:  h  = (mask ∘ x) Aᵀ                    [M, K] -> [M, R]
    expand:  y += mask ∘ (scaling · h Bᵀ) + bias   [M, R] -> [M, N], y the product with the base
    dy pass: g  = scaling · dy B  and  dB = scaling · dyᵀ h     in one read of dy
    x pass:  dA = gᵀ (mask ∘ x)                                 in one read of x

Bytes, bf16: shrink 2MK; dy pass 2MN, and half as much again at R = 16 for partial sums of g; x pass 2MK;
expand 2MN read and written. Where the partial sums would cost more than a second read of dy, it is read twice.
2·M·K·R FLOPs each (twice for the dy pass): bound by memory up to R of about 64. h and g: fp32, [M, R].

Reductions over M, N or K that span programs go through fp32 partial sums, which are then added in order:
no atomics, so the same input gives the same bits.

The dropout mask is never stored. Eight neighbours of a row share one Philox-4x32-7 call, 16 bits
each, keyed by a seed tensor and counted by position, so forward, backward and a checkpoint's
recomputation derive the same mask; see `fastlora.reference.dropout_mask`.

`MODE` says how products keep the adapters' precision at the cost of 16-bit tensor cores:
    narrow  16-bit activations and adapters: one 16-bit product;
    split   bf16 activations, fp32 adapters: v = v1 + v2 + v3, each exact in bf16, three bf16 products,
            exact except for the fp32 accumulation (expand keeps two parts, as it rounds to bf16 anyway);
    tf32x3  fp16 activations, fp32 adapters: three tf32 products;
    ieee    fp32 activations.
A rank above 64 is cut into parts of 64, each of which reads the activations again.

Rows need not share one adapter: with `segments`, A is [adapters, R, K], B is [adapters, N, R], and every row uses its
own (experts of a mixture, samples with different adapters; see `kernels.segments`). Rows without one get zero.
Source: arXiv:2106.09685, section 4.1; Salmon et al., SC 2011 (Philox).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels import lora_plan
from fastlora.kernels.choice import Tile
from fastlora.kernels.launch import Launcher
from fastlora.kernels.lora_plan import Dropout as Dropout
from fastlora.kernels.lora_plan import Plan, interpreted, plan
from fastlora.kernels.lora_plan import block_r as block_r
from fastlora.kernels.lora_plan import mode as mode
from fastlora.kernels.lora_tile import dot, dot_bf16, keep_mask, top
from fastlora.kernels.segments import BOTH, FACTS, KEEP, SCALING, THRESHOLD, Segments, bounds, owner_of, rows_of_tile
from torch import Tensor

EXPAND_ROWS, EXPAND_COLUMNS, EXPAND_WARPS = 128, 64, 8
MAX_EXPAND_STEPS = 8
MAX_EXPAND_BLOCK_R = 32
SUM_BLOCK = 256
_NO_DROPOUT = Dropout()
_ALONE, _NO_TABLE = (0, False, -1), (0, 0, 0)  # all rows have the same adapter


@triton.jit
def _stretch(ends_ptr, segments, split, BLOCK_M: tl.constexpr):
    """(segment, first row, end) of what a program along axis 1 sums; every segment has equally many programs."""
    parts = tl.num_programs(1) // segments
    segment, part = split % segments, split // segments
    begin, end = bounds(ends_ptr, segments, segment)
    length = (tl.cdiv(end - begin, parts) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin += part * length
    return segment, begin, tl.minimum(begin + length, end)


@triton.jit(do_not_specialize=["M", "threshold", "segments", "adapters"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, seed_ptr, h_ptr, ends_ptr, owner_ptr, facts_ptr,
    M, K, R, k_per_split, threshold, keep_scale,
    stride_xm, stride_xk, stride_ar, stride_ak, segments, adapters, stride_adapter,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    SEGMENTS: tl.constexpr, OWNED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_end = tl.minimum(split * k_per_split + k_per_split, K)
    m_start, m_end = tl.program_id(0).to(tl.int64) * BLOCK_M, M
    if SEGMENTS:
        segment, m_start, m_end = rows_of_tile(ends_ptr, segments, tl.program_id(0), SEGMENTS, BLOCK_M)
        owner = owner_of(owner_ptr, segments, adapters, segment, OWNED)
        k_end = tl.where((owner >= 0) & (m_start < m_end), k_end, 0)
        owner = tl.maximum(owner, 0)
        a_ptr += owner * stride_adapter
        if FACTOR >= 0:
            keep_scale *= tl.load(facts_ptr + owner * FACTS + FACTOR)
            threshold = tl.load(facts_ptr + owner * FACTS + THRESHOLD).to(tl.int32)
    offs_m = m_start + tl.arange(0, BLOCK_M)
    for k_start in range(split * k_per_split, k_end, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        x_mask = (offs_m[:, None] < m_end) & (offs_k[None, :] < k_end)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)
        a_mask = (offs_k[:, None] < k_end) & (offs_r[None, :] < R)
        a = tl.load(a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar, mask=a_mask, other=0.0)
        if DROPOUT:
            x = tl.where(keep_mask(seed_ptr, offs_m, k_start, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, a, acc, MODE, INTERPRETED)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_R]
    h_ptrs = h_ptr + (split * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(h_ptrs, acc * keep_scale, mask=(offs_m[:, None] < m_end) & (offs_r[None, :] < R))


@triton.jit
def _expand_b(b_ptr, offs_r, R, offs_n, N, stride_br, stride_bn):
    """A tile of Bᵀ [BLOCK_R, BLOCK_N], zero outside."""
    mask = (offs_r[:, None] < R) & (offs_n[None, :] < N)
    return tl.load(b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn, mask=mask, other=0.0)


@triton.jit
def _expand_dot(h, b, acc, MODE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + h Bᵀ: [BLOCK_M, BLOCK_R] @ [BLOCK_R, BLOCK_N]. "split" keeps two parts of each."""
    if MODE == "narrow":
        acc = tl.dot(h.to(b.dtype), b, acc)
    elif MODE == "split":
        h1, b1 = top(h), top(b)
        acc = dot_bf16(h1, top(b - b1), acc, INTERPRETED)
        acc = dot_bf16(top(h - h1), b1, acc, INTERPRETED)
        acc = dot_bf16(h1, b1, acc, INTERPRETED)
    else:
        acc = tl.dot(h, b.to(tl.float32), acc, input_precision=MODE)
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "segments", "adapters"])
def _lora_expand_kernel(
    h_ptr, b_ptr, bias_ptr, base_ptr, rescale_ptr, seed_ptr, out_ptr, ends_ptr, owner_ptr, facts_ptr,
    M, N, R, scaling, threshold,
    stride_bn, stride_br, segments, adapters, stride_adapter,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, RESCALES: tl.constexpr, DROPOUT: tl.constexpr,
    MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    SEGMENTS: tl.constexpr, OWNED: tl.constexpr, FACTOR: tl.constexpr, WHOLE_R: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n_start = tl.program_id(1).to(tl.int64) * BLOCK_N
    offs_n = n_start + tl.arange(0, BLOCK_N)
    in_n = offs_n[None, :] < N
    offs_r = tl.arange(0, BLOCK_R)
    if WHOLE_R and not SEGMENTS:
        b = _expand_b(b_ptr, offs_r, R, offs_n, N, stride_br, stride_bn)
    for step in range(STEPS):  # with segments, one
        tile = tl.program_id(0) * STEPS + step
        m_start, m_end, r_end, factor = tile.to(tl.int64) * BLOCK_M, M, R, scaling
        if SEGMENTS:
            segment, m_start, m_end = rows_of_tile(ends_ptr, segments, tile, SEGMENTS, BLOCK_M)
            owner = owner_of(owner_ptr, segments, adapters, segment, OWNED)
            r_end = tl.where((owner >= 0) & (m_start < m_end), R, 0)
            if HAS_BIAS:
                bias_ptr += tl.where(owner >= 0, owner, adapters) * N
            owner = tl.maximum(owner, 0)
            b_ptr += owner * stride_adapter
            if FACTOR >= 0:
                factor *= tl.load(facts_ptr + owner * FACTS + FACTOR)
                threshold = tl.load(facts_ptr + owner * FACTS + THRESHOLD).to(tl.int32)
        offs_m = m_start + tl.arange(0, BLOCK_M)
        in_m = offs_m[:, None] < m_end
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if WHOLE_R and not SEGMENTS:
            h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=in_m & (offs_r[None, :] < R), other=0.0)
            acc = _expand_dot(h, b, acc, MODE, INTERPRETED)
        else:
            for r_start in range(0, r_end, BLOCK_R):
                rank = r_start + offs_r
                h = tl.load(h_ptr + offs_m[:, None] * R + rank[None, :], mask=in_m & (rank[None, :] < R), other=0.0)
                b = _expand_b(b_ptr, rank, R, offs_n, N, stride_br, stride_bn)
                acc = _expand_dot(h, b, acc, MODE, INTERPRETED)
        acc *= factor
        if DROPOUT:
            acc = tl.where(keep_mask(seed_ptr, offs_m, n_start, N, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
        offs = offs_m[:, None] * N + offs_n[None, :]
        if ADDS:
            acc += tl.load(base_ptr + offs, mask=in_m & in_n, other=0.0).to(tl.float32)
        if RESCALES:
            acc *= tl.load(rescale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=in_m & in_n)


@triton.jit(do_not_specialize=["M", "segments", "adapters"])
def _lora_dy_kernel(
    dy_ptr, b_ptr, h_ptr, g_ptr, db_ptr, ends_ptr, owner_ptr, facts_ptr,
    M, N, R, m_per_split, scaling,
    stride_dm, stride_dn, stride_bn, stride_br, segments, adapters, stride_adapter,
    NEED_G: tl.constexpr, NEED_DB: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    SEGMENTS: tl.constexpr, OWNED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile_n, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = offs_r[None, :] < R
    m_begin, m_end = split * m_per_split, tl.minimum(split * m_per_split + m_per_split, M)
    n_end, g_scaling = N, scaling
    if SEGMENTS:
        segment, m_begin, m_end = _stretch(ends_ptr, segments, split, BLOCK_M)
        owner = owner_of(owner_ptr, segments, adapters, segment, OWNED)
        n_end = tl.where(owner >= 0, N, 0)
        if not NEED_G:
            m_end = tl.where(owner >= 0, m_end, m_begin)
        owner = tl.maximum(owner, 0)
        b_ptr += owner * stride_adapter
        if FACTOR >= 0:
            g_scaling *= tl.load(facts_ptr + owner * FACTS + FACTOR)
    b_mask = (offs_n[:, None] < n_end) & in_r
    b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br, mask=b_mask, other=0.0)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for m_start in range(m_begin, m_end, BLOCK_M):
        offs_m = m_start + tl.arange(0, BLOCK_M)
        dy_mask = (offs_m[:, None] < m_end) & (offs_n[None, :] < N)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn, mask=dy_mask, other=0.0)
        hg_mask = (offs_m[:, None] < m_end) & in_r
        if NEED_G:
            g = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), MODE, INTERPRETED)
            tl.store(g_ptr + (tile_n * M + offs_m[:, None]) * R + offs_r[None, :], g * g_scaling, mask=hg_mask)
        if NEED_DB:
            h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=hg_mask, other=0.0)
            db = dot(tl.trans(dy), h, db, MODE, INTERPRETED)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_R]
    if NEED_DB:
        db_ptrs = db_ptr + (split * N + offs_n[:, None]) * R + offs_r[None, :]
        tl.store(db_ptrs, db * scaling, mask=(offs_n[:, None] < N) & in_r)


@triton.jit(do_not_specialize=["M", "threshold", "segments", "adapters"])
def _lora_x_kernel(
    x_ptr, g_ptr, seed_ptr, da_ptr, ends_ptr, owner_ptr, facts_ptr,
    M, K, R, m_per_split, threshold, keep_scale,
    stride_xm, stride_xk, stride_dr, stride_dk, segments, adapters, stride_adapter,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    SEGMENTS: tl.constexpr, OWNED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k_start = tl.program_id(0).to(tl.int64) * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    da = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    m_begin, m_end = split * m_per_split, tl.minimum(split * m_per_split + m_per_split, M)
    if SEGMENTS:
        segment, m_begin, m_end = _stretch(ends_ptr, segments, split, BLOCK_M)
        owner = owner_of(owner_ptr, segments, adapters, segment, OWNED)
        m_end = tl.where(owner >= 0, m_end, m_begin)
        if FACTOR >= 0:
            owner = tl.maximum(owner, 0)
            keep_scale *= tl.load(facts_ptr + owner * FACTS + FACTOR)
            threshold = tl.load(facts_ptr + owner * FACTS + THRESHOLD).to(tl.int32)
    for m_start in range(m_begin, m_end, BLOCK_M):
        offs_m = m_start + tl.arange(0, BLOCK_M)
        x_mask = (offs_m[:, None] < m_end) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)
        if DROPOUT:
            x = tl.where(keep_mask(seed_ptr, offs_m, k_start, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        g_mask = (offs_m[:, None] < m_end) & (offs_r[None, :] < R)
        g = tl.load(g_ptr + offs_m[:, None] * R + offs_r[None, :], mask=g_mask, other=0.0)
        da = dot(tl.trans(x), g, da, MODE, INTERPRETED)  # [BLOCK_K, BLOCK_M] @ [BLOCK_M, BLOCK_R]
    da_ptrs = da_ptr + split * R * K + offs_r[None, :] * stride_dr + offs_k[:, None] * stride_dk
    tl.store(da_ptrs, da * keep_scale, mask=(offs_r[None, :] < R) & (offs_k[:, None] < K))


@triton.jit
def _add_up(parts_ptr, out_ptr, program, parts, size, BLOCK: tl.constexpr):
    """out [size] = the sum of parts [parts, size], eight at a time, in order."""
    offs = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, parts, 8):
        part = start + tl.arange(0, 8)[:, None]
        ptrs = parts_ptr + part.to(tl.int64) * size + offs[None, :]
        total += tl.sum(tl.load(ptrs, mask=(part < parts) & (offs[None, :] < size), other=0.0), 0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _lora_sum_kernel(
    p_ptr, q_ptr, p_out_ptr, q_out_ptr, p_parts, q_parts, p_size, q_size, p_programs, BLOCK: tl.constexpr
):  # fmt: skip
    """Two sums over the first axis in one launch."""
    program = tl.program_id(0)
    if program < p_programs:
        _add_up(p_ptr, p_out_ptr, program, p_parts, p_size, BLOCK)
    else:
        _add_up(q_ptr, q_out_ptr, program - p_programs, q_parts, q_size, BLOCK)


def _shrink_constants(launch: Plan, how: str, drops: bool, rows: tuple[int, bool, int], *_: Any) -> dict[str, Any]:
    return {"DROPOUT": drops, "BLOCK_K": launch.cut.columns, **_common(launch, how, rows)}


def _dy_constants(
    launch: Plan, how: str, need_g: bool, need_db: bool, rows: tuple[int, bool, int], *_: Any
) -> dict[str, Any]:
    return {"NEED_G": need_g, "NEED_DB": need_db, "BLOCK_N": launch.cut.columns, **_common(launch, how, rows)}


def _common(launch: Plan, how: str, rows: tuple[int, bool, int]) -> dict[str, Any]:
    by_segment = dict(zip(("SEGMENTS", "OWNED", "FACTOR"), rows, strict=True))
    return {"MODE": how, "INTERPRETED": interpreted(), "BLOCK_M": launch.cut.rows, **by_segment, **launch.options}


def _expand_tile(n: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of [M, n]."""
    return (EXPAND_ROWS, EXPAND_COLUMNS) if n % 16 == 0 else lora_plan.halved(EXPAND_ROWS, EXPAND_COLUMNS)


def _expand_constants(
    r: int, how: str, has_bias: bool, adds: bool, rescales: bool, drops: bool, rows: tuple[int, bool, int], steps: int,
    m: int, n: int, *_: Any,
) -> dict[str, Any]:  # fmt: skip
    block, (block_m, block_n) = min(MAX_EXPAND_BLOCK_R, block_r(r)), _expand_tile(n)
    return {
        "HAS_BIAS": has_bias, "ADDS": adds, "RESCALES": rescales, "DROPOUT": drops, "MODE": how,
        "INTERPRETED": interpreted(),
        "num_warps": EXPAND_WARPS, "WHOLE_R": r <= block, "STEPS": steps,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block,
        **dict(zip(("SEGMENTS", "OWNED", "FACTOR"), rows, strict=True)),
    }  # fmt: skip


_shrink_launcher = Launcher(_lora_shrink_kernel, _shrink_constants)
_expand_launcher = Launcher(_lora_expand_kernel, _expand_constants)
_dy_launcher = Launcher(_lora_dy_kernel, _dy_constants)
_x_launcher = Launcher(_lora_x_kernel, _shrink_constants)
_sum_launcher = Launcher(_lora_sum_kernel, lambda *_: {"BLOCK": SUM_BLOCK})


def _partial(parts: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """[parts, rows, columns], or [rows, columns] where there is one part, fp32, not initialised."""
    shape = (rows, columns) if parts == 1 else (parts, rows, columns)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def total(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of what `_partial` made, in order, rounded once to `dtype`."""
    if parts.dim() == 2 and dtype is torch.float32:
        return parts
    shape = parts.shape
    out = torch.empty(shape[-2:], dtype=dtype, device=parts.device)
    if size := shape[-2] * shape[-1]:
        number, programs = shape[0] if len(shape) == 3 else 1, -(size // -SUM_BLOCK)
        key = number, number, size, 0, dtype, dtype
        _sum_launcher(key, (programs,), (parts, parts, out, out), (number, number, size, 0, programs))
    return out


def totals(p: Tensor, p_dtype: torch.dtype, q: Tensor, q_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two such sums, in one launch if both have something to add or to round."""
    if (p.dim() == 2 and p_dtype is torch.float32) or (q.dim() == 2 and q_dtype is torch.float32):
        return total(p, p_dtype), total(q, q_dtype)
    p_out = torch.empty(p.shape[-2:], dtype=p_dtype, device=p.device)
    q_out = torch.empty(q.shape[-2:], dtype=q_dtype, device=p.device)
    p_size, q_size = p_out.numel(), q_out.numel()
    p_parts, q_parts = p.shape[0] if p.dim() == 3 else 1, q.shape[0] if q.dim() == 3 else 1
    p_programs, q_programs = -(p_size // -SUM_BLOCK), -(q_size // -SUM_BLOCK)
    if p_programs + q_programs:
        key = p_parts, q_parts, p_size, q_size, p_dtype, q_dtype
        numbers = p_parts, q_parts, p_size, q_size, p_programs
        _sum_launcher(key, (p_programs + q_programs,), (p, q, p_out, q_out), numbers)
    return p_out, q_out


def _summed(parts: Tensor, segments: Segments | None) -> Tensor:
    """The sum of what the programs along axis 1 of a reduction over rows have written: [...], or [adapters, ...]."""
    if segments is None:
        return total(parts)
    parts = parts.view(-1, segments.number, *parts.shape[-2:])
    return segments.sum_by_adapter(parts[0] if parts.shape[0] == 1 else parts.sum(0))


def _last(adapter: Tensor, segments: Segments | None) -> tuple[torch.Size, int]:
    """(shape of one adapter, stride from one to the next)."""
    shape = adapter.shape
    return (shape, 0) if segments is None else (shape[1:], adapter.stride(0))


def _by_row(
    segments: Segments | None, stride: int, column: int, dummy: Tensor
) -> tuple[tuple[int, bool, int], tuple[Tensor, ...], tuple[int, int, int]]:
    """What the kernels need to find each row's adapter: constants, pointers and numbers; a dummy where all have one."""
    if segments is None:
        return _ALONE, (dummy, dummy, dummy), _NO_TABLE
    return segments.constants(column), segments.tables, (segments.number, segments.adapters, stride)


def shrink(
    x: Tensor,
    lora_a: Tensor,
    dropout: Dropout,
    scaling: float = 1.0,
    cut: Tile | None = None,
    segments: Segments | None = None,
    column: int = BOTH,
) -> Tensor:
    """h = scaling · (mask ∘ x) Aᵀ. x: [M, K], any strides; lora_a: [R, K]. Returns [M, R], fp32.

    cut: a tile to use in place of the table's or the built-in one, here and below.
    segments: each row uses its own adapter's A; lora_a is [adapters, R, K]. column: of the segments' facts, a factor.
    """
    m, k = x.shape
    (r, _), stride = _last(lora_a, segments)
    drops, how = dropout.active, mode(x.dtype, lora_a.dtype)
    strides = *x.stride(), *lora_a.stride()[-2:]
    launch = plan("shrink", m, k, r, how, drops, x.device, cut, segments.number if segments else 0, max(strides[:2]))
    h = _partial(launch.splits, m, r, x)
    rows, tables, counts = _by_row(segments, stride, column, x)
    _shrink_launcher(
        (launch, how, drops, rows, x.dtype, lora_a.dtype, strides, stride),
        launch.grid,
        (x, lora_a, dropout.seed if drops else x, h, *tables),
        (m, k, r, launch.per_split, dropout.threshold, scaling * dropout.keep_scale, *strides, *counts),
    )
    return total(h)


def expand(
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    dtype: torch.dtype,
    dropout: Dropout,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    segments: Segments | None = None,
    column: int = -1,
    rescale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rescale ∘ (mask ∘ (scaling · h Bᵀ) + base) + bias. h: [M, R], fp32; lora_b: [N, R], any strides.

    Returns [M, N] in `dtype`, rounded once.

    base: [M, N], contiguous; if it is in `dtype`, the result takes its place. rescale: [N], fp32; base is then kept.
    out: [M, N] in `dtype`, contiguous, to write to instead.
    segments: lora_b is [adapters, N, R]; bias is [adapters + 1, N], its last row for rows without an adapter.
    """
    m, r = h.shape
    (n, _), stride = _last(lora_b, segments)
    drops = dropout.active
    in_place = base is not None and base.dtype is dtype and rescale is None
    if out is None:
        out = base if base is not None and in_place else torch.empty((m, n), dtype=dtype, device=h.device)
    if bias is not None:
        bias = bias.contiguous()
    strides = lora_b.stride()[-2:]
    rows, tables, counts = _by_row(segments, stride, column, h)
    tile_rows, tile_columns = _expand_tile(n)
    row_tiles, column_tiles, steps = triton.cdiv(m, tile_rows), triton.cdiv(n, tile_columns), 1
    if segments is None:  # as many tiles below one another as leave enough programs
        steps = max(
            1, min(MAX_EXPAND_STEPS, row_tiles * column_tiles // (2 * lora_plan.programs_wanted(h.device.index)))
        )
    grid = triton.cdiv(row_tiles, steps) if segments is None else row_tiles + segments.number, column_tiles
    dtypes = dtype, lora_b.dtype, None if bias is None else bias.dtype, None if base is None else base.dtype
    how, nothing = mode(dtype, lora_b.dtype), h
    _expand_launcher(
        (r, how, bias is not None, base is not None, rescale is not None, drops, rows, steps, m, n, dtypes, strides,
         stride, grid),
        grid,
        (h, lora_b, nothing if bias is None else bias, nothing if base is None else base,
         nothing if rescale is None else rescale, dropout.seed if drops else h, out, *tables),
        (m, n, r, scaling * dropout.keep_scale, dropout.threshold, *strides, *counts),
    )  # fmt: skip
    return out


def reads_twice(n: int, r: int, element_size: int, tiles: int) -> bool:
    """Whether writing and reading a partial g for every tile of N costs more than a second read of dy."""
    return 2 * 4 * r * tiles > element_size * n


def dy_pass(
    dy: Tensor,
    lora_b: Tensor,
    h: Tensor,
    scaling: float,
    need_g: bool,
    need_db: bool,
    cut: Tile | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """g = scaling · dy B and dB = scaling · dyᵀ h, in one read of dy, or in two where that moves fewer bytes.

    dy: [M, N], any strides; lora_b: [N, R]; h: [M, R], fp32 (any tensor where dB is not needed).
    segments: lora_b is [adapters, N, R]; the facts' scaling multiplies only g, since h has it already.
    Returns ([M, R], [N, R] or [adapters, N, R]) in fp32, None for what is not needed.
    """
    g, db = dy_parts(dy, lora_b, h, scaling, need_g, need_db, cut, segments)
    return g, None if db is None else _summed(db, segments)


def dy_parts(
    dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float, need_g: bool, need_db: bool, cut: Tile | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As `dy_pass`, with the parts of dB that are still to be added up."""
    m, n = dy.shape
    (_, r), stride = _last(lora_b, segments)
    how = mode(dy.dtype, lora_b.dtype)
    strides = *dy.stride(), *lora_b.stride()[-2:]
    launch = plan("dy", m, n, r, how, False, dy.device, cut, segments.number if segments else 0, max(strides[:2]))
    if need_g and reads_twice(n, r, dy.element_size(), launch.tiles):
        g = shrink(dy, lora_b.mT, _NO_DROPOUT, scaling, segments=segments, column=SCALING)
        return g, x_parts(dy, h, _NO_DROPOUT, lora_b.dtype, scaling, True, None, segments, -1) if need_db else None
    g = _partial(launch.tiles if need_g else 0, m, r, dy)
    db = _partial(launch.splits if need_db else 0, n, r, dy)
    rows, tables, counts = _by_row(segments, stride, SCALING, dy)
    _dy_launcher(
        (launch, how, need_g, need_db, rows, dy.dtype, lora_b.dtype, h.dtype, strides, stride),
        launch.grid,
        (dy, lora_b, h, g, db, *tables),
        (m, n, r, launch.per_split, scaling, *strides, *counts),
    )
    return total(g) if need_g else None, db if need_db else None


def x_pass(
    x: Tensor,
    g: Tensor,
    dropout: Dropout,
    adapter_dtype: torch.dtype,
    scaling: float = 1.0,
    transposed: bool = False,
    cut: Tile | None = None,
    segments: Segments | None = None,
    column: int = KEEP,
) -> Tensor:
    """dA = scaling · gᵀ (mask ∘ x), in one read of x. x: [M, K], any strides; g: [M, R], fp32.

    adapter_dtype: the dtype of A, which sets the precision: with 16-bit adapters g is rounded to x's dtype.
    Returns [R, K], or [K, R] where `transposed`, fp32, contiguous; with segments, one for each adapter.
    """
    return _summed(x_parts(x, g, dropout, adapter_dtype, scaling, transposed, cut, segments, column), segments)


def x_parts(
    x: Tensor, g: Tensor, dropout: Dropout, adapter_dtype: torch.dtype, scaling: float = 1.0, transposed: bool = False,
    cut: Tile | None = None, segments: Segments | None = None, column: int = KEEP,
) -> Tensor:  # fmt: skip
    """As `x_pass`, in parts that are still to be added up."""
    m, k = x.shape
    r = g.shape[1]
    drops, how = dropout.active, mode(x.dtype, adapter_dtype)
    strides = *x.stride(), *((1, r) if transposed else (k, 1))
    launch = plan("x", m, k, r, how, drops, x.device, cut, segments.number if segments else 0, max(strides[:2]))
    da = _partial(launch.splits, *((k, r) if transposed else (r, k)), x)
    rows, tables, counts = _by_row(segments, 0, column, x)
    _x_launcher(
        (launch, how, drops, rows, x.dtype, g.dtype, strides),
        launch.grid,
        (x, g, dropout.seed if drops else x, da, *tables),
        (m, k, r, launch.per_split, dropout.threshold, scaling * dropout.keep_scale, *strides, *counts),
    )
    return da


def gradients(
    dy: Tensor, x: Tensor | None, h: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: Dropout,
    need_g: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """g = scaling · dy B [M, R] in fp32, dA = gᵀ (mask ∘ x) and dB = scaling · dyᵀ h in the adapters' dtypes.

    dy: [M, N]; x: [M, K], or None where dA is not needed; h: [M, R], or None where dB is not needed; lora_a: [R, K];
    lora_b: [N, R], in one dtype. None for what is not needed. At most four launches.
    """
    need_g = need_g or x is not None
    if not (need_g or h is not None):
        return None, None, None
    g, db = dy_parts(dy, lora_b, dy if h is None else h, scaling, need_g, h is not None)
    if x is None:
        return g, None, None if db is None else total(db, lora_b.dtype)
    assert g is not None
    da = x_parts(x, g, dropout, lora_a.dtype)
    if db is None:
        return g, total(da, lora_a.dtype), None
    return g, *totals(da, lora_a.dtype, db, lora_b.dtype)
