"""Products of rows with the weights of their own experts: one launch for a whole stack, and no host sync.

    grouped_linear     y[s]  = x[s] W[e]ᵀ + scaling · h[s] B[e]ᵀ + bias[e]     x [S, K], h [S, R] -> [S, N]
    grouped_linear_t   dx[s] = dy[s] W[e] + g[s] A[e]                          dy [S, N], g [S, R] -> [S, K]

e is the expert of row s. Rows are sorted by expert; on the device `kernels.segments` say where each one's rows end. The
host knows only S and E, so it launches as many row tiles as there can be, (S + (E + 1)(BLOCK_M - 1)) / BLOCK_M, and a
program finds its expert by counting tiles. Surplus programs exit at once. Rows past the last expert belong to a padding
expert that writes zeros.

W is dense in 16 bits, any strides, or a stack in NF4 [E N, K], whose words are expanded inside the loop as in
`kernels.fused`. LoRA is part of the same sum, taken before the loop; h and g come from `kernels.lora`. The result is
rounded once. Neighbouring programs take GROUP_M row tiles by all columns, so that x and W come from the L2 cache.

Bytes: each weight of an expert that has rows once per row tile, x once per column tile (both mostly from the cache), y
once. An expert without rows costs nothing. An NF4 weight costs 0.516 bytes, and 5 to 8 instructions for each row tile.
Above some number of rows an expert, expanding the stack once is cheaper; `fastlora.ops.grouped_cuda` says where.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels import fused
from fastlora.kernels.fused import NESTED_BLOCKSIZE, _activation, _tensor_map, _update, offsets
from fastlora.kernels.fused_config import Config, accumulators, uses_mma_sync
from fastlora.kernels.fused_tile import block_indices, expand_words, lane_levels, load_words, tile_corner
from fastlora.kernels.grouped_config import aligned, default_config, supports
from fastlora.kernels.lora_plan import interpreted
from fastlora.kernels.nf4_tile import operands, words_of
from fastlora.kernels.operands import Packed
from fastlora.kernels.segments import Segments, rows_of_tile
from torch import Tensor

GROUP_M = 8


@triton.jit
def _place(
    ends_ptr, columns, experts, row_tiles,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """(expert, first row, where its expert's rows end, first column) of this program's tile.

    Expert `experts` is the padding expert; programs with greater numbers are surplus, and their rows end at 0.
    """
    pid, column_tiles = tl.program_id(0), tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP_M * column_tiles) * GROUP_M
    size, rest = tl.minimum(row_tiles - first, GROUP_M), pid % (GROUP_M * column_tiles)
    expert, row, row_end = rows_of_tile(ends_ptr, experts + 1, first + rest % size, EXPERTS, BLOCK_M)
    return expert, row.to(tl.int32), row_end.to(tl.int32), rest // size * BLOCK_N


@triton.jit
def _begin(
    h_ptr, b_ptr, expert, row, row_end, n_start, columns, R, scaling, stride_be, stride_bn, stride_br,
    LORA: tl.constexpr, FP32_ADAPTERS: tl.constexpr, INTERPRETED: tl.constexpr, LOOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the sum starts from: scaling · h B[e]ᵀ [BLOCK_M, BLOCK_N], or zeros."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if LORA:
        acc = _update(
            acc, h_ptr, b_ptr + expert.to(tl.int64) * stride_be, row, n_start, row_end, columns, R, R,
            stride_bn, stride_br, FP32_ADAPTERS, INTERPRETED, LOOSE, BLOCK_M, BLOCK_N,
        ) * scaling  # fmt: skip
    return acc


@triton.jit
def _finish(
    acc, bias_ptr, out_ptr, expert, row, row_end, n_start, columns, HAS_BIAS: tl.constexpr, LOOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add bias[e] and store the tile, up to the end of the expert's rows."""
    n_end = columns
    if LOOSE:
        m_first, offs_m, row_end = offsets(row, row_end, LOOSE, BLOCK_M)
        n_first, offs_n, n_end = offsets(n_start, columns, LOOSE, BLOCK_N)
        out_ptr += m_first * columns + n_first
        bias_ptr += n_first
    else:
        offs_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
        offs_n = n_start + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * columns + offs_n
        acc += tl.load(bias_ptrs, mask=offs_n < n_end, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * columns + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m[:, None] < row_end) & (offs_n[None, :] < n_end))


