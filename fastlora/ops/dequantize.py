"""NF4 expanded to a dense weight, with a LoRA update merged in on request: the operator, and its paths.

    W' = W + scaling · B A, rounded once from fp32

`nf4_dequantize` returns a tensor of its own; `nf4_expand` may return a scratch buffer, for use at once.
"""

import threading

import torch
from torch import Tensor

from fastlora import reference
from fastlora.kernels.operands import Packed
from fastlora.native import cpu
from fastlora.ops.autograd import seen_by_others
from fastlora.ops.backend import backend
from fastlora.ops.expanded import expanded


class _Scratch(threading.local):
    """One grow-only buffer a thread: page faults of fresh memory cost the CPU more than expanding a weight into it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """An uninitialised matrix, valid until the next call in this thread."""
        size = shape[0] * shape[1] * dtype.itemsize
        if self.bytes.numel() < size:
            self.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.bytes[:size].view(dtype).view(shape)


_scratch = _Scratch()

torch.library.define(
    "fastlora::nf4_dequantize",
    "(Tensor codes, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int k, int blocksize, "
    "ScalarType dtype, Tensor? lora_a=None, Tensor? lora_b=None, float scaling=0.0) -> Tensor",
)


@torch.library.impl("fastlora::nf4_dequantize", "CompositeExplicitAutograd")
def _nf4_dequantize(
    codes: Tensor, absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    n: int, k: int, blocksize: int, dtype: torch.dtype,
    lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 0.0,
) -> Tensor:  # fmt: skip
    weight = Packed(codes, absmax, (n, k), dtype, blocksize, absmax2, code2, offset)
    return _dequantize(weight, dtype, lora_a, lora_b, scaling, in_scratch=False)


@torch.library.register_fake("fastlora::nf4_dequantize")
def _nf4_dequantize_fake(codes, absmax, absmax2, code2, offset, n, k, blocksize, dtype, *_, **__):  # type: ignore[no-untyped-def]
    return codes.new_empty((n, k), dtype=dtype)


def _dequantize(
    weight: Packed, dtype: torch.dtype, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, in_scratch: bool
) -> Tensor:
    name = backend(weight.device).name
    if name == "torch":
        w = reference.nf4_dequantize(
            weight.codes,
            reference.nf4_scales(weight.absmax, weight.absmax2, weight.code2, weight.offset),
            weight.shape,
            weight.blocksize,
        )
        if lora_a is not None and lora_b is not None:
            w.addmm_(lora_b.float(), lora_a.float(), alpha=scaling)
        return w.to(dtype)
    if name == "cpp":
        out = (
            _scratch.matrix(weight.shape, dtype) if in_scratch else torch.empty(weight.shape, dtype=dtype, device="cpu")
        )
        a, b = (None if adapter is None else adapter.detach().float().contiguous() for adapter in (lora_a, lora_b))
        cpu.nf4_dequantize(weight, out, a, b, scaling)
        return out
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    fill(weight, out, lora_a, lora_b, scaling)
    return out


def fill(weight: Packed, out: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> None:
    """Write W, or W + scaling · B A, to `out` [N, K] with contiguous rows, by the Triton kernel."""
    from fastlora.kernels import nf4 as kernel

    if lora_a is not None and lora_b is not None and lora_a.dtype is not lora_b.dtype:
        kernel.dequantize(weight, out, lora_a, lora_b, scaling)
    else:
        kernel.fill(weight, out, lora_a, lora_b, scaling)


def nf4_dequantize(
    weight: Packed, dtype: torch.dtype, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 0.0
) -> Tensor:
    """W, or W + scaling · B A, as [N, K] in `dtype`, rounded once from fp32."""
    if seen_by_others(weight.codes, lora_a):
        return torch.ops.fastlora.nf4_dequantize(
            *weight.tensors(), *weight.shape, weight.blocksize, dtype, lora_a, lora_b, scaling
        )
    return _dequantize(weight, dtype, lora_a, lora_b, scaling, in_scratch=False)


def nf4_expand(
    weight: Packed, dtype: torch.dtype, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 0.0
) -> Tensor:
    """As `nf4_dequantize`, but below every operator, for use at once and for reading only.

    On a CPU the thread's next call may overwrite it; where `expanded` keeps weights, it may be one that was kept.
    """

    def expand(at_once: bool) -> Tensor:
        return _dequantize(weight, dtype, lora_a, lora_b, scaling, in_scratch=at_once)

    key = weight.codes.data_ptr(), lora_a is None, dtype, scaling
    return expanded(key, (weight.codes, weight.absmax), (lora_a, lora_b), expand)
