"""y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias for 1 to 16 tokens over an NF4 weight, in Triton.

    first launch    base[s] = x Wᵀ over the s-th part of the columns        [splits, M, N], fp32
                    h[s] = x Aᵀ over a part of the columns                  [splits, M, R], fp32
    second launch   y = Σ base + scaling · (Σ h) Bᵀ + bias, rounded once from fp32

Generating text reads every weight for each token. The floor is 0.516 bytes a weight; the cost of the
instructions comes next. The columns are cut into parts, so that programs fill the chip. The parts are
added in order, without atomics, so the same input gives the same bits. A few programs of the first
launch compute h, so LoRA costs no launch of its own.

For one or two tokens a thread takes a word of eight codes, looks the levels up, multiplies them by x and
adds up; the block's scale is applied once a word. A weight costs a shift, a lookup and one multiplication
for each token, and stays in fp32. For more tokens the tile is expanded and rounded to x's 16 bits, and the
tensor cores multiply it, with the weight on the rows and the tokens on 16 columns.

The compiled kernel behind `fastlora.native.cuda` takes fewer instructions; this one runs where that one cannot.
Source: arXiv:2305.14314, section 3; arXiv:2106.09685, section 4.1.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastlora.kernels.lora_plan import interpreted, mode
from fastlora.kernels.lora_tile import dot
from fastlora.kernels.nf4_tile import level_of, load, lookup, nf4_code, nf4_tile, operands, words_and_scales, words_of
from fastlora.kernels.operands import Packed, check_product, level_table
from torch import Tensor

MAX_TOKENS = 16
MAX_WORDS_TOKENS = 2
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TILE = {1: (64, 256), 2: (64, 256), 16: (64, 128)}  # tokens: rows and columns of W in a step
NUM_WARPS, NUM_STAGES = 4, 2
PROGRAMS_PER_SM = 4
K_PER_H, BLOCK_HK = 512, 64  # columns that a program sums for h, and how many at a time
MAX_BLOCK_R = 32
SUM_BLOCK_N, SUM_BLOCK_R = 32, 16


@triton.jit
def _pair(x_ptrs, mask, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """Two neighbouring values of x in fp32, from pointers to pairs in an int32, or to fp32."""
    if DTYPE == "fp32":
        low, high = load(x_ptrs, mask, EVEN), load(x_ptrs + 1, mask, EVEN)
    else:
        pair = load(x_ptrs, mask, EVEN)
        if DTYPE == "bf16":
            low = (pair << 16).to(tl.float32, bitcast=True)
            high = (pair & -65536).to(tl.float32, bitcast=True)
        else:
            low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _times_x(words, code, x_ptrs, mask, LOOKUP: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """Sum over each word's eight weights of level · x; x_ptrs: where x begins for a word."""
    STEP: tl.constexpr = 2 if DTYPE == "fp32" else 1
    x0, x1 = _pair(x_ptrs, mask, EVEN, DTYPE)
    x2, x3 = _pair(x_ptrs + STEP, mask, EVEN, DTYPE)
    x4, x5 = _pair(x_ptrs + 2 * STEP, mask, EVEN, DTYPE)
    x6, x7 = _pair(x_ptrs + 3 * STEP, mask, EVEN, DTYPE)
    total = level_of(code, words >> 4, LOOKUP) * x0
    total = tl.fma(level_of(code, words, LOOKUP), x1.broadcast_to(words.shape), total)
    total = tl.fma(level_of(code, words >> 12, LOOKUP), x2.broadcast_to(words.shape), total)
    total = tl.fma(level_of(code, words >> 8, LOOKUP), x3.broadcast_to(words.shape), total)
    total = tl.fma(level_of(code, words >> 20, LOOKUP), x4.broadcast_to(words.shape), total)
    total = tl.fma(level_of(code, words >> 16, LOOKUP), x5.broadcast_to(words.shape), total)
    total = tl.fma(level_of(code, words >> 28, LOOKUP), x6.broadcast_to(words.shape), total)
    total = tl.fma(level_of(code, words >> 24, LOOKUP), x7.broadcast_to(words.shape), total)
    return total


