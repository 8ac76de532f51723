"""The low-rank products of LoRA and the mask of dropout in the compiled CPU library; see `native.cpu` on calls.

    lora_shrink  h = s (mask ∘ x) Aᵀ        [M, K] @ [K, R], x widened to fp32 only in the cache
    lora_outer   d = s gᵀ (mask ∘ x)        [R, M] @ [M, K], likewise

Source: arXiv:2106.09685, section 4.1.
"""

import ctypes

import torch
from torch import Tensor

from fastlora.native.cpu import chosen_isa, loaded, raise_for_status
from fastlora.native.weight import DTYPES, require_matrix
from fastlora.reference import dropout_threshold


class Activations(ctypes.Structure):
    """fastlora::Activations of csrc/lora.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class Dropout(ctypes.Structure):
    """fastlora::Dropout of csrc/lora.h."""

    _fields_ = (("seed", ctypes.c_uint64), ("threshold", ctypes.c_int32))


def lora_shrink(
    x: Tensor, lora_a: Tensor, out: Tensor, scaling: float = 1.0, seed: int | None = None, p: float = 0.0
) -> None:
    """out = scaling * (mask ∘ x) Aᵀ, accumulated in fp32; x is read once, in its own dtype.

    Given dy as x and `lora_b.t()` as lora_a it computes scaling * dy B. The bits do not depend on the thread count.

    Args:
        x: [M, K], fp32, bf16 or fp16; adjacent columns, any row stride.
        lora_a: [R, K], fp32, R >= 1; any strides. It is copied first if columns are not adjacent or K is not a
            multiple of 16.
        out: [M, R], fp32, contiguous; overwritten.
        seed, p: the mask is `reference.dropout_mask(seed, M, K, p)`, derived on the way. seed None: no mask, p unused.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout, the seed or p is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `native.cpu.status()`.
    Source: arXiv:2106.09685, section 4.1.
    """
    library = loaded()
    activations = activations_of(x)
    require_matrix("lora_a", lora_a, (torch.float32,), strided=True)
    require_matrix("out", out, (torch.float32,))
    (M, K), R = x.shape, lora_a.shape[0]
    if R < 1 or lora_a.shape[1] != K or out.shape != (M, R):
        raise ValueError(
            f"lora_a {list(lora_a.shape)} and out {list(out.shape)} do not fit x of [{M}, {K}]: "
            f"expected [R, {K}] and [{M}, R] with R at least 1"
        )
    dropout, isa = dropout_of(seed, p), chosen_isa(library)
    if M == 0:
        return
    raise_for_status(
        library.fastlora_lora_shrink(
            ctypes.byref(activations), _reference(dropout), lora_a.data_ptr(), R, *lora_a.stride(), scaling,
            out.data_ptr(), isa, torch.get_num_threads(),
        )
    )  # fmt: skip


def lora_outer(
    x: Tensor, g: Tensor, out: Tensor, scaling: float = 1.0, seed: int | None = None, p: float = 0.0
) -> None:
    """out = scaling * gᵀ (mask ∘ x), accumulated in fp32; x is read once, in its own dtype.

    Given g = dy B it computes dA; given dy as x, h as g and `d_lora_b.t()` as out it writes dB. The bits do not depend
    on the thread count.

    Args:
        x: [M, K], as in `lora_shrink`; M = 0 gives zeros.
        g: [M, R], fp32, contiguous, R >= 1.
        out: [R, K], fp32, any strides with which elements do not overlap; overwritten.
        seed, p: as in `lora_shrink`.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout, the seed or p is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `native.cpu.status()`.
    Source: arXiv:2106.09685, section 4.1.
    """
    library = loaded()
    activations = activations_of(x)
    require_matrix("g", g, (torch.float32,))
    require_matrix("out", out, (torch.float32,), strided=True)
    (M, K), R = x.shape, g.shape[1]
    if R < 1 or g.shape[0] != M or out.shape != (R, K):
        raise ValueError(
            f"g {list(g.shape)} and out {list(out.shape)} do not fit x of [{M}, {K}]: "
            f"expected [{M}, R] and [R, {K}] with R at least 1"
        )
    _require_own_places("out", out)
    dropout, isa = dropout_of(seed, p), chosen_isa(library)
    if K == 0:
        return
    raise_for_status(
        library.fastlora_lora_outer(
            ctypes.byref(activations),
            _reference(dropout),
            g.data_ptr(),
            R,
            scaling,
            out.data_ptr(),
            *out.stride(),
            isa,
            torch.get_num_threads(),
        )
    )


def dropout_mask(seed: int, p: float, out: Tensor) -> None:
    """out = `reference.dropout_mask(seed, rows, cols, p)`, rounded to out's dtype: the same bits, many times faster.

    Args:
        seed: 64 bits, signed or unsigned.
        p: the share of zeros, from 0 to 1, in steps of 2**-16; a p that rounds to 1 is refused.
        out: [rows, cols], fp32, bf16 or fp16, contiguous; overwritten.
    Raises:
        ValueError: out's dtype, shape, device or layout, the seed or p is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `native.cpu.status()`.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    library = loaded()
    require_matrix("out", out, tuple(DTYPES))
    dropout, isa = dropout_of(seed, p), chosen_isa(library)
    if out.numel() == 0:
        return
    raise_for_status(
        library.fastlora_dropout_mask(
            _reference(dropout), *out.shape, out.data_ptr(), DTYPES[out.dtype], isa, torch.get_num_threads()
        )
    )


def _require_own_places(name: str, tensor: Tensor) -> None:
    """Refuses strides with which two elements may share memory."""
    beyond = 1  # the least that the next stride must be
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < beyond:
            raise ValueError(
                f"{name} has strides {list(tensor.stride())}, with which elements overlap: pass a fresh tensor"
            )
        beyond += stride * max(0, size - 1)


def activations_of(x: Tensor) -> Activations:
    """x as the library takes it; it borrows the tensor's memory.

    Raises:
        ValueError: it is not a matrix of bf16, fp16 or fp32 on the CPU, or its columns are not adjacent.
    """
    require_matrix("x", x, strided=True)
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x has strides {list(x.stride())}, but its columns must be adjacent: pass x.contiguous()")
    return Activations(x.data_ptr(), *x.shape, x.stride(0), DTYPES[x.dtype])


def dropout_of(seed: int | None, p: float) -> Dropout | None:
    """The mask as the library takes it; None without a seed.

    Raises:
        ValueError: seed has more than 64 bits, or p rounds to 1 or is not a probability.
    """
    if seed is None:
        return None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 64 bits")
    if not 0.0 <= p < 1.0 or dropout_threshold(p) == 65536:
        raise ValueError(f"p is {p}, expected at least 0 and, in steps of 2**-16, below 1")
    return Dropout(seed % 2**64, dropout_threshold(p))


def _reference(structure: ctypes.Structure | None) -> object:
    return None if structure is None else ctypes.byref(structure)
