"""The low-rank products around a linear layer, each reading its activations once.

    shrink:  h  = (mask ∘ x) Aᵀ                    [M, K] -> [M, R]
    expand:  o  = mask ∘ (scaling · h Bᵀ) + bias   [M, R] -> [M, N]
    dy pass: g  = scaling · dy B  and  dB = scaling · dyᵀ h     in one read of dy
    x pass:  dA = gᵀ (mask ∘ x)                                 in one read of x

Bytes, bf16: shrink 2MK; dy pass 2MN and partial sums of g, half as much again at R = 16; x pass 2MK;
expand 2MN written. Where the partial sums would cost more than a second read of dy, it is read twice.
2·M·K·R FLOPs each (twice for the dy pass): bound by memory up to R of about 64. h and g: fp32, [M, R].

Reductions over M, N or K that span programs go through fp32 partial sums and a second, ordered
addition: no atomics, so the same input gives the same bits.

The dropout mask is never stored. Eight neighbours of a row share one Philox-4x32-7 call, 16 bits
each, keyed by a seed tensor and counted by position, so forward, backward and a checkpoint's
recomputation derive the same mask; see `fastlora.reference.dropout_mask`.

Products, by `MODE`, so that the adapters' precision is kept at the cost of 16-bit tensor cores:
    narrow  16-bit activations and adapters: one 16-bit product;
    split   bf16 activations, fp32 adapters: v = v1 + v2 + v3, each exact in bf16, three bf16 products,
            exact but for the fp32 accumulation (expand, which rounds to bf16 anyway, keeps two parts);
    tf32x3  fp16 activations, fp32 adapters: three tf32 products;
    ieee    fp32 activations.
A rank above 64 is cut into parts of 64, each of which reads the activations anew.
Source: arXiv:2106.09685, section 4.1; Salmon et al., SC 2011 (Philox).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastlora.kernels import choice
from fastlora.kernels.choice import Tile
from torch import Tensor

PHILOX_ROUNDS = tl.constexpr(7)
PROGRAMS_PER_SM = 2
STAGES = 3
EXPAND_ROWS, EXPAND_COLUMNS, EXPAND_WARPS = 64, 128, 8
MAX_BLOCK_R = 64
MAX_EXPAND_BLOCK_R = 32


@triton.jit
def _keep(seed_ptr, offs_m, k_start, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of the tile [BLOCK_M, BLOCK_K] survive dropout; k_start is a multiple of eight."""
    seed = tl.load(seed_ptr)
    group = k_start // 8 + tl.arange(0, BLOCK_K // 8)
    counter = offs_m[:, None] * ((K + 7) // 8) + group[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter.to(tl.int32), n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_K))
    return halves.to(tl.int32) >= threshold


@triton.jit
def _top(v):
    """The upper half of fp32's bits: a value that bf16 holds exactly."""
    return (v.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _dot_bf16(left, right, acc, INTERPRETED: tl.constexpr):
    """acc + left right for values exact in bf16. The interpreter multiplies bf16 wrongly and gets fp32."""
    if INTERPRETED:
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        acc = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), acc)
    return acc


