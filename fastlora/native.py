"""The compiled CPU library, called through ctypes: NF4 dequantize, merge, small-batch and low-rank products.

The C++ side (`csrc/`) knows nothing of torch: it takes addresses and sizes, so one build serves every torch and Python.
This module is the other half of that bargain: it checks every dtype, shape and layout before an address is passed on,
because past that point a wrong one is a wild read. ctypes releases the GIL during a call, and no call keeps state, so
all functions may be used from several threads at once. Nothing is raised at import: `status()` says whether the
library is there and, if not, what to do.

The arithmetic is fp32 from the 4-bit codes to the one rounding at the end:

    dequantize   W[n, k] = code[q] * absmax[block]          8-bit absmax decoded in the same pass
    merge        W + scaling * (B A)                        in fp32, before the rounding
    gemv         y = x Wᵀ                                   [M, K] @ [K, N], the expanded W never in memory
    gemv_t       dx = dy W                                  [M, N] @ [N, K], likewise
    lora_shrink  h = s (mask ∘ x) Aᵀ                        [M, K] @ [K, R], x widened to fp32 in the cache alone
    lora_outer   d = s gᵀ (mask ∘ x)                        [R, M] @ [M, K], likewise

Two environment variables: `FASTLORA_CPU_ISA` (portable, avx2, avx512) forces an instruction set; `CXX` chooses the
compiler `build()` uses. `python -m fastlora.native` compiles the library into the installed package.

Source: arXiv:2305.14314, section 3; arXiv:2106.09685, section 4.1.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlora import _build
from fastlora.reference import dropout_threshold

ISAS = ("portable", "avx2", "avx512")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_MEMORY = 1


class _Weight(ctypes.Structure):
    """fastlora::Nf4Weight of csrc/nf4.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax2", ctypes.c_void_p),
        ("code2", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("log2_blocksize", ctypes.c_int64),
    )


class _Activations(ctypes.Structure):
    """fastlora::Activations of csrc/lora.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class _Dropout(ctypes.Structure):
    """fastlora::Dropout of csrc/lora.h."""

    _fields_ = (("seed", ctypes.c_uint64), ("threshold", ctypes.c_int32))


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and what it is, or None and why not."""
    path = _build.library_path()
    if not path.is_file():
        try:
            _build.find_compiler()
        except _build.BuildError as error:
            return None, f"{path} has not been built: {error}"
        return None, f"{path} has not been built: run `{_build.REBUILD}`"
    try:
        library = ctypes.CDLL(str(path))
        version = library.fastlora_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): run `{_build.REBUILD}`"
    if version != _build.ABI_VERSION:
        return None, (
            f"{path} is stale: it has interface {version}, this fastlora needs {_build.ABI_VERSION}; "
            f"run `{_build.REBUILD}`"
        )
    _declare(library)
    return library, str(path)


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    weight = ctypes.POINTER(_Weight)
    library.fastlora_threading.restype = ctypes.c_char_p
    library.fastlora_nf4_dequantize.argtypes = (
        weight, pointer, pointer, long, ctypes.c_float, pointer, integer, integer, integer,
    )  # fmt: skip
    product = (weight, pointer, integer, long, pointer, integer, integer, integer)
    library.fastlora_nf4_gemv.argtypes = product
    library.fastlora_nf4_gemv_t.argtypes = product
    activations, dropout, scaling = ctypes.POINTER(_Activations), ctypes.POINTER(_Dropout), ctypes.c_float
    library.fastlora_lora_shrink.argtypes = (
        activations, dropout, pointer, long, long, long, scaling, pointer, integer, integer,
    )  # fmt: skip
    library.fastlora_lora_outer.argtypes = (
        activations, dropout, pointer, long, scaling, pointer, long, long, integer, integer,
    )  # fmt: skip
    library.fastlora_dropout_mask.argtypes = (dropout, long, long, pointer, integer, integer, integer)


def isas() -> tuple[str, ...]:
    """The instruction sets usable here, slowest first; empty without the library."""
    library, _ = _load()
    return () if library is None else ISAS[: library.fastlora_best_isa() + 1]


