"""The compiled CPU library, called through ctypes: loading it, the checks all calls share, and NF4 weights.

The C++ side (`csrc/`) knows nothing of torch: it takes addresses and sizes, so one build serves every torch and Python.
The Python modules of this folder do the other half: they check every dtype, shape and layout before they pass an
address on, because after that a wrong one is a wild read. ctypes releases the GIL during a call, and no call keeps
state, so all functions can be used from several threads at once. Nothing is raised at import: `status()` says whether
the library is there and, if not, what to do.

The arithmetic is fp32 from the 4-bit codes to the one rounding at the end:

    dequantize   W[n, k] = code[q] * absmax[block]          8-bit absmax decoded in the same pass
    merge        W + scaling * (B A)                        in fp32, before the rounding
    gemv         y = x Wᵀ                                   [M, K] @ [K, N], the expanded W never in memory
    gemv_t       dx = dy W                                  [M, N] @ [N, K], likewise

`native.lora` has the low-rank products and the mask of dropout, `native.linear` has whole LoRA linears in bf16, and
`native.quantize` makes codes from a weight.

Two environment variables: `FASTLORA_CPU_ISA` (portable, avx2, avx512, avx512bf16), read once, forces an instruction
set; `CXX` chooses the compiler that `build()` uses. `python -m fastlora.native` compiles the library into the installed
package.

Source: arXiv:2305.14314, section 3.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlora.kernels.operands import Packed
from fastlora.native import build as native_build
from fastlora.native.weight import DTYPES, pointer_of, require, require_matrix, weight_of

ISAS = ("portable", "avx2", "avx512", "avx512bf16")

_NO_MEMORY = 1


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and what it is, or None and why there is none."""
    library, text = native_build.open_built(
        native_build.library_path(),
        native_build.find_compiler,
        lambda path: ctypes.CDLL(str(path)),
        lambda opened: opened.fastlora_abi_version(),
        native_build.ABI_VERSION,
    )
    if library is not None:
        _declare(library)
    return library, text


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, long, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    library.fastlora_threading.restype = ctypes.c_char_p
    library.fastlora_nf4_dequantize.argtypes = (
        pointer, pointer, pointer, long, number, pointer, integer, integer, integer,
    )  # fmt: skip
    product = (pointer, pointer, integer, long, pointer, integer, integer, integer)
    library.fastlora_nf4_gemv.argtypes = product
    library.fastlora_nf4_gemv_t.argtypes = product
    library.fastlora_nf4_quantize.argtypes = (pointer, integer, long, long, pointer, pointer, integer, integer)
    library.fastlora_nf4_quantize_scales.argtypes = (pointer, long, number, pointer, pointer, pointer, integer)
    library.fastlora_lora_shrink.argtypes = (
        pointer, pointer, pointer, long, long, long, number, pointer, integer, integer,
    )  # fmt: skip
    library.fastlora_lora_outer.argtypes = (
        pointer, pointer, pointer, long, number, pointer, long, long, integer, integer,
    )  # fmt: skip
    library.fastlora_dropout_mask.argtypes = (pointer, long, long, pointer, integer, integer, integer)
    library.fastlora_linear.argtypes = (pointer, pointer, long, long, pointer, pointer, pointer, integer, integer)
    library.fastlora_linear_backward.argtypes = (
        pointer, pointer, long, long, pointer, long, pointer, pointer, pointer, pointer, integer, integer,
    )  # fmt: skip


def isas() -> tuple[str, ...]:
    """The instruction sets usable here, slowest first; empty without the library."""
    library, _ = _load()
    return () if library is None else ISAS[: library.fastlora_best_isa() + 1]


def status() -> tuple[bool, str]:
    """Whether the compiled library is in use, with its path, instruction set and threads, or why not and what to do."""
    library, text = _load()
    if library is None:
        return False, text
    try:
        isa = ISAS[chosen_isa(library)]
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
    path = native_build.compile_library(native_build.library_path())
    _load.cache_clear()
    library, text = _load()
    if library is None:
        raise RuntimeError(text)
    return path


def nf4_dequantize(
    weight: Packed, out: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 0.0
) -> None:
    """out = W, or W + scaling * (B A), in fp32, rounded once to out's dtype, to nearest even.

    Without adapters the bits are those of bitsandbytes. All tensors are contiguous and on the CPU.

    Args:
        weight: [N, K].
        out: [N, K], fp32, bf16 or fp16; overwritten.
        lora_a, lora_b: [R, K] and [N, R], fp32, R >= 1; both or neither.
        scaling: the factor of B A.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    Source: arXiv:2305.14314, section 3.
    """
    lib = loaded()
    require_matrix("out", out)
    if tuple(out.shape) != weight.shape:
        raise ValueError(f"out is {list(out.shape)}, but the weight is {list(weight.shape)}")
    packed = weight_of(weight)
    R = _check_adapters(lora_a, lora_b, *weight.shape)
    isa = chosen_isa(lib)
    if out.numel() == 0:
        return
    raise_for_status(
        lib.fastlora_nf4_dequantize(
            ctypes.byref(packed), pointer_of(lora_a), pointer_of(lora_b), R, scaling, out.data_ptr(),
            DTYPES[out.dtype], isa, torch.get_num_threads(),
        )
    )  # fmt: skip