@triton.jit
def _dense_tile(
    w_ptr, expert, n_start, start, columns, length, stride_we, stride_wn, stride_wk,
    TMA: tl.constexpr, ALONG_SUM: tl.constexpr, EVEN_SUM: tl.constexpr, EVEN_OUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_K, BLOCK_N] of an expert's weight, stored along the sum or along the columns; zeros beyond it."""
    if TMA:
        if ALONG_SUM:
            w = tl.trans(w_ptr.load([expert * columns + n_start, start]))
        else:
            w = w_ptr.load([expert * length + start, n_start])
    else:
        offs_n = n_start + tl.arange(0, BLOCK_N).to(tl.int64)
        offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        base = w_ptr + expert.to(tl.int64) * stride_we
        w_ptrs = base + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        if EVEN_SUM and EVEN_OUT:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(offs_k[:, None] < length) & (offs_n[None, :] < columns), other=0.0)
    return w


@triton.jit(do_not_specialize=["row_tiles", "experts"])
def _grouped_dense_kernel(
    x_ptr, w_ptr, ends_ptr, h_ptr, b_ptr, bias_ptr, out_ptr,
    columns, length, R, experts, row_tiles, scaling,
    stride_xs, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_br,
    TMA: tl.constexpr, ALONG_SUM: tl.constexpr, EVEN_SUM: tl.constexpr, EVEN_OUT: tl.constexpr,
    LORA: tl.constexpr, FP32_ADAPTERS: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
    LOOSE: tl.constexpr, EXPERTS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x V[e]ᵀ + ..., V [columns, length] being an expert's weight or its transpose."""
    expert, row, row_end, n_start = _place(ends_ptr, columns, experts, row_tiles, EXPERTS, BLOCK_M, BLOCK_N, GROUP_M)
    if expert >= experts:
        nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        _finish(nothing, bias_ptr, out_ptr, expert, row, row_end, n_start, columns, False, LOOSE, BLOCK_M, BLOCK_N)
        return
    acc = _begin(
        h_ptr, b_ptr, expert, row, row_end, n_start, columns, R, scaling, stride_be, stride_bn, stride_br,
        LORA, FP32_ADAPTERS, INTERPRETED, LOOSE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    for start in range(0, length, BLOCK_K):
        x = _activation(x_ptr, row, start, row_end, length, stride_xs, TMA, EVEN_SUM, BLOCK_M, BLOCK_K)
        w = _dense_tile(
            w_ptr, expert, n_start, start, columns, length, stride_we, stride_wn, stride_wk,
            TMA, ALONG_SUM, EVEN_SUM, EVEN_OUT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
    _finish(acc, bias_ptr, out_ptr, expert, row, row_end, n_start, columns, HAS_BIAS, LOOSE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["row_tiles", "experts"])
def _grouped_nf4_kernel(
    x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr,
    ends_ptr, h_ptr, b_ptr, bias_ptr, out_ptr,
    N, K, R, row_words, experts, row_tiles, scaling,
    stride_xs, stride_be, stride_bn, stride_br,
    TRANSPOSED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    TMA: tl.constexpr, MMA_SYNC: tl.constexpr, EVEN_SUM: tl.constexpr, EVEN_OUT: tl.constexpr,
    LORA: tl.constexpr, FP32_ADAPTERS: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
    LOOSE: tl.constexpr, EXPERTS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x W[e]ᵀ [S, N] + ..., or where TRANSPOSED of x W[e] [S, K] + ...; the stack is [E N, K]."""
    ROWS: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    COLUMNS: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    EVEN_ROWS: tl.constexpr = EVEN_SUM if TRANSPOSED else EVEN_OUT
    EVEN_COLUMNS: tl.constexpr = EVEN_OUT if TRANSPOSED else EVEN_SUM
    if TRANSPOSED:
        columns, length = K, N
    else:
        columns, length = N, K
    expert, row, row_end, n_start = _place(ends_ptr, columns, experts, row_tiles, EXPERTS, BLOCK_M, BLOCK_N, GROUP_M)
    if expert >= experts:
        nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        _finish(nothing, bias_ptr, out_ptr, expert, row, row_end, n_start, columns, False, LOOSE, BLOCK_M, BLOCK_N)
        return
    acc = _begin(
        h_ptr, b_ptr, expert, row, row_end, n_start, columns, R, scaling, stride_be, stride_bn, stride_br,
        LORA, FP32_ADAPTERS, INTERPRETED, LOOSE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    table = lane_levels(code_ptr, LOOKUP)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    words_ptr = codes_ptr
    if not TMA:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    top, last = expert * N, (length - 1) // BLOCK_K * BLOCK_K
    corner = _corner(top, n_start, 0, TRANSPOSED)
    block = block_indices(corner, top + N, K, BLOCKSIZE, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
    if NESTED:
        level = tl.load(absmax_ptr + block)
    for start in range(0, length, BLOCK_K):
        x = _activation(x_ptr, row, start, row_end, length, stride_xs, TMA, EVEN_SUM, BLOCK_M, BLOCK_K)
        corner = _corner(top, n_start, start, TRANSPOSED)
        words = load_words(words_ptr, corner, top + N, row_words, TMA, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
        block = block_indices(corner, top + N, K, BLOCKSIZE, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
        if NESTED:
            scale = tl.load(code2_ptr + level.to(tl.int32)) * tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE) + offset
            corner = _corner(top, n_start, tl.minimum(start + BLOCK_K, last), TRANSPOSED)
            block = block_indices(corner, top + N, K, BLOCKSIZE, EVEN_ROWS, EVEN_COLUMNS, ROWS, COLUMNS)
            level = tl.load(absmax_ptr + block)  # of the next step: single bytes cannot be copied asynchronously
        else:
            scale = tl.load(absmax_ptr + block)
        w = expand_words(table, words, scale, LOOKUP, x.dtype, MMA_SYNC, ROWS, COLUMNS)
        if TRANSPOSED:
            acc = tl.dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
        else:
            acc = tl.dot(x, tl.trans(w), acc)  # w is [BLOCK_N, BLOCK_K]
    _finish(acc, bias_ptr, out_ptr, expert, row, row_end, n_start, columns, HAS_BIAS, LOOSE, BLOCK_M, BLOCK_N)


@triton.jit
def _corner(top, n_start, start, TRANSPOSED: tl.constexpr):
    """As `fused_tile.tile_corner`, for the expert whose weight begins at row `top` of the stack."""
    row_start, column_start = tile_corner(n_start, start, TRANSPOSED)
    return top + row_start, column_start


def grouped_linear(
    x: Tensor, weight: Tensor | Packed, segments: Segments, h: Tensor | None = None, lora_b: Tensor | None = None,
    scaling: float = 0.0, bias: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """y[s] = x[s] W[e]ᵀ + scaling · h[s] B[e]ᵀ + bias[e], in one launch.

    Args:
        x: [S, K], bf16 or fp16, sorted by expert; copied where its columns are not adjacent.
        weight: [E, N, K] in x's dtype, any strides; or packed, [E N, K], whose codes are copied where they are not at a
            4-byte address.
        segments: of E experts, as `kernels.segments.by_offsets` makes them.
        h: [S, R], fp32. lora_b: [E, N, R], any strides; if it has 16 bits, h is rounded to its dtype. bias: [E, N].
    Returns:
        [S, N], dtype of x, accumulated in fp32; zero in rows past the last expert's, which are not read.
    Raises:
        ValueError: what `supports` names, or the sizes do not fit together.
    """
    return _multiply(x, weight, segments, False, h, lora_b, scaling, bias, config)


def grouped_linear_t(
    dy: Tensor, weight: Tensor | Packed, segments: Segments, g: Tensor | None = None, lora_a: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """dx[s] = dy[s] W[e] + g[s] A[e], in one launch.

    Args:
        dy: [S, N], bf16 or fp16; copied where its columns are not adjacent. weight, segments: as in `grouped_linear`.
        g: [S, R], fp32, scaling included. lora_a: [E, R, K], any strides.
    Returns:
        [S, K], dtype of dy, accumulated in fp32; zero in rows past the last expert's.
    Raises:
        ValueError: as `grouped_linear`.
    """
    return _multiply(
        dy, weight, segments, True, g, None if lora_a is None else lora_a.transpose(1, 2), 1.0, None, config
    )


def _check_segments(
    x: Tensor,
    weight: Tensor | Packed,
    segments: Segments,
    columns: int,
    length: int,
    h: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise ValueError where the operands do not fit together."""
    experts, r = segments.adapters, 0 if b is None else b.shape[2]
    if isinstance(weight, Packed):
        why = supports(x.dtype, None, experts, weight.shape[1], weight.blocksize, r)
        if weight.shape[0] % experts:
            why = why or f"a weight of {list(weight.shape)} is not a stack of {experts} experts"
    else:
        why = supports(x.dtype, weight.dtype, experts, length, 1, r)
        if weight.ndim != 3 or weight.shape[0] != experts:
            why = why or f"weight must be [{experts}, N, K]; got {list(weight.shape)}"
    if why:
        raise ValueError(why)
    if x.ndim != 2 or x.shape[1] != length or segments.number != experts + 1 or segments.owner is not None:
        raise ValueError(f"rows must be [S, {length}], segments by `by_offsets`; got {list(x.shape)} and {segments}")
    if (h is None) != (b is None):
        raise ValueError("h (or g) and its adapter go together: give both or neither")
    if h is not None and b is not None and (h.shape, b.shape[:2]) != ((x.shape[0], r), (experts, columns)):
        raise ValueError(f"{list(h.shape)} and adapters {list(b.shape)} do not give [{x.shape[0]}, {columns}]")
    if h is not None and h.dtype != torch.float32:
        raise ValueError(f"h (or g) must be fp32, as kernels.lora gives it; got {h.dtype}")
    if bias is not None and bias.shape != (experts, columns):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{experts}, {columns}]")
    if weight.device != x.device:
        raise ValueError(f"the weight is on {weight.device}, expected {x.device}")


def _multiply(
    x: Tensor, weight: Tensor | Packed, segments: Segments, transposed: bool, h: Tensor | None, b: Tensor | None,
    scaling: float, bias: Tensor | None, config: Config | None,
) -> Tensor:  # fmt: skip
    """x[s] V[e]ᵀ + scaling · h[s] B[e]ᵀ + bias[e], V [columns, length] being W[e] or, where transposed, W[e]ᵀ."""
    packed = isinstance(weight, Packed)
    n, k = weight.shape[-2:]
    n = n // segments.adapters if packed else n
    columns, length = (k, n) if transposed else (n, k)
    _check_segments(x, weight, segments, columns, length, h, b, bias)
    rows, experts = x.shape[0], segments.adapters
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    capability, _ = fused._device(x.device.index)
    op = "linear_t" if transposed else "linear"
    x = x if x.stride(1) == 1 else x.contiguous()
    fits = aligned(x, weight, columns, length)
    cut = config or default_config(op, triton.cdiv(rows, experts), packed, n, k, capability, fits)
    row_tiles = min(rows, (rows + (experts + 1) * (cut.block_m - 1)) // cut.block_m)
    lora = h is not None and b is not None and b.shape[2] > 0
    b = b if b is not None and lora else x.new_empty(0, 0, 0)
    flags: dict[str, Any] = {
        "LORA": lora, "FP32_ADAPTERS": b.dtype == torch.float32, "HAS_BIAS": bias is not None,
        "EVEN_SUM": length % cut.block_k == 0, "EVEN_OUT": columns % cut.block_n == 0, "INTERPRETED": interpreted(),
        "LOOSE": not fits,
        "EXPERTS": triton.next_power_of_2(experts + 1), "GROUP_M": GROUP_M,
        "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k, "num_stages": cut.stages,
    }  # fmt: skip
    side = (h.contiguous() if h is not None else x, b, bias.contiguous() if bias is not None else x, out)
    sizes = (b.shape[2], experts, row_tiles, scaling, x.stride(0), *b.stride())
    with torch.cuda.device_of(x):
        launch = _launch_packed if isinstance(weight, Packed) else _launch_dense
        launch(
            (row_tiles * triton.cdiv(columns, cut.block_n),), x, weight, segments.ends, side, sizes, flags,
            transposed, cut, capability,
        )  # fmt: skip
    return out


def _launch_dense(
    grid: tuple[int], x: Tensor, weight: Tensor | Packed, ends: Tensor, side: tuple[Tensor, ...],
    sizes: tuple[Any, ...], flags: dict[str, Any], transposed: bool, cut: Config, capability: tuple[int, int],
) -> None:  # fmt: skip
    assert isinstance(weight, Tensor)
    v = weight.transpose(1, 2) if transposed else weight  # [E, columns, length]
    experts, columns, length = v.shape
    along_sum = v.stride(2) == 1
    matrix = v if along_sum else v.transpose(1, 2)
    tma = cut.tma and fused._has_tensor_maps(x, matrix, capability) and (along_sum or flags["EVEN_SUM"])
    tma = tma and matrix.stride(2) == 1 and matrix.stride(1) % 8 == 0 and matrix.stride(1) >= matrix.shape[2]
    tma = tma and matrix.stride(0) == matrix.shape[1] * matrix.stride(1)
    tile = (cut.block_n, cut.block_k) if along_sum else (cut.block_k, cut.block_n)
    flat = matrix.as_strided((experts * matrix.shape[1], matrix.shape[2]), (matrix.stride(1), 1)) if tma else v
    r, *numbers = sizes
    _grouped_dense_kernel[grid](
        _tensor_map(x, cut.block_m, cut.block_k) if tma else x, _tensor_map(flat, *tile) if tma else v, ends, *side,
        columns, length, r, *numbers[:4], *v.stride(), *numbers[4:],
        TMA=tma, ALONG_SUM=along_sum, num_warps=cut.warps, **flags,
    )  # fmt: skip


def _launch_packed(
    grid: tuple[int], x: Tensor, weight: Tensor | Packed, ends: Tensor, side: tuple[Tensor, ...],
    sizes: tuple[Any, ...], flags: dict[str, Any], transposed: bool, cut: Config, capability: tuple[int, int],
) -> None:  # fmt: skip
    assert isinstance(weight, Packed)
    codes = words_of(weight)
    k = weight.shape[1]
    tma = cut.tma and fused._has_tensor_maps(x, codes, capability)
    tile = (cut.block_k, cut.block_n // 8) if transposed else (cut.block_n, cut.block_k // 8)
    words = codes.view(-1, k // 2).view(torch.int32) if tma else codes
    _grouped_nf4_kernel[grid](
        _tensor_map(x, cut.block_m, cut.block_k) if tma else x, _tensor_map(words, *tile) if tma else codes,
        *operands(weight)[1:], ends, *side,
        weight.shape[0] // sizes[1], k, sizes[0], k // 8, *sizes[1:],
        TRANSPOSED=transposed, BLOCKSIZE=weight.blocksize, NESTED=weight.nested,
        LOOKUP="gather" if flags["INTERPRETED"] else "shfl", TMA=tma, MMA_SYNC=uses_mma_sync(capability, cut.block_m),
        num_warps=8 if accumulators(cut) > 64 and not tma else cut.warps, enable_fp_fusion=False, **flags,
    )  # fmt: skip
