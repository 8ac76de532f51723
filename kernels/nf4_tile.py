"""Device helpers that expand a tile of an NF4 weight in registers, for every kernel that reads packed codes.

Eight codes, one 32-bit word, never cross a block, and never a row where rows hold whole blocks (`aligned`). Other
weights are expanded one by one.

The 16-entry lookup, by `LOOKUP`:
    shfl    lane l of a warp holds code[l % 16], and `shfl.sync.idx` of width 16 reads any of them:
            one instruction a weight, because the clamp 0x100f also masks the index to four bits.
    gather  `tl.gather`, which the interpreter and other devices run: the same bits.
The asm is right in any layout. Each block of it fetches its lane's entry by %laneid itself (the
compiler merges the fetches into one), so no tensor has to be in the lanes in any order; apart from
that it maps a word to its own eight weights. All 32 lanes are active, as the shuffle requires: Triton
branches only for whole programs or warps, and predicates loads instead of branching.

Products and sums round where bitsandbytes rounds them: the asm names each rounding, and gather needs
FMA contraction off (`enable_fp_fusion=False`).
Source: arXiv:2305.14314, section 3.
"""

import functools

import torch
import triton
import triton.language as tl
from fastlora.kernels.lora_plan import interpreted
from fastlora.kernels.operands import Packed, level_table
from torch import Tensor

NESTED_BLOCKSIZE = tl.constexpr(256)

MIN_CAPABILITY = (8, 0)  # for shfl: it needs the packed conversion to bf16


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
    """The sixteen levels as `nf4_tile` takes them: an address for shfl, a tensor for gather."""
    if LOOKUP == "shfl":
        code = code_ptr.to(tl.int64)
    else:
        code = tl.load(code_ptr + tl.arange(0, 16))
    return code


@triton.jit
def load(ptrs, mask, EVEN: tl.constexpr):
    """What `ptrs` point to; zero where the mask is false."""
    if EVEN:
        value = tl.load(ptrs)
    else:
        value = tl.load(ptrs, mask=mask, other=0)
    return value


@triton.jit
def block_scales(
    absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask,
    NESTED: tl.constexpr, LOOKUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """fp32 scale of each block index in `block`."""
    scale = load(absmax_ptr + block, mask, EVEN)
    if NESTED:
        level = tl.load(code2_ptr + scale.to(tl.int32))
        outer = load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask, EVEN)
        if LOOKUP == "shfl":
            scale = tl.inline_asm_elementwise(
                _NESTED_SCALE, "=f,f,f,f", [level, outer, offset], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            scale = level * outer + offset
    return scale


@triton.jit
def words_and_scales(
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
    words = load(words_ptrs, in_rows & (offs_word[None, :] * 8 < left), EVEN)
    offs_block = tl.arange(0, BLOCKS)
    block = offs_n[:, None] * (K // BLOCKSIZE) + k_start // BLOCKSIZE + offs_block[None, :]
    mask = in_rows & (offs_block[None, :] * BLOCKSIZE < left)
    scale = block_scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED, LOOKUP, EVEN)
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
def level_of(code, index, LOOKUP: tl.constexpr):
    """The level of the lowest four bits of each index, a matrix. code: from `nf4_code`."""
    if LOOKUP == "shfl":
        level = tl.inline_asm_elementwise(_LEVEL, "=r,r,l", [index, code], dtype=tl.float32, is_pure=True, pack=1)
    else:
        flat = tl.reshape(index & 15, (index.shape[0] * index.shape[1],))
        level = tl.reshape(tl.gather(code, flat, 0), index.shape)
    return level


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
    scale = block_scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, flat // BLOCKSIZE, mask, NESTED, LOOKUP, False)
    return level_of(code, index, LOOKUP) * scale


@triton.jit
def nf4_tile(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, LOOKUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr = False,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_K] in fp32, zero outside [N, K]; used by several kernels.

    codes_ptr: *u8; the kernel must not specialize on its alignment, so that a thread takes one word.
    offset: fp32 scalar, any value unless NESTED. code: from `nf4_code`. offs_n: [BLOCK_N], int64. k_start:
    int64, a multiple of BLOCK_K. ALIGNED: from `aligned`, on the host. EVEN: nothing is outside [N, K].
    """
    if ALIGNED:
        words, scale = words_and_scales(
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


def lookup(device: torch.device | None = None) -> str:
    """The lookup for launches on `device` (default: the current one): "shfl" or "gather"."""
    if interpreted() or torch.version.cuda is None:
        return "gather"
    index = device.index if device is not None else None
    return _compiled_lookup(torch.cuda.current_device() if index is None else index)


@functools.cache
def _compiled_lookup(device_index: int) -> str:
    return "shfl" if torch.cuda.get_device_capability(device_index) >= MIN_CAPABILITY else "gather"


def operands(weight: Packed, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six pointers of a weight: codes, absmax, absmax2, code2, offset, levels; a dummy for what it does not have.

    codes: in place of the weight's own, such as an aligned copy.
    """
    code = level_table(weight.device)
    codes = weight.codes if codes is None else codes
    if weight.absmax2 is None or weight.code2 is None or weight.offset is None:
        return codes, weight.absmax, weight.absmax, code, code, code
    return codes, weight.absmax, weight.absmax2, weight.code2, weight.offset, code


def aligned(codes: Tensor, k: int, blocksize: int) -> bool:
    """Whether rows hold whole blocks, and codes are where 32-bit words can be loaded."""
    return k % blocksize == 0 and codes.data_ptr() % 4 == 0


def words_of(weight: Packed) -> Tensor:
    """The codes, where 32-bit words can be loaded: a copy if they are not there already, as in a view."""
    return weight.codes if weight.codes.data_ptr() % 4 == 0 else weight.codes.clone()