@triton.jit
def _base_words(
    x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, base_ptr,
    offs_n, k_begin, k_end, M, N, K, stride_xm,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """base [M, N] over some columns, weight by weight, for M up to TOKENS, 1 or 2. x_ptr: what `_pair` takes."""
    WORDS: tl.constexpr = BLOCK_K // 8
    PER_WORD: tl.constexpr = 8 if DTYPE == "fp32" else 4
    acc0 = tl.zeros((BLOCK_N, WORDS), dtype=tl.float32)
    acc1 = acc0
    for k_start in range(k_begin, k_end, BLOCK_K):
        words, scale = words_and_scales(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, LOOKUP, EVEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        offs_word = tl.arange(0, WORDS)[None, :]
        x_ptrs = x_ptr + k_start // 8 * PER_WORD + offs_word * PER_WORD
        mask = offs_word * 8 < (k_end - k_start).to(tl.int32)
        acc0 = tl.fma(_times_x(words, code, x_ptrs, mask, LOOKUP, EVEN, DTYPE), scale, acc0)
        if TOKENS == 2:
            acc1 = tl.fma(_times_x(words, code, x_ptrs + stride_xm, mask, LOOKUP, EVEN, DTYPE), scale, acc1)
    tl.store(base_ptr + offs_n, tl.sum(acc0, 1), mask=offs_n < N)
    if TOKENS == 2:
        tl.store(base_ptr + N + offs_n, tl.sum(acc1, 1), mask=offs_n < N)


@triton.jit
def _base_dot(
    x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, base_ptr,
    offs_n, k_begin, k_end, M, N, K, stride_xm,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """base [M, N] over some columns, by the tensor cores, for M up to TOKENS, 16."""
    offs_m = tl.arange(0, TOKENS)
    acc = tl.zeros((BLOCK_N, TOKENS), dtype=tl.float32)
    for k_start in range(k_begin, k_end, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        x_mask = (offs_m[None, :] < M) & (offs_k[:, None] < k_end)
        x = tl.load(x_ptr + offs_m[None, :] * stride_xm + offs_k[:, None], mask=x_mask, other=0.0)
        w = nf4_tile(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, True, LOOKUP, BLOCK_N, BLOCK_K, EVEN,
        )  # fmt: skip
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, TOKENS]
    out_mask = (offs_n[:, None] < N) & (offs_m[None, :] < M)
    tl.store(base_ptr + offs_m[None, :] * N + offs_n[:, None], acc, mask=out_mask)


@triton.jit
def _partial_h(
    x_ptr, a_ptr, h_ptr, r_start, k_begin, k_end, M, R, stride_xm, stride_ar, stride_ak,
    MODE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [M, R] over some columns, for BLOCK_R of its ranks."""
    offs_m, offs_r = tl.arange(0, 16), r_start + tl.arange(0, BLOCK_R)
    acc = tl.zeros((16, BLOCK_R), dtype=tl.float32)
    for k_start in range(k_begin, k_end, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        x_mask = (offs_m[:, None] < M) & (offs_k[None, :] < k_end)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=x_mask, other=0.0)
        a_mask = (offs_k[:, None] < k_end) & (offs_r[None, :] < R)
        a = tl.load(a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar, mask=a_mask, other=0.0)
        acc = dot(x, a, acc, MODE, INTERPRETED)  # [16, BLOCK_K] @ [BLOCK_K, BLOCK_R]
    tl.store(h_ptr + offs_m[:, None] * R + offs_r[None, :], acc, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R))


@triton.jit(do_not_specialize_on_alignment=["codes_ptr"])
def _decode_kernel(
    x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, a_ptr, base_ptr, h_ptr,
    M, N, K, R, splits, k_per_split, h_programs, h_splits, k_per_h, stride_xm, stride_ar, stride_ak,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, LOOKUP: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
    MODE: tl.constexpr, INTERPRETED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < h_programs:
        split, r_start = program % h_splits, program // h_splits * BLOCK_R
        k_begin = split * k_per_h
        _partial_h(
            x_ptr, a_ptr, h_ptr + split * M * R, r_start, k_begin, tl.minimum(k_begin + k_per_h, K),
            M, R, stride_xm, stride_ar, stride_ak, MODE, INTERPRETED, BLOCK_R, BLOCK_HK,
        )  # fmt: skip
    else:
        split = (program - h_programs) % splits
        offs_n = (program - h_programs) // splits * BLOCK_N + tl.arange(0, BLOCK_N)
        k_begin = split * k_per_split
        k_end = tl.minimum(k_begin + k_per_split, K)
        base_ptr += split * M * N
        code = nf4_code(code_ptr, LOOKUP)
        offset = 0.0
        if NESTED:
            offset = tl.load(offset_ptr)
        if TOKENS == 16:
            _base_dot(
                x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, base_ptr,
                offs_n, k_begin, k_end, M, N, K, stride_xm, BLOCKSIZE, NESTED, LOOKUP, EVEN, TOKENS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            pairs_ptr, stride_pm = x_ptr, stride_xm
            if DTYPE != "fp32":
                pairs_ptr, stride_pm = x_ptr.to(tl.pointer_type(tl.int32)), stride_xm // 2
            _base_words(
                pairs_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, base_ptr,
                offs_n, k_begin, k_end, M, N, K, stride_pm,
                BLOCKSIZE, NESTED, LOOKUP, EVEN, DTYPE, TOKENS, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _sum_of_parts(ptrs, parts, stride, mask):
    """Sum over `parts` tensors, `stride` apart, of what `ptrs` [ROWS, COLUMNS] point to: eight at a time, in order."""
    total = tl.zeros(ptrs.shape, dtype=tl.float32)
    for start in range(0, parts, 8):
        part = start + tl.arange(0, 8)[:, None, None]
        some = tl.load(ptrs[None, :, :] + part.to(tl.int64) * stride, mask=mask[None, :, :] & (part < parts), other=0.0)
        total += tl.sum(some, 0)
    return total


@triton.jit
def _decode_sum_kernel(
    base_ptr, h_ptr, b_ptr, bias_ptr, out_ptr, M, N, R, splits, h_splits, scaling, stride_bn, stride_br,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, TOKENS)
    out_mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    offs_out = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    y = _sum_of_parts(base_ptr + offs_out, splits, M * N, out_mask)
    update = tl.zeros((TOKENS, BLOCK_N), dtype=tl.float32)
    for r_start in range(0, R, BLOCK_R):
        offs_r = r_start + tl.arange(0, BLOCK_R)
        h_mask = (offs_m[:, None] < M) & (offs_r[None, :] < R)
        h = _sum_of_parts(h_ptr + offs_m[:, None] * R + offs_r[None, :], h_splits, M * R, h_mask)
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=(offs_n[:, None] < N) & (offs_r[None, :] < R), other=0.0).to(tl.float32)
        update += tl.sum(h[:, None, :] * b[None, :, :], 2)
    y += update * scaling
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offs_out, y.to(out_ptr.dtype.element_ty), mask=out_mask)


class _Plan(NamedTuple):
    """How a call is cut into programs."""

    tokens: int  # 1, 2 or 16: what the kernel is compiled for
    block_n: int
    block_k: int
    splits: int
    k_per_split: int
    block_r: int
    h_splits: int
    k_per_h: int


@functools.lru_cache(maxsize=4096)
def plan(m: int, k: int, n: int, r: int, device_index: int | None) -> _Plan:
    """How x [m, k] times a weight [n, k] with adapters of rank r is cut into programs on a device; cached."""
    tokens = m if m <= MAX_WORDS_TOKENS else MAX_TOKENS
    block_n, block_k = TILE[tokens]
    if tokens == MAX_WORDS_TOKENS and n % 16:  # an address for each value takes registers
        block_k //= 2
    processors = (
        2 if device_index is None else torch.cuda.get_device_properties(device_index).multi_processor_count
    )  # the interpreter has none
    steps = triton.cdiv(k, block_k)
    splits = max(1, min(steps, processors * PROGRAMS_PER_SM // triton.cdiv(n, block_n)))
    k_per_split = triton.cdiv(steps, splits) * block_k
    return _Plan(
        tokens, block_n, block_k, triton.cdiv(k, k_per_split), k_per_split,
        min(MAX_BLOCK_R, max(16, triton.next_power_of_2(r))), triton.cdiv(k, K_PER_H), K_PER_H,
    )  # fmt: skip


def supports(x_dtype: torch.dtype, m: int, k: int, n: int, blocksize: int, r: int) -> str:
    """Empty where `decode` takes x [m, k], a weight [n, k] and adapters of rank r (0: none), else why not."""
    if x_dtype not in DTYPES:
        return f"activations are {x_dtype}, but the decode kernel takes bf16, fp16 and fp32"
    if not 0 <= m <= MAX_TOKENS:
        return f"{m} tokens, but the decode kernel takes at most {MAX_TOKENS}"
    if k < 1 or k % blocksize:
        return f"in_features is {k}, but the decode kernel takes multiples of the blocksize, {blocksize}"
    return ""


def decode(
    x: Tensor,
    weight: Packed,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + scaling · (x Aᵀ) Bᵀ + bias, rounded once from fp32.

    Args:
        x: [M, K], bf16, fp16 or fp32, any strides; M 0 to 16.
        weight: [N, K]; its blocksize divides K. Codes that are not at a 4-byte address, as in a view, are copied.
        lora_a, lora_b: [R, K] and [N, R], any strides; both or neither.
        bias: [N].
    Returns:
        [M, N], dtype of x.
    Raises:
        ValueError: shapes do not fit together, or `supports` says why not.
    """
    check_product(x, weight, lora_a, lora_b, bias)
    (m, k), n = x.shape, weight.shape[0]
    if reason := supports(x.dtype, m, k, n, weight.blocksize, 0 if lora_a is None else lora_a.shape[0]):
        raise ValueError(reason)
    code, codes = level_table(x.device), words_of(weight)
    a, b = (lora_a, lora_b) if lora_a is not None and lora_b is not None else (code.view(1, 16), code.view(1, 16))
    r = 0 if lora_a is None else lora_a.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    adapters = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(adapters), b.to(adapters)
    x = _in_pairs(x)
    cut = plan(m, k, n, r, x.device.index)
    parts = cut.h_splits if r else 0
    base = torch.empty(cut.splits, m, n, dtype=torch.float32, device=x.device)
    h = torch.empty(parts, m, r, dtype=torch.float32, device=x.device)
    h_programs = parts * triton.cdiv(r, cut.block_r)
    programs = h_programs + triton.cdiv(n, cut.block_n) * cut.splits
    with torch.cuda.device_of(x):
        _decode_kernel[(programs,)](
            x, *operands(weight, codes), a, base, h,
            m, n, k, r, cut.splits, cut.k_per_split, h_programs, max(1, parts), cut.k_per_h, x.stride(0), *a.stride(),
            BLOCKSIZE=weight.blocksize, NESTED=weight.nested, LOOKUP=lookup(x.device),
            EVEN=n % cut.block_n == 0 and k % cut.block_k == 0, DTYPE=DTYPES[x.dtype],
            MODE=mode(x.dtype, adapters), INTERPRETED=interpreted(), TOKENS=cut.tokens,
            BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, BLOCK_R=cut.block_r, BLOCK_HK=BLOCK_HK,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        _decode_sum_kernel[(triton.cdiv(n, SUM_BLOCK_N),)](
            base, h, b, code if bias is None else bias.contiguous(), out,
            m, n, r, cut.splits, parts, scaling, *b.stride(),
            HAS_BIAS=bias is not None, TOKENS=triton.next_power_of_2(m), BLOCK_N=SUM_BLOCK_N, BLOCK_R=SUM_BLOCK_R,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def _in_pairs(x: Tensor) -> Tensor:
    """x with adjacent columns, two of which can be loaded as one 32-bit word."""
    if x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0:
        return x
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