def status() -> tuple[bool, str]:
    """Whether the compiled library is in use, and its path, instruction set and threads, or why not and what to do."""
    library, text = _load()
    if library is None:
        return False, text
    try:
        isa = ISAS[_isa(library)]
    except ValueError as error:
        return False, str(error)
    threads = library.fastlora_threading().decode()
    return True, f"{text} ({isa}, {torch.get_num_threads()} threads by {threads})"


def build() -> Path:
    """Compiles the library into this installed package and loads it, in a few seconds.

    Returns:
        the library's path.
    Raises:
        RuntimeError: it cannot be compiled (no compiler, folder not writable), or what was compiled cannot be loaded.
    """
    path = _build.compile_library(_build.library_path())
    _load.cache_clear()
    library, text = _load()
    if library is None:
        raise RuntimeError(text)
    return path


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> None:
    """out = W, or W + scaling * (B A): in fp32, rounded once to out's dtype, to nearest even.

    Without adapters the bits are those of bitsandbytes. All tensors are contiguous and on the CPU.

    Args:
        codes: [ceil(N*K/2)], uint8, two codes a byte, the high nibble first; any shape of that size.
        absmax: [ceil(N*K/blocksize)], fp32, or uint8 when nested.
        absmax2, code2, offset: nested scales, fp32 of [ceil(blocks/256)], [256] and one element; None when plain.
        blocksize: a power of two, 32..4096.
        out: [N, K], fp32, bf16 or fp16; overwritten.
        lora_a, lora_b: [R, K] and [N, R], fp32, R >= 1; both or neither.
        scaling: the factor of B A.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    Source: arXiv:2305.14314, section 3.
    """
    library = _library()
    _require_matrix("out", out)
    N, K = out.shape
    weight = _weight(codes, absmax, absmax2, code2, offset, blocksize, N, K)
    R = _check_adapters(lora_a, lora_b, N, K)
    isa = _isa(library)
    if out.numel() == 0:
        return
    _check(
        library.fastlora_nf4_dequantize(
            weight,
            _pointer(lora_a),
            _pointer(lora_b),
            R,
            scaling,
            out.data_ptr(),
            _DTYPES[out.dtype],
            isa,
            torch.get_num_threads(),
        )
    )


