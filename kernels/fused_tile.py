"""Tiles of an NF4 weight inside the loop of a product: words of eight codes, their scales, and the expanded tile.

Words are int32, as bitsandbytes packed the bytes; rows must hold whole blocks. A lookup is PTX's `shfl`: lane i of each
half warp holds level i, loaded once before the loop. The interpreter uses `tl.gather`. Beyond the weight's edges a tile
holds other finite values: multiply them by zeros, or do not store what comes of them.
"""

import triton
import triton.language as tl

_LEVEL_OF_LANE = tl.constexpr("""{
.reg .b32 lane; .reg .b64 address;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mad.wide.u32 address, lane, 4, $1;
ld.global.nc.f32 $0, [address];
}""")


@triton.jit
def lane_levels(code_ptr, LOOKUP: tl.constexpr):
    """The table of sixteen levels: with "shfl" one in each lane, in a value that Triton takes for a scalar."""
    if LOOKUP == "shfl":
        table = tl.inline_asm_elementwise(
            _LEVEL_OF_LANE, "=f,l", [code_ptr], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        table = tl.load(code_ptr + tl.arange(0, 16))
    return table


@triton.jit
def _column(table, words, scale, SHIFT: tl.constexpr, LOOKUP: tl.constexpr, DTYPE: tl.constexpr):
    """The weight whose code begins at bit SHIFT of each word [ROWS, WORDS], rounded once."""
    index = words >> SHIFT
    if LOOKUP == "shfl":
        # 0x100f: segments of sixteen lanes, so that only the lowest four bits of the index count.
        level = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x100f, 0xffffffff;", "=f,f,r", [table, index],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        flat = tl.reshape(index & 15, (index.shape[0] * index.shape[1],))
        level = tl.reshape(tl.gather(table, flat, 0), index.shape)
    return (level * scale).to(DTYPE)


@triton.jit
def expand_words(
    table, words, scale, LOOKUP: tl.constexpr, DTYPE: tl.constexpr, MMA_SYNC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, COLUMNS / 8] to weights [ROWS, COLUMNS]; a byte's high nibble comes first."""
    BLOCKS: tl.constexpr = scale.shape[1]
    scale = tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, COLUMNS // 8 // BLOCKS))
    scale = tl.reshape(scale, (ROWS, COLUMNS // 8))
    c0 = _column(table, words, scale, 4, LOOKUP, DTYPE)
    c1 = _column(table, words, scale, 0, LOOKUP, DTYPE)
    c2 = _column(table, words, scale, 12, LOOKUP, DTYPE)
    c3 = _column(table, words, scale, 8, LOOKUP, DTYPE)
    c4 = _column(table, words, scale, 20, LOOKUP, DTYPE)
    c5 = _column(table, words, scale, 16, LOOKUP, DTYPE)
    c6 = _column(table, words, scale, 28, LOOKUP, DTYPE)
    c7 = _column(table, words, scale, 24, LOOKUP, DTYPE)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    w = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
    if LOOKUP == "shfl":
        # A fence for Triton. mma.sync: it must not take the width of the scales' codes for the operand's (hence impure,
        # which tcgen05's pipeline does not allow). wgmma: it must not give shared memory the shape before the reshape.
        w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=w.dtype, is_pure=not MMA_SYNC, pack=2)
    return w


@triton.jit
def tile_corner(n_start, start, TRANSPOSED: tl.constexpr):
    """(row, column) of W where the tile begins that belongs to outputs from n_start on and step `start` of the sum."""
    if TRANSPOSED:
        row_start, column_start = start, n_start
    else:
        row_start, column_start = n_start, start
    return row_start, column_start


@triton.jit
def _rows(row_start, N, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """Row indices of a tile, int64; beyond N the last row's."""
    rows = row_start + tl.arange(0, ROWS).to(tl.int64)
    if not EVEN:
        rows = tl.minimum(rows, N - 1)
    return rows


@triton.jit
def load_words(
    words_ptr, corner, N, row_words, TMA: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, COLUMNS / 8] of eight codes; beyond N and K, arbitrary ones."""
    row_start, column_start = corner
    if TMA:
        words = words_ptr.load([row_start, column_start // 8])
    else:
        column = tl.multiple_of(column_start // 8, COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        if not EVEN_COLUMNS:
            column = tl.minimum(column, row_words - 1)
        words = tl.load(words_ptr + _rows(row_start, N, EVEN_ROWS, ROWS)[:, None] * row_words + column[None, :])
    return words


@triton.jit
def block_indices(
    corner, N, K, BLOCKSIZE: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Indices [ROWS, blocks in a row] of the tile's scales; beyond N and K, valid indices of other scales."""
    row_start, column_start = corner
    BLOCKS: tl.constexpr = COLUMNS // BLOCKSIZE if COLUMNS > BLOCKSIZE else 1
    column = column_start // BLOCKSIZE + tl.arange(0, BLOCKS)
    if not EVEN_COLUMNS:
        column = tl.minimum(column, K // BLOCKSIZE - 1)
    return _rows(row_start, N, EVEN_ROWS, ROWS)[:, None] * (K // BLOCKSIZE) + column[None, :]
