"""The fused dequantize-GEMM: the NF4 weight is expanded tile by tile inside the loop and never written out.

    linear     y  = x Wᵀ + scaling · h Bᵀ + bias      x [M, K], h [M, R] -> [M, N]
    linear_t   dx = dy W + mask ∘ (g A)               dy [M, N], g [M, R] -> [M, K]

    W[n, k] = code[q[n, k]] * scale[n, k // blocksize], rounded once from fp32 to the activation's 16 bits:
    the values that `kernels.nf4` writes.

Bytes: 0.516 a weight for each tile of tokens, the activation once for each tile of outputs, the output once.
Dequantizing through memory moves 2.5 bytes a weight before the product reads two more.

A step of the loop takes int32 words of eight codes (bitsandbytes' layout as it is), looks up their levels,
scales and rounds them, and puts the 16-bit tile into shared memory for the tensor cores: 5 to 8
machine instructions a weight with everything in the loop (`python -m bench static`). Both directions read the
same tile; dx sums over its rows. The lookup is PTX's `shfl`: lane i of each half warp holds level i. Words,
activation and scales are loaded stages ahead.

Nothing is expanded twice. `tl.join` puts the eight columns of a word together. Triton cannot propagate the operand
layouts of mma.sync, in which warps share weights, back through it, so the product reads the tile from shared memory.

LoRA is one more step of the same sum, taken before the loop: h and B in place of x and W, sixteen ranks at a time.
h and fp32 adapters go as two bf16 parts each, side by side in one product, which keeps 16 bits of both; with 16-bit
adapters h is rounded to their dtype. The mask of dropout, drawn again from its seed, applies to that step only.

Tiles of fewer than 64 tokens go through mma.sync everywhere; from 64 on, wgmma (sm_90) and tcgen05 (sm_100) take
both operands from shared memory. Where the output tiles do not fill the chip, the sum is split; a second launch then
adds the fp32 partial sums in order: no atomics, the same bits each time.
"""

import functools

import torch
import triton
import triton.language as tl
from fastlora.kernels.fused_config import Config as Config
from fastlora.kernels.fused_config import accumulators, default_config, split_sum, uses_mma_sync
from fastlora.kernels.fused_config import candidates as candidates
from fastlora.kernels.fused_tile import block_indices, expand_words, lane_levels, load_words, tile_corner
from fastlora.kernels.lora_plan import Dropout, interpreted
from fastlora.kernels.lora_tile import keep_mask, top
from fastlora.kernels.nf4_tile import operands, words_of
from fastlora.kernels.operands import Packed
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

NESTED_BLOCKSIZE = tl.constexpr(256)
BLOCK_R = tl.constexpr(16)  # ranks of a step
MAX_R = 256
SUM_BLOCK = 1024
NO_DROPOUT = Dropout()


@triton.jit
def _activation(
    x_ptr, m_start, start, M, length, stride, TMA: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_M, BLOCK_K] of an activation [M, length]: zeros beyond `length`, arbitrary values beyond M."""
    if TMA:
        x = x_ptr.load([m_start, start])
    else:
        rows = tl.minimum(m_start + tl.arange(0, BLOCK_M).to(tl.int64), M - 1)
        columns = start + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows[:, None] * stride + columns[None, :]
        if EVEN:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=columns[None, :] < length, other=0.0)
    return x


@triton.jit
def _side_by_side(v0, v1, v2, v3, INTERPRETED: tl.constexpr):
    """Four [ROWS, BLOCK_R] that bf16 holds exactly, as bf16 [ROWS, 4 BLOCK_R]. The interpreter multiplies bf16 wrongly
    and keeps fp32. All go into one product, since Triton would give several in a row another layout than the loop's."""
    joined = tl.join(tl.join(v0, v1), tl.join(v2, v3))
    if not INTERPRETED:
        joined = joined.to(tl.bfloat16)
    joined = tl.reshape(joined, (v0.shape[0], 4 * v0.shape[1]))
    if not INTERPRETED:
        # A fence, as in `expand_words`: wgmma's shared memory must not be given the shape before the reshape. Triton
        # has no layout for that shape where the values are apart in memory.
        joined = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [joined], dtype=joined.dtype, is_pure=True, pack=2
        )  # fmt: skip
    return joined


