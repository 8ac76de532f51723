"""Expand NF4 to a dense weight in one launch, with the LoRA update merged in on request.

    W[n, k]  = code[q[n, k]] * scale[b],  b = (n K + k) // blocksize
    scale[b] = absmax[b], or code2[absmax_u8[b]] * absmax2[b // 256] + offset
    W'       = W + scaling · B A,  rounded once from fp32

Bytes: 0.516 read and 2 written per weight (bf16), 2.516 in all; the update adds R FMAs a weight on
the tensor cores. A program expands a tile [BLOCK_N, BLOCK_K]. Where rows hold whole blocks
(`ALIGNED`), a scale is fetched once a block; else every weight looks up its own byte and scale.
Both products round where bitsandbytes rounds them, so the launch switches FMA contraction off.

Source: arXiv:2305.14314, section 3. The 16-entry lookup is `tl.gather`: 6 instructions
a weight in all with triton 3.9, 9 with 3.6 (`python -m bench static`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NESTED_BLOCKSIZE = tl.constexpr(256)
BLOCK_N = 64
BLOCK_K = 128
MERGE_BLOCK_R = 32
NUM_WARPS = 8


@triton.jit
def _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED: tl.constexpr):
    """fp32 scale of each block index in `block`."""
    if NESTED:
        level = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(code2_ptr + level) * outer + offset
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return scale


@triton.jit
def _lookup(code, index, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """code[index] for index [BLOCK_N, COLUMNS] in 0..15."""
    return tl.reshape(tl.gather(code, tl.reshape(index, (BLOCK_N * COLUMNS,)), 0), (BLOCK_N, COLUMNS))


@triton.jit
def _tile_aligned(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_K] in fp32 where K is a multiple of the blocksize: whole bytes, a scale per block."""
    BLOCKS: tl.constexpr = BLOCK_K // BLOCKSIZE if BLOCK_K > BLOCKSIZE else 1
    offs_byte = k_start // 2 + tl.arange(0, BLOCK_K // 2)
    in_rows = offs_n[:, None] < N
    packed_mask = in_rows & (offs_byte[None, :] < K // 2)
    packed = tl.load(codes_ptr + offs_n[:, None] * (K // 2) + offs_byte[None, :], mask=packed_mask, other=0)
    packed = packed.to(tl.int32)
    column = k_start // BLOCKSIZE + tl.arange(0, BLOCKS)
    block = offs_n[:, None] * (K // BLOCKSIZE) + column[None, :]
    scale_mask = in_rows & (column[None, :] < K // BLOCKSIZE)
    scale = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, scale_mask, NESTED)
    high = _lookup(code, packed >> 4, BLOCK_N, BLOCK_K // 2)
    low = _lookup(code, packed & 15, BLOCK_N, BLOCK_K // 2)
    values = tl.reshape(tl.join(high, low), (BLOCK_N, BLOCKS, BLOCK_K // BLOCKS))
    return tl.reshape(values * scale[:, :, None], (BLOCK_N, BLOCK_K))


@triton.jit
def _tile_any(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_K] in fp32 for any K: blocks and even bytes may cross rows."""
    offs_k = k_start + tl.arange(0, BLOCK_K)
    mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    flat = offs_n[:, None] * K + offs_k[None, :]
    packed = tl.load(codes_ptr + flat // 2, mask=mask, other=0).to(tl.int32)
    index = tl.where(flat % 2 == 0, packed >> 4, packed & 15)
    scale = _scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, flat // BLOCKSIZE, mask, NESTED)
    return _lookup(code, index, BLOCK_N, BLOCK_K) * scale


@triton.jit
def _nf4_dequantize_kernel(
    codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, lora_a_ptr, lora_b_ptr, out_ptr,
    scaling, N, K, R,
    stride_ar, stride_ak, stride_bn, stride_br, stride_on,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, MERGE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_start = tl.program_id(1).to(tl.int64) * BLOCK_K
    offs_k = k_start + tl.arange(0, BLOCK_K)
    code = tl.load(code_ptr + tl.arange(0, 16))
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    if ALIGNED:
        w = _tile_aligned(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        w = _tile_any(
            codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
            BLOCKSIZE, NESTED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if MERGE:
        update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for r_start in range(0, R, BLOCK_R):
            offs_r = r_start + tl.arange(0, BLOCK_R)
            b = tl.load(
                lora_b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
                mask=(offs_n[:, None] < N) & (offs_r[None, :] < R),
                other=0.0,
            )
            a = tl.load(
                lora_a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak,
                mask=(offs_r[:, None] < R) & (offs_k[None, :] < K),
                other=0.0,
            )
            update = tl.dot(b, a, update, input_precision=PRECISION)
        w += update * scaling
    out_mask = (offs_n[:, None] < N) & (offs_k[None, :] < K)
    tl.store(out_ptr + offs_n[:, None] * stride_on + offs_k[None, :], w.to(out_ptr.dtype.element_ty), mask=out_mask)


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
) -> None:
    """Fill `out` with the expanded weight, plus scaling · B A where adapters are given.

    Args:
        codes: [ceil(N*K/2)], uint8. absmax: [blocks], fp32, or uint8 with absmax2, code2 and offset.
        code: [16], fp32, the levels, on the same device.
        out: [N, K], bf16, fp16 or fp32, rows contiguous (a row stride above K is allowed).
        lora_a: [R, K]. lora_b: [N, R]. Any strides.
    """
    n, k = out.shape
    merge = lora_a is not None and lora_b is not None
    a, b = (lora_a, lora_b) if lora_a is not None and lora_b is not None else (code.view(1, 16), code.view(1, 16))
    adapters = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(adapters), b.to(adapters)
    nested = absmax2 is not None
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K))
    with torch.cuda.device_of(out):
        _nf4_dequantize_kernel[grid](
            codes,
            absmax,
            absmax2 if nested else absmax,
            code2 if nested else code,
            offset if nested else code,
            code,
            a,
            b,
            out,
            scaling,
            n,
            k,
            a.shape[0],
            *a.stride(),
            *b.stride(),
            out.stride(0),
            BLOCKSIZE=blocksize,
            NESTED=nested,
            ALIGNED=k % blocksize == 0,
            MERGE=merge,
            PRECISION="ieee" if out.dtype == torch.float32 else "tf32x3",
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_R=min(MERGE_BLOCK_R, max(16, triton.next_power_of_2(a.shape[0]))),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