def nf4_gemv(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """out = x Wᵀ for few rows of x, read straight from the packed codes and accumulated in fp32.

    Any M is right; up to about 16 it is the fast way. The weight is not rounded to x's dtype first.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        codes, absmax, absmax2, code2, offset, blocksize: as in `nf4_dequantize`.
        out: [M, N], fp32, bf16 or fp16; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    """
    library = _library()
    M, K, N = _product_shape(x, out)
    weight = _weight(codes, absmax, absmax2, code2, offset, blocksize, N, K)
    _run_product(library, library.fastlora_nf4_gemv, weight, x, M, out)


def nf4_gemv_t(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
) -> None:
    """out = dy W, the product backward needs, for few rows of dy. One order of summation whatever the threads.

    Args:
        dy: [M, N], fp32, bf16 or fp16.
        codes, absmax, absmax2, code2, offset, blocksize: as in `nf4_dequantize`.
        out: [M, K], fp32, bf16 or fp16; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    """
    library = _library()
    M, N, K = _product_shape(dy, out)
    weight = _weight(codes, absmax, absmax2, code2, offset, blocksize, N, K)
    _run_product(library, library.fastlora_nf4_gemv_t, weight, dy, M, out)


def lora_shrink(
    x: Tensor, lora_a: Tensor, out: Tensor, scaling: float = 1.0, seed: int | None = None, p: float = 0.0
) -> None:
    """out = scaling * (mask ∘ x) Aᵀ, accumulated in fp32; x is read once, in its own dtype.

    With dy for x and `lora_b.t()` for lora_a it is scaling * dy B. The bits do not depend on the number of threads.

    Args:
        x: [M, K], fp32, bf16 or fp16; columns next to one another, rows any stride apart.
        lora_a: [R, K], fp32, R >= 1; any strides. Where columns are not next to one another, or K is no multiple
            of 16, it is first copied.
        out: [M, R], fp32, contiguous; overwritten.
        seed, p: the mask is `reference.dropout_mask(seed, M, K, p)`, derived on the way. seed None: no mask, p unused.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout, the seed or p is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    Source: arXiv:2106.09685, section 4.1.
    """
    library = _library()
    activations = _activations(x)
    _require_matrix("lora_a", lora_a, (torch.float32,), strided=True)
    _require_matrix("out", out, (torch.float32,))
    (M, K), R = x.shape, lora_a.shape[0]
    if R < 1 or lora_a.shape[1] != K or out.shape != (M, R):
        raise ValueError(
            f"lora_a {list(lora_a.shape)} and out {list(out.shape)} do not fit x of [{M}, {K}]: "
            f"expected [R, {K}] and [{M}, R] with R at least 1"
        )
    dropout, isa = _dropout(seed, p), _isa(library)
    if M == 0:
        return
    _check(
        library.fastlora_lora_shrink(
            activations, dropout, lora_a.data_ptr(), R, *lora_a.stride(), scaling, out.data_ptr(), isa,
            torch.get_num_threads(),
        )
    )  # fmt: skip


def lora_outer(
    x: Tensor, g: Tensor, out: Tensor, scaling: float = 1.0, seed: int | None = None, p: float = 0.0
) -> None:
    """out = scaling * gᵀ (mask ∘ x), accumulated in fp32; x is read once, in its own dtype.

    With g = dy B it is dA; with dy for x, h for g and `d_lora_b.t()` for out it writes dB. The bits do not depend on
    the number of threads.

    Args:
        x: [M, K], as in `lora_shrink`; M = 0 gives zeros.
        g: [M, R], fp32, contiguous, R >= 1.
        out: [R, K], fp32, any strides that give each element its own place; overwritten.
        seed, p: as in `lora_shrink`.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout, the seed or p is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    Source: arXiv:2106.09685, section 4.1.
    """
    library = _library()
    activations = _activations(x)
    _require_matrix("g", g, (torch.float32,))
    _require_matrix("out", out, (torch.float32,), strided=True)
    (M, K), R = x.shape, g.shape[1]
    if R < 1 or g.shape[0] != M or out.shape != (R, K):
        raise ValueError(
            f"g {list(g.shape)} and out {list(out.shape)} do not fit x of [{M}, {K}]: "
            f"expected [{M}, R] and [R, {K}] with R at least 1"
        )
    _require_own_places("out", out)
    dropout, isa = _dropout(seed, p), _isa(library)
    if K == 0:
        return
    _check(
        library.fastlora_lora_outer(
            activations, dropout, g.data_ptr(), R, scaling, out.data_ptr(), *out.stride(), isa, torch.get_num_threads()
        )
    )


def dropout_mask(seed: int, p: float, out: Tensor) -> None:
    """out = `reference.dropout_mask(seed, rows, cols, p)`, rounded to out's dtype: the same bits, many times as fast.

    Args:
        seed: 64 bits, signed or unsigned.
        p: the share of zeros, from 0 to 1, in steps of 2**-16; a p that rounds to 1 is refused.
        out: [rows, cols], fp32, bf16 or fp16, contiguous; overwritten.
    Raises:
        ValueError: out's dtype, shape, device or layout, the seed or p is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    library = _library()
    _require_matrix("out", out, tuple(_DTYPES))
    dropout, isa = _dropout(seed, p), _isa(library)
    if out.numel() == 0:
        return
    _check(
        library.fastlora_dropout_mask(
            dropout, *out.shape, out.data_ptr(), _DTYPES[out.dtype], isa, torch.get_num_threads()
        )
    )


def _run_product(library: ctypes.CDLL, function, weight: _Weight, x: Tensor, M: int, out: Tensor) -> None:  # type: ignore[no-untyped-def]
    isa = _isa(library)
    if out.numel() == 0:
        return
    _check(
        function(
            weight, x.data_ptr(), _DTYPES[x.dtype], M, out.data_ptr(), _DTYPES[out.dtype], isa, torch.get_num_threads()
        )
    )


def _library() -> ctypes.CDLL:
    library, text = _load()
    if library is None:
        raise RuntimeError(f"fastlora's CPU library is not loaded: {text}")
    return library


def _isa(library: ctypes.CDLL) -> int:
    best: int = library.fastlora_best_isa()
    name = os.environ.get("FASTLORA_CPU_ISA")
    if not name:
        return best
    if name not in ISAS[: best + 1]:
        raise ValueError(
            f"FASTLORA_CPU_ISA={name!r}: this machine has {', '.join(ISAS[: best + 1])}; set one or unset it"
        )
    return ISAS.index(name)


def _check(result: int) -> None:
    if result == _NO_MEMORY:
        raise MemoryError("fastlora's CPU library: no memory for its scratch buffer")
    if result != 0:
        raise RuntimeError(f"fastlora's CPU library returned {result}")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _require(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int | None = None, strided: bool = False
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; this library is for CPU tensors: move it with .cpu()")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, expected {numel}")


def _require_matrix(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(_DTYPES), strided: bool = False
) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected two dimensions")
    _require(name, tensor, dtypes, strided=strided)


def _require_own_places(name: str, tensor: Tensor) -> None:
    """Refuses strides by which two elements might share memory."""
    beyond = 1  # what the next stride must at least be
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < beyond:
            raise ValueError(f"{name} has strides {list(tensor.stride())}, its elements overlap: pass a fresh tensor")
        beyond += stride * max(0, size - 1)


def _activations(x: Tensor) -> _Activations:
    _require_matrix("x", x, strided=True)
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x has strides {list(x.stride())}, its columns must be next to one another: x.contiguous()")
    return _Activations(x.data_ptr(), *x.shape, x.stride(0), _DTYPES[x.dtype])


def _dropout(seed: int | None, p: float) -> _Dropout | None:
    if seed is None:
        return None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 64 bits")
    if not 0.0 <= p < 1.0 or dropout_threshold(p) == 65536:
        raise ValueError(f"p is {p}, expected at least 0 and, in steps of 2**-16, below 1")
    return _Dropout(seed % 2**64, dropout_threshold(p))


def _product_shape(x: Tensor, out: Tensor) -> tuple[int, int, int]:
    _require_matrix("x", x)
    _require_matrix("out", out)
    if x.shape[0] != out.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and out {out.shape[0]}: they must have as many")
    return x.shape[0], x.shape[1], out.shape[1]


def _check_adapters(lora_a: Tensor | None, lora_b: Tensor | None, N: int, K: int) -> int:
    """The rank, 0 without adapters."""
    if lora_a is None and lora_b is None:
        return 0
    if lora_a is None or lora_b is None:
        raise ValueError("lora_a and lora_b go together: one of them is None")
    _require("lora_a", lora_a, (torch.float32,))
    _require("lora_b", lora_b, (torch.float32,))
    R = lora_a.shape[0] if lora_a.dim() else 0
    if R < 1 or lora_a.shape != (R, K) or lora_b.shape != (N, R):
        raise ValueError(
            f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit a weight of [{N}, {K}]: "
            f"expected [R, {K}] and [{N}, R] with R at least 1"
        )
    return R


def _weight(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    N: int,
    K: int,
) -> _Weight:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"blocksize is {blocksize}, expected a power of two from 32 to 4096")
    blocks = -(-N * K // blocksize)
    _require("codes", codes, (torch.uint8,), (N * K + 1) // 2)
    if absmax2 is None and code2 is None and offset is None:
        _require("absmax", absmax, (torch.float32,), blocks)
    elif absmax2 is None or code2 is None or offset is None:
        raise ValueError("absmax2, code2 and offset go together: pass all three (nested scales) or none (plain)")
    else:
        _require("absmax", absmax, (torch.uint8,), blocks)
        _require("absmax2", absmax2, (torch.float32,), -(-blocks // 256))
        _require("code2", code2, (torch.float32,), 256)
        _require("offset", offset, (torch.float32,), 1)
    return _Weight(
        codes.data_ptr(), absmax.data_ptr(), _pointer(absmax2), _pointer(code2), _pointer(offset), N, K,
        blocksize.bit_length() - 1,
    )  # fmt: skip


if __name__ == "__main__":
    build()
    print(status()[1])
