"""Which code runs where: Triton on CUDA devices, the compiled C++ library on the CPU, plain torch for the rest.

Nothing here asks a device anything at import. `FASTLORA_BACKEND=torch|cpp|triton|cuda` forces a path, for debugging:
`cuda` is the Triton path with the compiled decode kernel wherever that applies, `triton` the same without it. With
`TRITON_INTERPRET=1` the Triton kernels also run on CPU tensors.
"""

import functools
import threading

import torch
from torch import Tensor

from fastlora import reference
from fastlora.native import cpu
from fastlora.ops.backend import backend


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
