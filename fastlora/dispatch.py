"""Which code runs where: Triton on CUDA devices, the compiled C++ library on the CPU, plain torch for the rest.

Nothing here asks a device anything at import. `FASTLORA_BACKEND=torch|cpp|triton|cuda` forces a path, for debugging:
`cuda` is the Triton path with the compiled decode kernel wherever that applies, `triton` the same without it. With
`TRITON_INTERPRET=1` the Triton kernels also run on CPU tensors.
"""

import functools
import os
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora import reference
from fastlora.native import cpu

MIN_CAPABILITY = (8, 0)
FORCED = ("triton", "cuda", "cpp", "torch")


class Backend(NamedTuple):
    """The code that runs on a device, and why that and no other."""

    name: str  # "triton", "cpp" or "torch"
    reason: str


def backend(device: torch.device | str) -> Backend:
    """The path taken on `device`, with the reason, which names what is missing where it is the slow one.

    Raises:
        ValueError: FASTLORA_BACKEND names no backend, or one that cannot run there.
    """
    device = torch.device(device)
    return _backend(device.type, device.index, os.environ.get("FASTLORA_BACKEND", ""))


@functools.cache
def _backend(device_type: str, index: int | None, forced: str) -> Backend:
    if forced:
        if forced not in FORCED:
            raise ValueError(f"FASTLORA_BACKEND must be one of {', '.join(FORCED)}; got {forced!r}")
        if reason := _missing(forced, device_type, index):
            raise ValueError(f"FASTLORA_BACKEND={forced} cannot run on {device_type}: {reason}")
        if forced == "cuda":
            return Backend("triton", "Triton kernels, compiled decode kernel: forced by FASTLORA_BACKEND")
        return Backend(forced, "forced by FASTLORA_BACKEND")
    fast = "triton" if device_type == "cuda" else "cpp"
    if reason := _missing(fast, device_type, index):
        return Backend("torch", f"slow path: {reason}")
    if fast == "cpp":
        return Backend("cpp", cpu.status()[1])
    reason = _missing("cuda", device_type, index)
    return Backend("triton", f"Triton kernels, decode too: {reason}" if reason else "Triton kernels, compiled decode")


def _missing(name: str, device_type: str, index: int | None) -> str:
    """Why a path cannot be taken on a device; empty where it can."""
    if name == "torch":
        return ""
    if name == "cpp":
        return _no_cpp(device_type)
    if (reason := _no_triton(device_type, index)) or name == "triton":
        return reason
    from fastlora.kernels import choice

    live, reason = choice.compiled_decode(torch.device(device_type))
    return "" if live else reason


def _no_triton(device_type: str, index: int | None) -> str:
    """Why the Triton kernels cannot run on a device; empty where they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    if triton.knobs.runtime.interpret:
        return ""
    if device_type != "cuda":
        return "the Triton kernels need a CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return ""


def _no_cpp(device_type: str) -> str:
    """Why the C++ library cannot run on a device; empty where it can."""
    if device_type != "cpu":
        return f"no fastlora kernels for {device_type!r} devices"
    loaded, reason = cpu.status()
    return "" if loaded else reason


@functools.cache
def level_table(device: torch.device) -> Tensor:
    """The sixteen NF4 levels on a device: [16], fp32. One small copy per device, made at first use."""
    return torch.tensor(reference.NF4_CODE, dtype=torch.float32, device=device)


class _Scratch(threading.local):
    """One grow-only buffer a thread: fresh memory costs the CPU more in page faults than expanding a weight into it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def matrix(self, n: int, k: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised [n, k], valid until the next call in this thread."""
        size = n * k * dtype.itemsize
        if self.bytes.numel() < size:
            self.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.bytes[:size].view(dtype).view(n, k)


_scratch = _Scratch()

torch.library.define(
    "fastlora::nf4_dequantize",
    "(Tensor codes, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int k, int blocksize, "
    "ScalarType dtype, Tensor? lora_a=None, Tensor? lora_b=None, float scaling=0.0) -> Tensor",
)


@torch.library.impl("fastlora::nf4_dequantize", "CompositeExplicitAutograd")
def _nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    n: int,
    k: int,
    blocksize: int,
    dtype: torch.dtype,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    name = backend(codes.device).name
    if name == "torch":
        scales = reference.nf4_scales(absmax, absmax2, code2, offset)
        w = reference.nf4_dequantize(codes, scales, (n, k), blocksize)
        if lora_a is not None and lora_b is not None:
            w.addmm_(lora_b.float(), lora_a.float(), alpha=scaling)
        return w.to(dtype)
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    if name == "cpp":
        _expand_with_cpp(codes, absmax, absmax2, code2, offset, blocksize, out, lora_a, lora_b, scaling)
        return out
    from fastlora.kernels import nf4 as kernel

    kernel.dequantize(
        codes, absmax, absmax2, code2, offset, level_table(codes.device), blocksize, out, lora_a, lora_b, scaling
    )
    return out


def _expand_with_cpp(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    out: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> None:
    a, b = (None if adapter is None else adapter.detach().float().contiguous() for adapter in (lora_a, lora_b))
    cpu.nf4_dequantize(codes, absmax, absmax2, code2, offset, blocksize, out, a, b, scaling)


@torch.library.register_fake("fastlora::nf4_dequantize")
def _nf4_dequantize_fake(codes, absmax, absmax2, code2, offset, n, k, blocksize, dtype, *_, **__):  # type: ignore[no-untyped-def]
    return codes.new_empty((n, k), dtype=dtype)


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    n: int,
    k: int,
    blocksize: int,
    dtype: torch.dtype,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """W, or W + scaling · B A, as [n, k] in `dtype`, rounded once from fp32. The arguments are those of `NF4Weight`."""
    return torch.ops.fastlora.nf4_dequantize(
        codes, absmax, absmax2, code2, offset, n, k, blocksize, dtype, lora_a, lora_b, scaling
    )


def nf4_expand(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    n: int,
    k: int,
    blocksize: int,
    dtype: torch.dtype,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """As `nf4_dequantize`, for use at once: on the CPU the result is overwritten by the thread's next call."""
    if backend(codes.device).name != "cpp":
        return nf4_dequantize(codes, absmax, absmax2, code2, offset, n, k, blocksize, dtype, lora_a, lora_b, scaling)
    out = _scratch.matrix(n, k, dtype)
    _expand_with_cpp(codes, absmax, absmax2, code2, offset, blocksize, out, lora_a, lora_b, scaling)
    return out
