"""Expand NF4 to a dense weight in one launch, with the LoRA update merged in on request.

    W[n, k]  = code[q[n, k]] * scale[b],  b = (n K + k) // blocksize
    scale[b] = absmax[b], or code2[absmax_u8[b]] * absmax2[b // 256] + offset
    W'       = row_scale ∘ (W + scaling · B A), rounded once from fp32;  or  [W | B], for products over K + R columns

Bytes: 0.516 read and 2 written per weight (bf16), 2.516 in all; the update adds R FMAs a weight on
the tensor cores. Eight codes, one 32-bit word, never cross a block; nor a row where rows hold whole
blocks (`ALIGNED`). A thread loads a word, eight of them before it uses the first, and stores 16
bytes. A scale is computed once a block and handed on through shared memory. Where no operand has
rows, the weight is one flat run of blocks, whatever K; the rest goes weight by weight (`_tile_any`).

The 16-entry lookup, by `LOOKUP`:
    shfl    lane l of a warp holds code[l % 16], and `shfl.sync.idx` of width 16 reads any of them:
            one instruction a weight, for the clamp 0x100f also masks the index to four bits.
    gather  `tl.gather`, the twin that the interpreter and other devices run: the same bits.
The asm is right in any layout. Each block of it fetches its lane's entry by %laneid itself (the
compiler merges the fetches into one), so no tensor has to lie in the lanes in any order; otherwise
it maps a word to its own eight weights. All 32 lanes are active, as the shuffle requires: Triton
branches for whole programs or warps only, and predicates loads instead of branching.

Products and sums round where bitsandbytes rounds them: the asm names each rounding, the twin needs
FMA contraction off (`enable_fp_fusion=False`).

Thread instructions a weight (`python -m bench static`, bf16, nested): 4.0 plain, 7.5 merged at R = 16.
Source: arXiv:2305.14314, section 3.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastlora.kernels.lora_plan import interpreted
from fastlora.kernels.lora_tile import dot_bf16, top
from torch import Tensor

NESTED_BLOCKSIZE = tl.constexpr(256)
MIN_CAPABILITY = (8, 0)  # of shfl: the packed conversion to bf16
WORD = 8  # codes in 32 bits


def _expand_asm() -> str:
    """PTX that expands a word of eight codes, $8, to fp32, $0 to $7; $9: address of the levels, $10: scale.

    Codes come high nibble first from each byte, so code i starts at bit 4 (i ^ 1).
    """
    lines = [".reg .b32 index, level, lane;", ".reg .b64 address;"]
    lines += ["mov.u32 lane, %laneid;", "and.b32 lane, lane, 15;"]
    lines += ["mad.wide.u32 address, lane, 4, $9;", "ld.global.nc.b32 level, [address];"]
    for i in range(8):
        lines += [f"shr.b32 index, $8, {4 * (i ^ 1)};"]
        lines += [f"shfl.sync.idx.b32 ${i}, level, index, 0x100f, 0xffffffff;"]
        lines += [f"mul.rn.f32 ${i}, ${i}, $10;"]
    return "{\n" + "\n".join(lines) + "\n}"


_EXPAND_WORD = tl.constexpr(_expand_asm())
_LEVEL = tl.constexpr("""{
.reg .b32 lane; .reg .b64 address; .reg .b32 level;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mad.wide.u32 address, lane, 4, $2;
ld.global.nc.b32 level, [address];
shfl.sync.idx.b32 $0, level, $1, 0x100f, 0xffffffff;
}""")
_NESTED_SCALE = tl.constexpr("{ .reg .f32 product; mul.rn.f32 product, $1, $2; add.rn.f32 $0, product, $3; }")


@triton.jit
def nf4_code(code_ptr, LOOKUP: tl.constexpr):
    """The sixteen levels as `nf4_tile` wants them: an address for shfl, a tensor for gather."""
    if LOOKUP == "shfl":
        code = code_ptr.to(tl.int64)
    else:
        code = tl.load(code_ptr + tl.arange(0, 16))
    return code


@triton.jit
def _load(ptrs, mask, EVEN: tl.constexpr):
    """What `ptrs` point at; zero where the mask is false."""
    if EVEN:
        value = tl.load(ptrs)
    else:
        value = tl.load(ptrs, mask=mask, other=0)
    return value


@triton.jit
def _store(ptrs, value, mask, EVEN: tl.constexpr):
    """Store where the mask is true."""
    if EVEN:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit
def _scales(
    absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask,
    NESTED: tl.constexpr, LOOKUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """fp32 scale of each block index in `block`."""
    scale = _load(absmax_ptr + block, mask, EVEN)
    if NESTED:
        level = tl.load(code2_ptr + scale.to(tl.int32))
        outer = _load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask, EVEN)
        if LOOKUP == "shfl":
            scale = tl.inline_asm_elementwise(
                _NESTED_SCALE, "=f,f,f,f", [level, outer, offset], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            scale = level * outer + offset
    return scale


@triton.jit
def _words(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, offs_n, k_start, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Words of eight codes and the scale of each, both [BLOCK_N, BLOCK_K / 8]."""
    WORDS: tl.constexpr = BLOCK_K // 8
    BLOCKS: tl.constexpr = BLOCK_K // BLOCKSIZE if BLOCK_K > BLOCKSIZE else 1
    in_rows = offs_n[:, None] < N
    left = tl.minimum(K - k_start, BLOCK_K).to(tl.int32)
    offs_word = tl.arange(0, WORDS)
    words_ptr = (codes_ptr + k_start // 2).to(tl.pointer_type(tl.int32))
    words_ptrs = words_ptr + offs_n[:, None] * (K // 8) + offs_word[None, :]
    words = _load(words_ptrs, in_rows & (offs_word[None, :] * 8 < left), EVEN)
    offs_block = tl.arange(0, BLOCKS)
    block = offs_n[:, None] * (K // BLOCKSIZE) + k_start // BLOCKSIZE + offs_block[None, :]
    mask = in_rows & (offs_block[None, :] * BLOCKSIZE < left)
    scale = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED, LOOKUP, EVEN)
    scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCKS, WORDS // BLOCKS))
    return words, tl.reshape(scale, (BLOCK_N, WORDS))


@triton.jit
def _expand(words, scale, code, LOOKUP: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """Weights [BLOCK_N, 8 WORDS] in fp32."""
    if LOOKUP == "shfl":
        v = tl.inline_asm_elementwise(
            _EXPAND_WORD, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l,r", [words, code, scale],
            dtype=(
                tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32,
            ), is_pure=True, pack=1,
        )  # fmt: skip
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
        w = tl.join(even, odd)
    else:
        shift = 4 * (tl.arange(0, 8) ^ 1)
        index = (words[:, :, None] >> shift[None, None, :]) & 15
        level = tl.gather(code, tl.reshape(index, (BLOCK_N * WORDS * 8,)), 0)
        w = tl.reshape(level, (BLOCK_N, WORDS, 8)) * scale[:, :, None]
    return tl.reshape(w, (BLOCK_N, 8 * WORDS))


@triton.jit
def _tile_any(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_K] in fp32 for any K and any address: blocks and even bytes may cross rows."""
    offs_k = k_start + tl.arange(0, BLOCK_K)
    mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    flat = offs_n[:, None] * K + offs_k[None, :]
    packed = tl.load(codes_ptr + flat // 2, mask=mask, other=0).to(tl.int32)
    index = tl.where(flat % 2 == 0, packed >> 4, packed & 15)
    scale = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, flat // BLOCKSIZE, mask, NESTED, LOOKUP, False)
    if LOOKUP == "shfl":
        level = tl.inline_asm_elementwise(_LEVEL, "=r,r,l", [index, code], dtype=tl.float32, is_pure=True, pack=1)
    else:
        level = tl.reshape(tl.gather(code, tl.reshape(index, (BLOCK_N * BLOCK_K,)), 0), (BLOCK_N, BLOCK_K))
    return level * scale


@triton.jit
def nf4_tile(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, LOOKUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr = False,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_K] in fp32, zero outside [N, K]; for other kernels too.

    codes_ptr: *u8; of a kernel that does not specialize on its alignment, so that a thread takes one
    word. offset: fp32 scalar, any where not NESTED. code: of `nf4_code`. offs_n: [BLOCK_N], int64.
    k_start: int64, a multiple of BLOCK_K. ALIGNED: of `aligned`, on the host. EVEN: nothing lies outside.
    """
    if ALIGNED:
        words, scale = _words(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, LOOKUP, EVEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        w = _expand(words, scale, code, LOOKUP, BLOCK_N, BLOCK_K // 8)
    else:
        w = _tile_any(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, LOOKUP, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return w


@triton.jit
def _dot(b, a, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + b a. "split": two bf16 parts of each fp32 operand, 2**-15 from exact, to be rounded to bf16."""
    if PRECISION == "split":
        a1, b1 = top(a), top(b)
        acc = dot_bf16(b1, a1, acc, INTERPRETED)
        acc = dot_bf16(b - b1, a1, acc, INTERPRETED)
        acc = dot_bf16(b1, a - a1, acc, INTERPRETED)
    elif PRECISION == "narrow":
        acc = tl.dot(b, a, acc)
    else:
        acc = tl.dot(b, a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _adapter_tile(ptr, offs_rows, rows, offs_columns, columns, stride_row, stride_column):
    """A tile of lora_a or lora_b, zero outside."""
    ptrs = ptr + offs_rows[:, None] * stride_row + offs_columns[None, :] * stride_column
    return tl.load(ptrs, mask=(offs_rows[:, None] < rows) & (offs_columns[None, :] < columns), other=0.0)


@triton.jit(do_not_specialize_on_alignment=["codes_ptr"])
def _nf4_dequantize_kernel(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, lora_a_ptr, lora_b_ptr, row_scale_ptr, out_ptr,
    scaling, N, K, R,
    stride_ar, stride_ak, stride_bn, stride_br, stride_on,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    MERGE: tl.constexpr, EXTEND: tl.constexpr, ROW_SCALE: tl.constexpr,
    LOOKUP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_R: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    in_rows = offs_n[:, None] < N
    code = nf4_code(code_ptr, LOOKUP)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    if ROW_SCALE:
        row_scale = tl.load(row_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    if EXTEND and tl.program_id(0) == 0:
        for r_start in range(0, R, BLOCK_R):
            b = _adapter_tile(lora_b_ptr, offs_n, N, r_start + offs_r, R, stride_bn, stride_br).to(tl.float32)
            if ROW_SCALE:
                b *= row_scale
            b_ptrs = out_ptr + offs_n[:, None] * stride_on + K + r_start + offs_r[None, :]
            tl.store(b_ptrs, b.to(out_ptr.dtype.element_ty), mask=in_rows & (r_start + offs_r[None, :] < R))
    if MERGE and WHOLE_R:
        b = _adapter_tile(lora_b_ptr, offs_n, N, offs_r, R, stride_bn, stride_br)
    for step in tl.static_range(STEPS):
        k_start = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_K
        left = tl.minimum(K - k_start, BLOCK_K).to(tl.int32)
        row_ptrs = out_ptr + k_start + offs_n[:, None] * stride_on
        offs_k = tl.arange(0, BLOCK_K)
        w = nf4_tile(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, ALIGNED, LOOKUP, BLOCK_N, BLOCK_K, EVEN,
        )  # fmt: skip
        if MERGE:
            if WHOLE_R:
                a = _adapter_tile(lora_a_ptr, offs_r, R, k_start + offs_k, K, stride_ar, stride_ak)
                update = _dot(b, a, tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32), PRECISION, INTERPRETED)
            else:
                update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
                for r_start in tl.range(0, R, BLOCK_R, num_stages=1):
                    b = _adapter_tile(lora_b_ptr, offs_n, N, r_start + offs_r, R, stride_bn, stride_br)
                    a = _adapter_tile(lora_a_ptr, r_start + offs_r, R, k_start + offs_k, K, stride_ar, stride_ak)
                    update = _dot(b, a, update, PRECISION, INTERPRETED)
            w = tl.fma(update, scaling, w)
        if ROW_SCALE:
            w *= row_scale
        first = offs_k // 8 * 8 if ALIGNED else offs_k  # a word is in or out as a whole, and so is its store
        out_mask = in_rows & (first[None, :] < left)
        _store(row_ptrs + offs_k[None, :], w.to(out_ptr.dtype.element_ty), out_mask, EVEN)


class Tile(NamedTuple):
    """How a launch is cut."""

    block_n: int
    block_k: int
    steps: int  # tiles of a row that a program takes, one after the other
    warps: int
    block_r: int  # ranks a product on the tensor cores takes; a loop takes the rest


FLAT = Tile(1, 8192, 1, 4, 16)
SMALL = Tile(64, 64, 1, 8, 16)
_TILES = {  # for ranks up to 16, and above
    "none": (Tile(64, 128, 2, 4, 16),) * 2,
    "narrow": (Tile(32, 128, 4, 4, 16), Tile(64, 128, 2, 8, 16)),
    "split": (Tile(32, 128, 4, 4, 16), Tile(64, 128, 1, 4, 16)),
    "tf32x3": (Tile(32, 128, 2, 4, 16), Tile(64, 128, 1, 8, 16)),
    "ieee": (SMALL, SMALL),
}


def tile(precision: str, r: int, words: bool) -> Tile:
    """The tile of a launch that keeps rows, by how B A is multiplied ("none": it is not) and its rank.

    words: weights can be taken eight at a time.
    """
    return _TILES[precision][r > 16] if words else SMALL


def precision(out: torch.dtype, adapter: torch.dtype) -> str:
    """How B A is multiplied: 16-bit adapters as they are, fp32 ones as exactly as `out` can show."""
    if adapter != torch.float32:
        return "narrow"
    return {torch.bfloat16: "split", torch.float16: "tf32x3"}.get(out, "ieee")


def lookup(device: torch.device | None = None) -> str:
    """The lookup of launches on `device` (default: the current one): "shfl" or "gather"."""
    if interpreted() or torch.version.cuda is None:
        return "gather"
    return _compiled_lookup(device.index if device is not None else None)


@functools.cache
def _compiled_lookup(device_index: int | None) -> str:
    return "shfl" if torch.cuda.get_device_capability(device_index) >= MIN_CAPABILITY else "gather"


def aligned(codes: Tensor, k: int, blocksize: int) -> bool:
    """Whether rows hold whole blocks, and codes lie where 32-bit words may be loaded."""
    return k % blocksize == 0 and codes.data_ptr() % 4 == 0


def _check(
    out: Tensor, k: int, lora_a: Tensor | None, lora_b: Tensor | None, row_scale: Tensor | None, extend: Tensor | None
) -> None:
    n, columns = out.shape
    if columns > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows; its strides are {out.stride()}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("merging takes lora_a and lora_b together")
    if lora_a is not None and lora_b is not None:
        if extend is not None:
            raise ValueError("adapters are merged (lora_a, lora_b) or appended (extend), not both")
        if lora_a.shape[1] != k or lora_b.shape != (n, lora_a.shape[0]):
            raise ValueError(
                f"merging into [{n}, {k}] takes lora_a [R, {k}] and lora_b [{n}, R]; "
                f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
            )
    if extend is not None and (extend.shape[0] != n or k <= 0):
        raise ValueError(
            f"extend must be [{n}, R] for out [{n}, K + R]; got {list(extend.shape)} for {list(out.shape)}"
        )
    if row_scale is not None and (row_scale.shape != (n,) or row_scale.dtype != torch.float32):
        raise ValueError(f"row_scale must be fp32 [{n}]; got {row_scale.dtype} {list(row_scale.shape)}")


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    blocksize: int,
    out: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
    row_scale: Tensor | None = None,
    extend: Tensor | None = None,
) -> None:
    """Fill `out` with the expanded weight, plus scaling · B A where adapters are given.

    Args:
        codes: [ceil(N*K/2)], uint8. absmax: [blocks], fp32, or uint8 with absmax2, code2 and offset.
        code: [16], fp32, the levels, on the same device.
        out: [N, K], bf16, fp16 or fp32, rows contiguous (a row stride above K is allowed).
        lora_a: [R, K]. lora_b: [N, R]. Any strides.
        row_scale: [N], fp32: multiplies the rows of W + scaling · B A before the rounding (DoRA).
        extend: lora_b [N, R], any strides: `out` is [N, K + R] and its last columns receive it, times
            row_scale where given: the layout [W | B]. Excludes merging.
    Raises:
        ValueError: shapes do not fit together, or adapters are given to merge and to append.
    """
    n, k = out.shape[0], out.shape[1] - (0 if extend is None else extend.shape[1])
    _check(out, k, lora_a, lora_b, row_scale, extend)
    merge = lora_a is not None
    absent = code.view(1, 16)
    a = absent if lora_a is None else lora_a
    b = lora_b if lora_b is not None else absent if extend is None else extend
    how = "none"
    if merge:
        adapters = torch.promote_types(a.dtype, b.dtype)
        a, b, how = a.to(adapters), b.to(adapters), precision(out.dtype, adapters)
    r = b.shape[1]
    words = aligned(codes, k, blocksize)
    cut = tile(how, r, words)
    rows_matter = merge or extend is not None or row_scale is not None or not out.is_contiguous()
    if not rows_matter and aligned(codes, n * k, WORD):
        n, k, words, cut = 1, n * k, True, FLAT
    nested = absmax2 is not None
    columns = cut.steps * cut.block_k
    with torch.cuda.device_of(out):
        _nf4_dequantize_kernel[(triton.cdiv(k, columns), triton.cdiv(n, cut.block_n))](
            codes, absmax,
            absmax2 if nested else absmax, code2 if nested else code, offset if nested else code, code,
            a, b, code if row_scale is None else row_scale.contiguous(), out,
            float(scaling), n, k, r,
            *a.stride(), *b.stride(), out.stride(0),
            BLOCKSIZE=blocksize, NESTED=nested, ALIGNED=words,
            EVEN=words and n % cut.block_n == 0 and k % columns == 0,
            MERGE=merge, EXTEND=extend is not None, ROW_SCALE=row_scale is not None,
            LOOKUP=lookup(out.device), PRECISION=how, INTERPRETED=interpreted(),
            STEPS=cut.steps, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
            BLOCK_R=cut.block_r, WHOLE_R=not merge or r <= cut.block_r,
            num_warps=cut.warps, enable_fp_fusion=False,
        )  # fmt: skip
