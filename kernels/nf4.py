"""Expand NF4 to a dense weight in one launch, with the LoRA update merged in on request.

    W[n, k]  = code[q[n, k]] * scale[b],  b = (n K + k) // blocksize
    scale[b] = absmax[b], or code2[absmax_u8[b]] * absmax2[b // 256] + offset
    W'       = W + scaling · B A, rounded once from fp32

Bytes: 0.516 read and 2 written per weight (bf16), 2.516 in all; the update adds R FMAs a weight on
the tensor cores. A thread loads words of eight codes, eight of them before it uses the first, and
stores 16 bytes. A scale is computed once a block and passed on through shared memory. Without an
update and with `out` contiguous, rows do not matter: the weight is one flat run of blocks, whatever
K is. The lookup is in `kernels.nf4_tile`.

Thread instructions a weight (`python -m bench static`, bf16, nested): 4.0 plain, 7.5 merged at R = 16.
Source: arXiv:2305.14314, section 3.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastlora.kernels.launch import Launcher
from fastlora.kernels.lora_plan import interpreted
from fastlora.kernels.lora_tile import dot_bf16, top
from fastlora.kernels.nf4_tile import aligned, lookup, nf4_code, nf4_tile, operands
from fastlora.kernels.operands import Packed
from torch import Tensor

WORD = 8  # codes in 32 bits


@triton.jit
def _store(ptrs, value, mask, EVEN: tl.constexpr):
    """Store where the mask is true."""
    if EVEN:
        tl.store(ptrs, value)
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit
def _dot(b, a, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + b a. "split": two bf16 parts of each fp32 operand, 2**-15 from exact, for a result rounded to bf16."""
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
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, lora_a_ptr, lora_b_ptr, out_ptr,
    scaling, N, K, R,
    stride_ar, stride_ak, stride_bn, stride_br, stride_on,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    MERGE: tl.constexpr, LOOKUP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_R: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    in_rows = offs_n[:, None] < N
    code = nf4_code(code_ptr, LOOKUP)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
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
        first = offs_k // 8 * 8 if ALIGNED else offs_k  # a word is inside or outside as a whole, and so is its store
        out_mask = in_rows & (first[None, :] < left)
        _store(row_ptrs + offs_k[None, :], w.to(out_ptr.dtype.element_ty), out_mask, EVEN)


class DequantizeTile(NamedTuple):
    """How a launch is cut."""

    block_n: int
    block_k: int
    steps: int  # tiles of a row that a program takes, one after another
    warps: int
    block_r: int  # ranks a product on the tensor cores takes; a loop takes the rest


FLAT = DequantizeTile(1, 8192, 1, 4, 16)
SMALL = DequantizeTile(64, 64, 1, 8, 16)
_TILES = {  # for ranks up to 16, and for larger ones
    "none": (DequantizeTile(64, 128, 2, 4, 16),) * 2,
    "narrow": (DequantizeTile(32, 128, 4, 4, 16), DequantizeTile(64, 128, 2, 8, 16)),
    "split": (DequantizeTile(32, 128, 4, 4, 16), DequantizeTile(64, 128, 1, 4, 16)),
    "tf32x3": (DequantizeTile(32, 128, 2, 4, 16), DequantizeTile(64, 128, 1, 8, 16)),
    "ieee": (SMALL, SMALL),
}


def tile(precision: str, r: int, words: bool) -> DequantizeTile:
    """The tile of a launch that keeps rows, by how B A is multiplied ("none": not at all) and by its rank.

    words: whether weights can be taken eight at a time.
    """
    return _TILES[precision][r > 16] if words else SMALL


def precision(out: torch.dtype, adapter: torch.dtype) -> str:
    """How B A is multiplied: 16-bit adapters as they are, fp32 ones as exactly as `out` can show."""
    if adapter != torch.float32:
        return "narrow"
    return {torch.bfloat16: "split", torch.float16: "tf32x3"}.get(out, "ieee")


def _check_dequantize(weight: Packed, out: Tensor, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
    n, k = weight.shape
    if out.shape != (n, k):
        raise ValueError(f"out is {list(out.shape)}, but the weight is {[n, k]}")
    if k > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows; its strides are {out.stride()}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("merging takes lora_a and lora_b together")
    if lora_a is not None and lora_b is not None and (lora_a.shape[1] != k or lora_b.shape != (n, lora_a.shape[0])):
        raise ValueError(
            f"merging into [{n}, {k}] takes lora_a [R, {k}] and lora_b [{n}, R]; "
            f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
        )


def dequantize(
    weight: Packed, out: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 0.0
) -> None:
    """Fill `out` with the expanded weight, plus scaling · B A where adapters are given.

    Args:
        weight: [N, K].
        out: [N, K], bf16, fp16 or fp32, rows contiguous (a row stride above K is allowed).
        lora_a: [R, K]. lora_b: [N, R]. Any strides.
    Raises:
        ValueError: shapes do not fit together, or only one adapter is given.
    """
    _check_dequantize(weight, out, lora_a, lora_b)
    if lora_a is not None and lora_b is not None and lora_a.dtype != lora_b.dtype:
        adapters = torch.promote_types(lora_a.dtype, lora_b.dtype)
        lora_a, lora_b = lora_a.to(adapters), lora_b.to(adapters)
    fill(weight, out, lora_a, lora_b, scaling)


def fill(weight: Packed, out: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> None:
    """`dequantize` for operands that fit, adapters in one dtype."""
    n, k = weight.shape
    pointers = operands(weight)
    codes, out_dtype, row = weight.codes, out.dtype, out.stride(0)
    words, flat = aligned(codes, k, weight.blocksize), False
    if lora_a is not None and lora_b is not None:
        a, b, how, r = lora_a, lora_b, precision(out_dtype, lora_a.dtype), lora_a.shape[0]
        strides = *a.stride(), *b.stride()
    else:
        a = b = pointers[-1]
        how, r, strides = "none", 16, (16, 1, 16, 1)
        if out.is_contiguous() and aligned(codes, n * k, WORD):
            n, k, words, flat = 1, n * k, True, True
    cut = FLAT if flat else tile(how, r, words)
    _launcher(
        (n, k, r, how, words, flat, weight.blocksize, weight.absmax2 is not None, out_dtype, a.dtype, strides, row),
        (-(k // -(cut.steps * cut.block_k)), -(n // -cut.block_n)),
        (*pointers, a, b, out),
        (float(scaling), n, k, r, *strides, row),
    )


def _constants(
    n: int, k: int, r: int, how: str, words: bool, flat: bool, blocksize: int, nested: bool, *_: Any
) -> dict[str, Any]:
    cut, merges = FLAT if flat else tile(how, r, words), how != "none"
    return {
        "BLOCKSIZE": blocksize, "NESTED": nested, "ALIGNED": words,
        "EVEN": words and n % cut.block_n == 0 and k % (cut.steps * cut.block_k) == 0,
        "MERGE": merges, "LOOKUP": lookup(), "PRECISION": how, "INTERPRETED": interpreted(),
        "STEPS": cut.steps, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k,
        "BLOCK_R": cut.block_r, "WHOLE_R": not merges or r <= cut.block_r,
        "num_warps": cut.warps, "enable_fp_fusion": False,
    }  # fmt: skip


_launcher = Launcher(_nf4_dequantize_kernel, _constants)
