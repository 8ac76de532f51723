"""What DoRA adds to a LoRA linear: the norms of rows, and a factor for each output.

    norms    ‖W[n] + scaling · (B A)[n]‖                          W: NF4 or dense, expanded tile by tile
    scales   absmax'[b] = scale[b] · factor[row of b]             an NF4 weight whose rows carry the factor
    rescale  y = factor ∘ z + bias
    backward dz = factor ∘ dy,  dot = Σ_m dy ∘ z,  total = Σ_m dy

Bytes: norms 0.516 for an NF4 weight or 2 for a bf16 one, and none where A and B have not changed since the last call;
scales 5 for 64 weights; rescale 2 read and 2 written an output; backward 4 read and 2 written; each of them once.

The norms are computed again only when A or B has changed, and the device finds that out: `refresh` compares them with
copies, updates the copies and sets a `changed` flag; `row_norms` reads the flag first. Nothing waits for the host, and
every kind of write is seen, including those of optimizers and FSDP. B A is computed `WIDTH` ranks at a time, as three
tf32 products.

Source: arXiv:2402.09353, section 4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels.launch import Launcher
from fastlora.kernels.lora_plan import LONGEST_SUM, interpreted
from fastlora.kernels.nf4_tile import aligned, block_scales, lookup, nf4_code, nf4_tile, operands
from fastlora.kernels.operands import Packed
from torch import Tensor

BLOCK_N, BLOCK_K, WIDTH = 16, 128, 16  # of a tile of the norms
ROWS, COLUMNS = 32, 128  # of a tile of an activation
BLOCK = 1024
PROGRAMS_PER_SM = 4


@triton.jit
def _refresh_kernel(new_ptr, kept_ptr, changed_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    new = tl.load(new_ptr + offs, mask=offs < size, other=0.0)
    kept = tl.load(kept_ptr + offs, mask=offs < size, other=0.0)
    same = (new == kept) | ((new != new) & (kept != kept))
    if tl.min(same.to(tl.int32), 0) == 0:
        tl.store(changed_ptr, 1)
        tl.store(kept_ptr + offs, new, mask=offs < size)


@triton.jit(do_not_specialize_on_alignment=["codes_ptr"])
def _row_norms_kernel(
    changed_ptr, weight_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, code_ptr, a_ptr, b_ptr, out_ptr,
    scaling, N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    DENSE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr, LOOKUP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_end = tl.where(tl.load(changed_ptr) != 0, K, 0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if not DENSE:
        code = nf4_code(code_ptr, LOOKUP)
        offset = 0.0
        if NESTED:
            offset = tl.load(offset_ptr)
    for k_start in range(0, k_end, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        in_tile = (offs_n[:, None] < N) & (offs_k[None, :] < K)
        if DENSE:
            w_ptrs = weight_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
            w = tl.load(w_ptrs, mask=in_tile, other=0.0).to(tl.float32)
        else:
            w = nf4_tile(
                codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset, code, offs_n, k_start, N, K,
                BLOCKSIZE, NESTED, ALIGNED, LOOKUP, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for r_start in range(0, R, WIDTH):
            offs_r = r_start + tl.arange(0, WIDTH)
            a_ptrs = a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak
            a = tl.load(a_ptrs, mask=(offs_r[:, None] < R) & (offs_k[None, :] < K), other=0.0).to(tl.float32)
            b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
            b = tl.load(b_ptrs, mask=(offs_n[:, None] < N) & (offs_r[None, :] < R), other=0.0).to(tl.float32)
            update = tl.dot(b, a, update, input_precision=PRECISION)  # [BLOCK_N, WIDTH] @ [WIDTH, BLOCK_K]
        merged = tl.where(in_tile, w + scaling * update, 0.0)
        total += tl.sum(merged * merged, 1)
    tl.store(out_ptr + offs_n, tl.sqrt(total), mask=offs_n < tl.where(k_end > 0, N, 0))


@triton.jit
def _scaled_absmax_kernel(
    absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, factor_ptr, out_ptr, blocks, blocks_a_row,
    NESTED: tl.constexpr, LOOKUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = block < blocks
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr)
    scale = block_scales(absmax_ptr, absmax2_ptr, code2_ptr, offset, block, mask, NESTED, LOOKUP, False)
    factor = tl.load(factor_ptr + block // blocks_a_row, mask=mask, other=0.0)
    tl.store(out_ptr + block, scale * factor, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rescale_kernel(
    z_ptr, factor_ptr, bias_ptr, y_ptr, M, N, stride_zm, stride_zn,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    z = tl.load(z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :] * stride_zn, mask=mask, other=0.0).to(tl.float32)
    y = z * tl.load(factor_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rescale_backward_kernel(
    dy_ptr, z_ptr, factor_ptr, dz_ptr, dot_ptr, total_ptr,
    M, N, m_per_split, stride_dm, stride_dn, stride_zm, stride_zn,
    NEED_DZ: tl.constexpr, NEED_DOT: tl.constexpr, NEED_TOTAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_n = offs_n < N
    dot = tl.zeros((COLUMNS,), dtype=tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    if NEED_DZ:
        factor = tl.load(factor_ptr + offs_n, mask=in_n, other=0.0)[None, :]
    for m_start in range(split * m_per_split, tl.minimum(split * m_per_split + m_per_split, M), ROWS):
        offs_m = m_start + tl.arange(0, ROWS)
        mask = (offs_m[:, None] < M) & in_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if NEED_DZ:
            dz_ptrs = dz_ptr + offs_m[:, None] * N + offs_n[None, :]
            tl.store(dz_ptrs, (dy * factor).to(dz_ptr.dtype.element_ty), mask=mask)
        if NEED_DOT:
            z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :] * stride_zn
            dot += tl.sum(dy * tl.load(z_ptrs, mask=mask, other=0.0).to(tl.float32), 0)
        if NEED_TOTAL:
            total += tl.sum(dy, 0)
    if NEED_DOT:
        tl.store(dot_ptr + split * N + offs_n, dot, mask=in_n)
    if NEED_TOTAL:
        tl.store(total_ptr + split * N + offs_n, total, mask=in_n)


def refresh(new: Tensor, kept: Tensor, changed: Tensor) -> None:
    """Where `new` differs from `kept`, set changed [1], int32, to 1 and update `kept`. Both are contiguous."""
    size = new.numel()
    if size:
        _refresh_launcher((size, new.dtype), (triton.cdiv(size, BLOCK),), (new, kept, changed), (size,))


def row_norms(
    changed: Tensor, weight: Tensor | Packed, lora_a: Tensor, lora_b: Tensor, scaling: float, out: Tensor
) -> None:
    """Write ‖W + scaling · B A‖ of each row to `out` [N], fp32, if `changed` [1] is not 0; else write nothing.

    Args:
        weight: [N, K], packed, or dense of any strides.
        lora_a: [R, K]. lora_b: [N, R]. Any strides.
    """
    n, k = lora_b.shape[0], lora_a.shape[1]
    packed, r = isinstance(weight, Packed), lora_a.shape[0]
    dense = lora_a if isinstance(weight, Packed) else weight
    six = operands(weight) if isinstance(weight, Packed) else (changed,) * 6
    facts = False, 64, False
    if isinstance(weight, Packed):
        facts = weight.nested, weight.blocksize, aligned(weight.codes, k, weight.blocksize)
    strides = *dense.stride(), *lora_a.stride(), *lora_b.stride()
    if n:
        _row_norms_launcher(
            (
                packed,
                *facts,
                n,
                k,
                r,
                strides,
                dense.dtype,
                six[1].dtype,
                lora_a.dtype,
                lora_b.dtype,
                lookup(out.device),
            ),
            (triton.cdiv(n, BLOCK_N),),
            (changed, dense, *six, lora_a, lora_b, out),
            (float(scaling), n, k, r, *strides),
        )


def _row_norms_constants(
    packed: bool, nested: bool, blocksize: int, words: bool, n: int, k: int, *rest: Any
) -> dict[str, Any]:
    block_k, warps = (BLOCK_K, 4) if k % 16 == 0 else (BLOCK_K // 2, 8)  # an address for each value takes registers
    return {
        "DENSE": not packed, "BLOCKSIZE": blocksize, "NESTED": nested, "ALIGNED": words, "LOOKUP": rest[-1],
        "PRECISION": "ieee" if interpreted() else "tf32x3", "BLOCK_N": BLOCK_N, "BLOCK_K": block_k, "WIDTH": WIDTH,
        "num_warps": warps, "enable_fp_fusion": False,
    }  # fmt: skip


def scaled_absmax(weight: Packed, factor: Tensor) -> Tensor:
    """Every block's scale times the factor of its row: [blocks], fp32.

    Args:
        weight: [N, K], whose rows hold whole blocks. factor: [N], fp32.
    """
    out = torch.empty(weight.absmax.numel(), dtype=torch.float32, device=weight.device)
    _, absmax, absmax2, code2, offset, _ = operands(weight)
    size, blocks = out.numel(), weight.shape[1] // weight.blocksize
    if size:
        key = weight.nested, lookup(out.device), size, blocks, absmax.dtype
        pointers = absmax, absmax2, code2, offset, factor, out
        _scaled_absmax_launcher(key, (triton.cdiv(size, BLOCK),), pointers, (size, blocks))
    return out


def rescale(z: Tensor, factor: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """factor ∘ z + bias, in fp32. z: [M, N], any strides; factor: [N], fp32; bias: [N]. Returns [M, N] in `dtype`."""
    m, n = z.shape
    y = torch.empty(m, n, dtype=dtype, device=z.device)
    if m and n:
        bias = factor if (plain := bias is None) else bias.contiguous()
        key = not plain, m, n, z.stride(), z.dtype, factor.dtype, bias.dtype, dtype
        grid = triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS)
        _rescale_launcher(key, grid, (z, factor, bias, y), (m, n, *z.stride()))
    return y


def rescale_backward(
    dy: Tensor, z: Tensor | None, factor: Tensor | None, need_total: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(factor ∘ dy [M, N] in `dtype`, Σ_m dy ∘ z [N], Σ_m dy [N]), the sums in fp32; None without factor, z or
    `need_total`."""
    m, n = dy.shape
    rows = ROWS if n % 16 == 0 else ROWS // 2  # an address for each value takes registers
    tiles, steps = triton.cdiv(n, COLUMNS), triton.cdiv(m, rows)
    wanted = 8
    if dy.is_cuda:
        wanted = PROGRAMS_PER_SM * torch.cuda.get_device_properties(dy.device).multi_processor_count
    splits = max(1, triton.cdiv(m, LONGEST_SUM), min(steps, wanted // tiles))
    per_split = triton.cdiv(steps, splits) * rows
    splits = triton.cdiv(m, per_split)
    dz = torch.empty(m, n, dtype=dtype, device=dy.device) if factor is not None else None
    dot = torch.empty(splits, n, dtype=torch.float32, device=dy.device) if z is not None else None
    total = torch.empty(splits, n, dtype=torch.float32, device=dy.device) if need_total else None
    if m and n:
        needs, nothing = (dz is not None, dot is not None, total is not None), dy
        pointers = tuple(nothing if each is None else each for each in (dy, z, factor, dz, dot, total))
        strides = *dy.stride(), *(dy if z is None else z).stride()
        key = needs, rows, m, n, per_split, strides, *(each.dtype for each in pointers)
        _rescale_backward_launcher(key, (tiles, splits), pointers, (m, n, per_split, *strides))
    return dz, None if dot is None else dot.sum(0), None if total is None else total.sum(0)


def _rescale_backward_constants(needs: tuple[bool, bool, bool], rows: int, *_: Any) -> dict[str, Any]:
    return {**dict(zip(("NEED_DZ", "NEED_DOT", "NEED_TOTAL"), needs, strict=True)), "ROWS": rows, "COLUMNS": COLUMNS}


_refresh_launcher = Launcher(_refresh_kernel, lambda *_: {"BLOCK": BLOCK})
_row_norms_launcher = Launcher(_row_norms_kernel, _row_norms_constants)
_scaled_absmax_launcher = Launcher(
    _scaled_absmax_kernel,
    lambda nested, how, *_: {"NESTED": nested, "LOOKUP": how, "BLOCK": BLOCK, "enable_fp_fusion": False},
)
_rescale_launcher = Launcher(
    _rescale_kernel, lambda has_bias, *_: {"HAS_BIAS": has_bias, "ROWS": ROWS, "COLUMNS": COLUMNS}
)
_rescale_backward_launcher = Launcher(_rescale_backward_kernel, _rescale_backward_constants)