@triton.jit
def _dot(left, v, acc, MODE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + left v, where `left` is an activation and `v` an adapter, h or g."""
    if MODE == "narrow":
        acc = tl.dot(left, v.to(left.dtype), acc)
    elif MODE == "split":
        v1 = _top(v)
        v2 = _top(v - v1)
        v3 = v - v1 - v2
        acc = _dot_bf16(left, v1, acc, INTERPRETED)
        acc = _dot_bf16(left, v2, acc, INTERPRETED)
        acc = _dot_bf16(left, v3, acc, INTERPRETED)
    else:
        acc = tl.dot(left.to(tl.float32), v.to(tl.float32), acc, input_precision=MODE)
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, seed_ptr, h_ptr,
    M, K, R, k_per_split, threshold, keep_scale,
    stride_xm, stride_xk, stride_ar, stride_ak,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    k_end = tl.minimum(split * k_per_split + k_per_split, K)
    for k_start in range(split * k_per_split, k_end, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        x_mask = (offs_m[:, None] < M) & (offs_k[None, :] < k_end)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)
        a_mask = (offs_k[:, None] < k_end) & (offs_r[None, :] < R)
        a = tl.load(a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar, mask=a_mask, other=0.0)
        if DROPOUT:
            x = tl.where(_keep(seed_ptr, offs_m, k_start, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = _dot(x, a, acc, MODE, INTERPRETED)
    h_ptrs = h_ptr + (split * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(h_ptrs, acc * keep_scale, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R))


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_expand_kernel(
    h_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr,
    M, N, R, scaling, threshold,
    stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_start = tl.program_id(1).to(tl.int64) * BLOCK_N
    offs_n = n_start + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r_start in range(0, R, BLOCK_R):
        offs_r = r_start + tl.arange(0, BLOCK_R)
        h_mask = (offs_m[:, None] < M) & (offs_r[None, :] < R)
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=h_mask, other=0.0)
        b_mask = (offs_r[:, None] < R) & (offs_n[None, :] < N)
        b = tl.load(b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn, mask=b_mask, other=0.0)
        if MODE == "narrow":
            acc = tl.dot(h.to(b.dtype), b, acc)
        elif MODE == "split":
            h1, b1 = _top(h), _top(b)
            acc = _dot_bf16(h1, b1, acc, INTERPRETED)
            acc = _dot_bf16(_top(h - h1), b1, acc, INTERPRETED)
            acc = _dot_bf16(h1, _top(b - b1), acc, INTERPRETED)
        else:
            acc = tl.dot(h, b.to(tl.float32), acc, input_precision=MODE)
    acc *= scaling
    if DROPOUT:
        acc = tl.where(_keep(seed_ptr, offs_m, n_start, N, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    out_mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["M"])
def _lora_dy_kernel(
    dy_ptr, b_ptr, h_ptr, g_ptr, db_ptr,
    M, N, R, m_per_split, scaling,
    stride_dm, stride_dn, stride_bn, stride_br,
    NEED_G: tl.constexpr, NEED_DB: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile_n, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = offs_r[None, :] < R
    b = tl.load(
        b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
        mask=(offs_n[:, None] < N) & in_r,
        other=0.0,
    )
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for m_start in range(split * m_per_split, tl.minimum(split * m_per_split + m_per_split, M), BLOCK_M):
        offs_m = m_start + tl.arange(0, BLOCK_M)
        dy_mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn, mask=dy_mask, other=0.0)
        hg_mask = (offs_m[:, None] < M) & in_r
        if NEED_G:
            g = _dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), MODE, INTERPRETED)
            tl.store(g_ptr + (tile_n * M + offs_m[:, None]) * R + offs_r[None, :], g * scaling, mask=hg_mask)
        if NEED_DB:
            h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=hg_mask, other=0.0)
            db = _dot(tl.trans(dy), h, db, MODE, INTERPRETED)
    if NEED_DB:
        db_ptrs = db_ptr + (split * N + offs_n[:, None]) * R + offs_r[None, :]
        tl.store(db_ptrs, db * scaling, mask=(offs_n[:, None] < N) & in_r)


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_x_kernel(
    x_ptr, g_ptr, seed_ptr, da_ptr,
    M, K, R, m_per_split, threshold, keep_scale,
    stride_xm, stride_xk, stride_dr, stride_dk,
    DROPOUT: tl.constexpr, MODE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k_start = tl.program_id(0).to(tl.int64) * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    da = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for m_start in range(split * m_per_split, tl.minimum(split * m_per_split + m_per_split, M), BLOCK_M):
        offs_m = m_start + tl.arange(0, BLOCK_M)
        x_mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)
        if DROPOUT:
            x = tl.where(_keep(seed_ptr, offs_m, k_start, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        g_mask = (offs_m[:, None] < M) & (offs_r[None, :] < R)
        g = tl.load(g_ptr + offs_m[:, None] * R + offs_r[None, :], mask=g_mask, other=0.0)
        da = _dot(tl.trans(x), g, da, MODE, INTERPRETED)
    da_ptrs = da_ptr + split * R * K + offs_r[None, :] * stride_dr + offs_k[:, None] * stride_dk
    tl.store(da_ptrs, da * keep_scale, mask=(offs_r[None, :] < R) & (offs_k[:, None] < K))


class Dropout:
    """What the kernels need of dropout: p as a 16-bit threshold and the scale of what is kept.

    Args:
        p: share dropped, 0 <= p < 1. seed: int64, one element, on the device; None where p is 0.
    """

    def __init__(self, p: float = 0.0, seed: Tensor | None = None) -> None:
        self.threshold = round(p * 65536) if seed is not None else 0
        self.keep_scale = 65536 / (65536 - self.threshold)
        self.seed = seed
        self.active = self.threshold > 0


def mode(activation: torch.dtype, adapter: torch.dtype) -> str:
    """How activations and adapters of these dtypes are multiplied; see the head of this file."""
    if activation == torch.float32:
        return "ieee"
    if adapter != torch.float32:
        return "narrow"
    return "split" if activation == torch.bfloat16 else "tf32x3"


def block_r(r: int) -> int:
    """Ranks a program takes: a power of two from 16 to 64."""
    return min(MAX_BLOCK_R, max(16, triton.next_power_of_2(r)))


def tile(r: int, how: str) -> tuple[int, int, int]:
    """(rows, columns, warps) of an activation tile, for a padded rank and a mode."""
    if how in ("ieee", "tf32x3"):
        return 32, 64, 4
    if how == "split" and r > 32:
        return 32, 64, 8
    return (64, 128, 4) if r <= 32 else (64, 64, 8)


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def shrink_tile(r: int, how: str, dropout: bool) -> tuple[int, int, int]:
    """As `tile`, for the shrink, where the mask and the split factor together need registers for half the columns."""
    rows, columns, warps = tile(r, how)
    return rows, columns // 2 if how == "split" and dropout and r <= 32 else columns, warps


def tile_for(op: str, m: int, length: int, r: int, how: str, dropout: bool, device: torch.device) -> Tile:
    """The tile for an activation [m, length]: from the table of choices where it has one, else as above."""
    if found := choice.tile(op, m, length, r, how, dropout, device):
        return found
    return Tile(*(shrink_tile(block_r(r), how, dropout) if op == "shrink" else tile(block_r(r), how)), STAGES)


class _Plan(NamedTuple):
    """A launch: its tile, the grid, and how long a piece of the reduction each program takes."""

    cut: Tile
    tiles: int
    splits: int
    per_split: int
    block_r: int
    r_parts: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.tiles, self.splits, self.r_parts

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_r, "num_warps": self.cut.warps, "num_stages": self.cut.stages}


@functools.lru_cache(maxsize=4096)
def _plan(
    op: str, m: int, length: int, r: int, how: str, dropout: bool, device: torch.device, cut: Tile | None = None
) -> _Plan:
    """How to launch on an activation [m, length]; the splits of its reduction, with the tiles, fill the device.

    The shrink sums over `length`, the other two over m. Remembered, since working it out costs more than a launch.
    """
    cut = cut or tile_for(op, m, length, r, how, dropout, device)
    tiled, summed = ((m, cut.rows), (length, cut.columns)) if op == "shrink" else ((length, cut.columns), (m, cut.rows))
    tiles, (total, block) = triton.cdiv(*tiled), summed
    splits = max(1, min(triton.cdiv(total, block), _programs_wanted(device.index) // tiles))
    per_split = triton.cdiv(triton.cdiv(total, splits), block) * block
    return _Plan(cut, tiles, triton.cdiv(total, per_split), per_split, block_r(r), triton.cdiv(r, block_r(r)))


@functools.cache
def _programs_wanted(device_index: int | None) -> int:
    """Programs that fill the device."""
    if device_index is None:
        return 8  # the interpreter
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device_index).multi_processor_count


def _total(partials: Tensor) -> Tensor:
    """Sum over the first axis, in order."""
    return partials[0] if partials.shape[0] == 1 else partials.sum(0)


def shrink(x: Tensor, lora_a: Tensor, dropout: Dropout, scaling: float = 1.0, cut: Tile | None = None) -> Tensor:
    """h = scaling · (mask ∘ x) Aᵀ. x: [M, K], any strides; lora_a: [R, K]. Returns [M, R], fp32.

    cut: a tile to use in place of the table's or the built-in one, here and below.
    """
    m, k = x.shape
    r = lora_a.shape[0]
    how = mode(x.dtype, lora_a.dtype)
    plan = _plan("shrink", m, k, r, how, dropout.active, x.device, cut)
    h = torch.empty(plan.splits, m, r, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _lora_shrink_kernel[plan.grid](
            x, lora_a, dropout.seed if dropout.active else x, h,
            m, k, r, plan.per_split, dropout.threshold, scaling * dropout.keep_scale,
            *x.stride(), *lora_a.stride(),
            DROPOUT=dropout.active, MODE=how, INTERPRETED=_interpreted(),
            BLOCK_M=plan.cut.rows, BLOCK_K=plan.cut.columns, **plan.options,
        )  # fmt: skip
    return _total(h)


def expand(
    h: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype, dropout: Dropout, bias: Tensor | None = None
) -> Tensor:
    """mask ∘ (scaling · h Bᵀ) + bias. h: [M, R], fp32; lora_b: [N, R], any strides. Returns [M, N] in `dtype`."""
    m, r = h.shape
    n = lora_b.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=h.device)
    with torch.cuda.device_of(h):
        _lora_expand_kernel[(triton.cdiv(m, EXPAND_ROWS), triton.cdiv(n, EXPAND_COLUMNS))](
            h, lora_b, bias.contiguous() if bias is not None else h, dropout.seed if dropout.active else h, out,
            m, n, r, scaling * dropout.keep_scale, dropout.threshold,
            *lora_b.stride(),
            HAS_BIAS=bias is not None, DROPOUT=dropout.active,
            MODE=mode(dtype, lora_b.dtype), INTERPRETED=_interpreted(), num_warps=EXPAND_WARPS,
            BLOCK_M=EXPAND_ROWS, BLOCK_N=EXPAND_COLUMNS, BLOCK_R=min(MAX_EXPAND_BLOCK_R, block_r(r)),
        )  # fmt: skip
    return out


def reads_twice(n: int, r: int, element_size: int, tiles: int) -> bool:
    """Whether writing and reading a partial g for every tile of N costs more than a second read of dy."""
    return 2 * 4 * r * tiles > element_size * n


def dy_pass(
    dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float, need_g: bool, need_db: bool, cut: Tile | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """g = scaling · dy B and dB = scaling · dyᵀ h, in one read of dy, or in two where that moves fewer bytes.

    dy: [M, N], any strides; lora_b: [N, R]; h: [M, R], fp32 (any tensor where dB is not needed).
    Returns ([M, R], [N, R]) in fp32, None for what is not needed.
    """
    m, n = dy.shape
    r = lora_b.shape[1]
    how = mode(dy.dtype, lora_b.dtype)
    plan = _plan("dy", m, n, r, how, False, dy.device, cut)
    if need_g and reads_twice(n, r, dy.element_size(), plan.tiles):
        g = shrink(dy, lora_b.t(), Dropout(), scaling)
        return g, x_pass(dy, h, Dropout(), lora_b.dtype, scaling, transposed=True) if need_db else None
    g = torch.empty(plan.tiles if need_g else 0, m, r, dtype=torch.float32, device=dy.device)
    db = torch.empty(plan.splits if need_db else 0, n, r, dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        _lora_dy_kernel[plan.grid](
            dy, lora_b, h, g, db,
            m, n, r, plan.per_split, scaling,
            *dy.stride(), *lora_b.stride(),
            NEED_G=need_g, NEED_DB=need_db, MODE=how, INTERPRETED=_interpreted(),
            BLOCK_M=plan.cut.rows, BLOCK_N=plan.cut.columns, **plan.options,
        )  # fmt: skip
    return _total(g) if need_g else None, _total(db) if need_db else None


def x_pass(
    x: Tensor,
    g: Tensor,
    dropout: Dropout,
    adapter_dtype: torch.dtype,
    scaling: float = 1.0,
    transposed: bool = False,
    cut: Tile | None = None,
) -> Tensor:
    """dA = scaling · gᵀ (mask ∘ x), in one read of x. x: [M, K], any strides; g: [M, R], fp32.

    adapter_dtype: that of A, which sets the precision: with 16-bit adapters g is rounded to x's dtype.
    Returns [R, K], or [K, R] where `transposed`, fp32, contiguous.
    """
    m, k = x.shape
    r = g.shape[1]
    how = mode(x.dtype, adapter_dtype)
    plan = _plan("x", m, k, r, how, dropout.active, x.device, cut)
    da = torch.empty(plan.splits, *((k, r) if transposed else (r, k)), dtype=torch.float32, device=x.device)
    stride_dr, stride_dk = (1, r) if transposed else (k, 1)
    with torch.cuda.device_of(x):
        _lora_x_kernel[plan.grid](
            x, g, dropout.seed if dropout.active else x, da,
            m, k, r, plan.per_split, dropout.threshold, scaling * dropout.keep_scale,
            *x.stride(), stride_dr, stride_dk,
            DROPOUT=dropout.active, MODE=how, INTERPRETED=_interpreted(),
            BLOCK_M=plan.cut.rows, BLOCK_K=plan.cut.columns, **plan.options,
        )  # fmt: skip
    return _total(da)