@triton.jit
def offsets(start, end, LOOSE: tl.constexpr, SIZE: tl.constexpr):
    """(first, offsets from there, end from there) of a tile's rows or columns. LOOSE: sizes are no multiples of 16.

    Each value then takes an address of its own, and there are registers for those only if offsets within a tile are
    int32. Otherwise the first is 0 and all offsets are int64.
    """
    if LOOSE:
        first, offs, end = start.to(tl.int64), tl.arange(0, SIZE), end - start
    else:
        first, offs = 0, start + tl.arange(0, SIZE).to(tl.int64)
    return first, offs, end


@triton.jit
def _update(
    acc, h_ptr, b_ptr, m_start, n_start, M, N, R, r_end, stride_bn, stride_br,
    FP32_ADAPTERS: tl.constexpr, INTERPRETED: tl.constexpr, LOOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc + h Bᵀ over the ranks below r_end, for h [M, R] in fp32 and B [N, R]."""
    m_first, offs_m, M = offsets(m_start, M, LOOSE, BLOCK_M)
    n_first, offs_n, N = offsets(n_start, N, LOOSE, BLOCK_N)
    h_ptr += m_first * R
    b_ptr += n_first * stride_bn
    for r_start in tl.range(0, r_end, BLOCK_R, num_stages=2 if FP32_ADAPTERS else 1):
        offs_r = r_start + tl.arange(0, BLOCK_R)
        in_r = offs_r[None, :] < R
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=(offs_m[:, None] < M) & in_r, other=0.0)
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=(offs_n[:, None] < N) & in_r, other=0.0)
        if FP32_ADAPTERS:
            h1, b1 = top(h), top(b)
            h2, b2 = top(h - h1), top(b - b1)
            h, b = _side_by_side(h1, h2, h1, h2, INTERPRETED), _side_by_side(b1, b1, b2, b2, INTERPRETED)
        acc = tl.dot(h.to(b.dtype), tl.trans(b), acc)  # [BLOCK_M, BLOCK_R] @ [BLOCK_R, BLOCK_N]
    return acc


@triton.jit(do_not_specialize=["M"])
def _nf4_fused_kernel(
    x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr,
    h_ptr, b_ptr, seed_ptr, bias_ptr, out_ptr,
    M, N, K, R, row_words, per_split, scaling, threshold,
    stride_xm, stride_bn, stride_br,
    TRANSPOSED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    TMA: tl.constexpr, MMA_SYNC: tl.constexpr, EVEN_SUM: tl.constexpr, EVEN_OUT: tl.constexpr,
    LORA: tl.constexpr, FP32_ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr, LOOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x Wᵀ [M, N] + ..., or where TRANSPOSED of x W [M, K] + ...; W is [N, K]."""
    m_start, n_start, split = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    ROWS: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    COLUMNS: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    EVEN_ROWS: tl.constexpr = EVEN_SUM if TRANSPOSED else EVEN_OUT
    EVEN_COLUMNS: tl.constexpr = EVEN_OUT if TRANSPOSED else EVEN_SUM
    if TRANSPOSED:
        columns, length = K, N
    else:
        columns, length = N, K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if LORA:
        r_end = R
        if SPLIT:
            r_end = tl.where(split == 0, R, 0)
        acc = _update(
            acc, h_ptr, b_ptr, m_start, n_start, M, columns, R, r_end, stride_bn, stride_br,
            FP32_ADAPTERS, INTERPRETED, LOOSE, BLOCK_M, BLOCK_N,
        ) * scaling  # fmt: skip
        if DROPOUT:
            offs_m = m_start + tl.arange(0, BLOCK_M).to(tl.int64)
            keep = keep_mask(seed_ptr, offs_m, n_start, columns, threshold, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc, 0.0)
    table = lane_levels(code_ptr, LOOKUP)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    words_ptr = codes_ptr
    if not TMA:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    begin, end = split * per_split, tl.minimum(split * per_split + per_split, length)
    last = begin + (end - begin - 1) // BLOCK_K * BLOCK_K
    corner = tile_corner(n_start, begin, TRANSPOSED)
    block = block_indices(corner, N, K, BLOCKSIZE, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
    if NESTED:
        level = tl.load(absmax_ptr + block)
    for start in range(begin, end, BLOCK_K):
        x = _activation(x_ptr, m_start, start, M, length, stride_xm, TMA, EVEN_SUM, BLOCK_M, BLOCK_K)
        corner = tile_corner(n_start, start, TRANSPOSED)
        words = load_words(words_ptr, corner, N, row_words, TMA, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
        block = block_indices(corner, N, K, BLOCKSIZE, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
        if NESTED:
            scale = tl.load(code2_ptr + level.to(tl.int32)) * tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE) + offset
            corner = tile_corner(n_start, tl.minimum(start + BLOCK_K, last), TRANSPOSED)
            block = block_indices(corner, N, K, BLOCKSIZE, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
            level = tl.load(absmax_ptr + block)  # of the next step: single bytes cannot be copied asynchronously
        else:
            scale = tl.load(absmax_ptr + block)
        w = expand_words(table, words, scale, LOOKUP, x.dtype, MMA_SYNC, ROWS, COLUMNS)
        if TRANSPOSED:
            acc = tl.dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
        else:
            acc = tl.dot(x, tl.trans(w), acc)  # w is [BLOCK_N, BLOCK_K]
    m_first, offs_m, m_end = offsets(m_start, M, LOOSE, BLOCK_M)
    n_first, offs_n, n_end = offsets(n_start, columns, LOOSE, BLOCK_N)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + n_first + offs_n
        acc += tl.load(bias_ptrs, mask=offs_n < n_end, other=0.0).to(tl.float32)[None, :]
    if LOOSE:
        out_ptr += (split.to(tl.int64) * M + m_first) * columns + n_first
        out_ptrs = out_ptr + offs_m[:, None] * columns + offs_n[None, :]
    else:
        out_ptrs = out_ptr + (split.to(tl.int64) * M + offs_m[:, None]) * columns + offs_n[None, :]
    out_mask = (offs_m[:, None] < m_end) & (offs_n[None, :] < n_end)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _sum_splits_kernel(partial_ptr, bias_ptr, out_ptr, size, N, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    partial_ptrs = partial_ptr + offs
    for _ in tl.range(0, splits, loop_unroll_factor=4):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += size
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@functools.cache
def _device(index: int | None) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors) of a CUDA device; small numbers for the interpreter."""
    if index is None:
        return (8, 0), 4
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count


def supports(x_dtype: torch.dtype, k: int, n: int, blocksize: int, r: int) -> str:
    """Why these kernels cannot multiply by a weight [n, k] of this blocksize with a LoRA of rank r (0: none); or ""."""
    if x_dtype not in (torch.bfloat16, torch.float16):
        return f"activations must be bf16 or fp16, not {x_dtype}"
    if k % blocksize:
        return f"a block must not cross rows: K = {k} is not a multiple of the blocksize {blocksize}"
    if r > MAX_R:
        return f"rank {r} is above {MAX_R}"
    return ""


def linear(
    x: Tensor, weight: Packed, h: Tensor | None = None, lora_b: Tensor | None = None,
    scaling: float = 0.0, bias: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + scaling · h Bᵀ + bias, in one launch, or two where the sum is split.

    Args:
        x: [M, K], bf16 or fp16; copied where its columns are not adjacent.
        weight: [N, K]; its codes are copied where their address is not a multiple of four.
        h: [M, R], fp32. lora_b: [N, R], any strides; if it has 16 bits, h is rounded to its dtype. bias: [N].
    Returns:
        [M, N], dtype of x, accumulated in fp32.
    Raises:
        ValueError: what `supports` names, or the sizes do not fit together.
    """
    return _multiply(x, weight, False, h, lora_b, scaling, bias, NO_DROPOUT, config)


def linear_t(
    dy: Tensor, weight: Packed, g: Tensor | None = None, lora_a: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """dx = dy W + mask ∘ (g A), in one launch, or two where the sum is split.

    Args:
        dy: [M, N], bf16 or fp16; copied where its columns are not adjacent. weight: as in `linear`.
        g: [M, R], fp32, scaling included. lora_a: [R, K], any strides.
    Returns:
        [M, K], dtype of dy, accumulated in fp32.
    Raises:
        ValueError: as `linear`.
    """
    lora_at = None if lora_a is None else lora_a.t()
    return _multiply(dy, weight, True, g, lora_at, 1.0, None, dropout, config)


def _check_fused(
    x: Tensor, weight: Packed, transposed: bool, h: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> None:
    """Raise ValueError where the operands do not fit together."""
    n, k = weight.shape
    length, columns = (n, k) if transposed else (k, n)
    if why := supports(x.dtype, k, n, weight.blocksize, 0 if b is None else b.shape[1]):
        raise ValueError(f"{why}; expand the weight (kernels.nf4.dequantize) and multiply by that")
    if x.dim() != 2 or x.shape[1] != length:
        raise ValueError(f"the activation is {list(x.shape)}, expected [M, {length}] for a weight of {[n, k]}")
    if (h is None) != (b is None):
        raise ValueError("h (or g) and its adapter go together: give both or neither")
    if h is not None and b is not None and (h.shape, b.shape[0]) != ((x.shape[0], b.shape[1]), columns):
        raise ValueError(f"{list(h.shape)} and an adapter for {list(b.shape)} do not give [{x.shape[0]}, {columns}]")
    if h is not None and h.dtype != torch.float32:
        raise ValueError(f"h (or g) must be fp32, as kernels.lora gives it; got {h.dtype}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{columns}]")
    if weight.device != x.device:
        raise ValueError(f"the weight is on {weight.device}, expected {x.device}")


def _multiply(
    x: Tensor, weight: Packed, transposed: bool, h: Tensor | None, b: Tensor | None, scaling: float,
    bias: Tensor | None, dropout: Dropout, config: Config | None,
) -> Tensor:  # fmt: skip
    """x Vᵀ + mask ∘ (scaling · h Bᵀ) + bias, [M, columns], where V [columns, length] is W or, where transposed, Wᵀ."""
    n, k = weight.shape
    _check_fused(x, weight, transposed, h, b, bias)
    (m, length), columns = x.shape, k if transposed else n
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = words_of(weight)
    capability, processors = _device(x.device.index)
    cut = config or default_config("linear_t" if transposed else "linear", m, n, k, capability)
    tiles = triton.cdiv(m, cut.block_m), triton.cdiv(columns, cut.block_n)
    steps = triton.cdiv(length, cut.block_k)
    splits = min(steps, cut.splits or split_sum(tiles[0] * tiles[1], steps, cut, processors))
    per_split = triton.cdiv(steps, splits) * cut.block_k
    splits = triton.cdiv(length, per_split)
    out = torch.empty(m, columns, dtype=x.dtype, device=x.device)
    sums = out if splits == 1 else torch.empty(splits, m, columns, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    lora, has_bias = b is not None and b.shape[1] > 0, bias is not None
    masked = lora and dropout.active
    tma = cut.tma and _has_tensor_maps(x, codes, capability)
    rows_of_w, columns_of_w = (cut.block_k, cut.block_n) if transposed else (cut.block_n, cut.block_k)
    h, b = (h.contiguous(), b) if h is not None and b is not None else (x, x)
    bias = bias.contiguous() if bias is not None else x
    with torch.cuda.device_of(x):
        _nf4_fused_kernel[(tiles[0], tiles[1], splits)](
            _tensor_map(x, cut.block_m, cut.block_k) if tma else x,
            _tensor_map(codes.view(n, k // 2).view(torch.int32), rows_of_w, columns_of_w // 8) if tma else codes,
            *operands(weight)[1:], h, b, dropout.seed if masked else x, bias, sums,
            m, n, k, b.shape[1], k // 8, per_split, scaling * dropout.keep_scale, dropout.threshold,
            x.stride(0), *b.stride(),
            TRANSPOSED=transposed, BLOCKSIZE=weight.blocksize, NESTED=weight.nested,
            LOOKUP="gather" if interpreted() else "shfl",
            TMA=tma, MMA_SYNC=uses_mma_sync(capability, cut.block_m),
            EVEN_SUM=length % cut.block_k == 0, EVEN_OUT=columns % cut.block_n == 0,
            LORA=lora, FP32_ADAPTERS=b.dtype == torch.float32, DROPOUT=masked, HAS_BIAS=has_bias and splits == 1,
            SPLIT=splits > 1, INTERPRETED=interpreted(), LOOSE=(columns | length | b.shape[1]) % 16 != 0,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
            num_warps=8 if accumulators(cut) > 64 and (masked or not tma) else cut.warps, num_stages=cut.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
        if splits > 1:
            _sum_splits_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
                sums, bias, out, out.numel(), columns, splits, HAS_BIAS=has_bias, BLOCK=SUM_BLOCK
            )
    return out


def _has_tensor_maps(x: Tensor, codes: Tensor, capability: tuple[int, int]) -> bool:
    """Whether the device has tensor maps and they can describe these operands."""
    rows_aligned = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    pointers_aligned = x.data_ptr() % 16 == 0 and codes.data_ptr() % 16 == 0
    return (capability[0] >= 9 or interpreted()) and rows_aligned and pointers_aligned


def _tensor_map(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