def nf4_gemv(x: Tensor, weight: Packed, out: Tensor) -> None:
    """out = x Wᵀ for few rows of x, read straight from the packed codes and accumulated in fp32.

    It is correct for any M, and fast up to about 16. The weight is not rounded to x's dtype first.

    Args:
        x: [M, K], fp32, bf16 or fp16.
        weight: [N, K].
        out: [M, N], fp32, bf16 or fp16; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    """
    lib = loaded()
    M = _require_product(x, out, *reversed(weight.shape))
    _run_product(lib, lib.fastlora_nf4_gemv, weight, x, M, out)


def nf4_gemv_t(dy: Tensor, weight: Packed, out: Tensor) -> None:
    """out = dy W, as backward needs it, for few rows of dy. The order of summation does not depend on the threads.

    Args:
        dy: [M, N], fp32, bf16 or fp16.
        weight: [N, K].
        out: [M, K], fp32, bf16 or fp16; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `status()`.
    """
    lib = loaded()
    M = _require_product(dy, out, *weight.shape)
    _run_product(lib, lib.fastlora_nf4_gemv_t, weight, dy, M, out)


def _run_product(lib: ctypes.CDLL, function, weight: Packed, x: Tensor, M: int, out: Tensor) -> None:  # type: ignore[no-untyped-def]
    isa = chosen_isa(lib)
    if out.numel() == 0:
        return
    raise_for_status(
        function(
            ctypes.byref(weight_of(weight)),
            x.data_ptr(),
            DTYPES[x.dtype],
            M,
            out.data_ptr(),
            DTYPES[out.dtype],
            isa,
            torch.get_num_threads(),
        )
    )


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it is not loaded; the message says why and what to do.
    """
    library, text = _load()
    if library is None:
        raise RuntimeError(f"fastlora's CPU library is not loaded: {text}")
    return library


@lru_cache(maxsize=1)
def chosen_isa(library: ctypes.CDLL) -> int:
    """The index in ISAS of the best instruction set of this machine, or of the one that FASTLORA_CPU_ISA names.

    The variable is read once: a look into the environment costs as much as half a small product.

    Raises:
        ValueError: it names none that this machine has.
    """
    best: int = library.fastlora_best_isa()
    name = os.environ.get("FASTLORA_CPU_ISA")
    if not name:
        return best
    if name not in ISAS[: best + 1]:
        raise ValueError(
            f"FASTLORA_CPU_ISA={name!r}: this machine has {', '.join(ISAS[: best + 1])}; set one or unset it"
        )
    return ISAS.index(name)


def raise_for_status(result: int) -> None:
    """Raises the error that a call's status stands for."""
    if result == _NO_MEMORY:
        raise MemoryError("fastlora's CPU library could not allocate its scratch buffer")
    if result != 0:
        raise RuntimeError(f"fastlora's CPU library returned {result}")


def _require_product(x: Tensor, out: Tensor, columns: int, out_columns: int) -> int:
    """The rows M of x [M, columns] and out [M, out_columns].

    Raises:
        ValueError: they have other shapes.
    """
    require_matrix("x", x)
    require_matrix("out", out)
    if x.shape[0] != out.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and out has {out.shape[0]}: they must have equally many")
    if x.shape[1] != columns or out.shape[1] != out_columns:
        raise ValueError(
            f"x {list(x.shape)} and out {list(out.shape)}: with this weight they must have {columns} and "
            f"{out_columns} columns"
        )
    return x.shape[0]


def _check_adapters(lora_a: Tensor | None, lora_b: Tensor | None, N: int, K: int) -> int:
    """The rank, 0 without adapters."""
    if lora_a is None and lora_b is None:
        return 0
    if lora_a is None or lora_b is None:
        raise ValueError("lora_a and lora_b go together: one of them is None")
    require("lora_a", lora_a, (torch.float32,))
    require("lora_b", lora_b, (torch.float32,))
    R = lora_a.shape[0] if lora_a.dim() else 0
    if R < 1 or lora_a.shape != (R, K) or lora_b.shape != (N, R):
        raise ValueError(
            f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit a weight of [{N}, {K}]: "
            f"expected [R, {K}] and [{N}, R] with R at least 1"
        )
    return R
