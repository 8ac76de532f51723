"""DoRA's row norms for one of peft's layers, kept until A, B or the weight changes.

A norm takes a pass over the whole weight; gradient accumulation, recomputation under checkpointing and evaluation
reuse it. A and B are compared with copies, because writes through `.data`, by bitsandbytes' optimizers and by FSDP
leave no trace on a tensor; such writes to the frozen weight are not noticed. On CUDA the device itself compares and
decides (`kernels.dora`). Where torch.compile or a dispatch mode must see everything, the norm is computed again.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops.autograd import seen_by_others
from fastlora.ops.dora import norms_by_kernel, row_norms, runs_kernels
from fastlora.ops.nf4 import NF4Weight


class KeptNorms:
    """The row norms of one layer, computed again when A, B, the weight or the scaling has changed."""

    def __init__(self) -> None:
        self._captured: list[Any] = []  # tensors that CUDA graphs will read again
        self.forget()

    def forget(self) -> None:
        """Compute them again at the next call."""
        self._weight: Tensor | None = None
        self._facts: tuple[Any, ...] = ()
        self._adapters: tuple[Tensor, ...] = ()
        self._norms: Tensor | None = None

    def of(self, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """‖W + scaling · B A‖: [N], fp32. For use at once: a later call may overwrite it."""
        frozen = weight.codes if isinstance(weight, NF4Weight) else weight
        if seen_by_others(frozen, None) or frozen.is_inference() or frozen.requires_grad:
            return row_norms(weight, lora_a, lora_b, scaling)
        by_kernels = runs_kernels(frozen)
        capturing = _is_capturing(frozen)
        if not (frozen.is_cpu or by_kernels):
            return row_norms(weight, lora_a, lora_b, scaling)
        facts = (frozen.data_ptr(), frozen.shape, frozen.stride(), frozen.dtype, frozen._version, scaling)
        adapters = (lora_a.detach(), lora_b.detach())
        same = self._norms is not None and self._facts == facts and self._fit(adapters)
        if by_kernels and same:
            if capturing:
                self._captured.append((self._weight, self._adapters, self._norms))
            return self._refreshed(weight, adapters, scaling)
        if capturing:  # what is computed now is there only once the graph runs
            return row_norms(weight, lora_a, lora_b, scaling)
        if not same or not self._same(adapters):
            self._weight, self._facts = frozen.detach(), facts  # held, so that its address is not reused
            with torch.inference_mode(False):  # training may need them later
                self._adapters = tuple(adapter.clone(memory_format=torch.contiguous_format) for adapter in adapters)
                self._norms = row_norms(weight, lora_a, lora_b, scaling)
        assert self._norms is not None
        return self._norms

    def _refreshed(self, weight: Tensor | NF4Weight, adapters: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """The norms, computed again by the device if it finds that A or B has changed."""
        from fastlora.kernels import dora as kernel

        assert self._norms is not None
        changed = torch.zeros(1, dtype=torch.int32, device=self._norms.device)
        for kept, now in zip(self._adapters, adapters, strict=True):
            kernel.refresh(now.contiguous(), kept, changed)
        norms_by_kernel(changed, weight, self._adapters, scaling, self._norms)
        return self._norms

    def _fit(self, adapters: tuple[Tensor, Tensor]) -> bool:
        pairs = zip(self._adapters, adapters, strict=True)
        return all(kept.dtype == now.dtype and kept.shape == now.shape for kept, now in pairs)

    def _same(self, adapters: tuple[Tensor, Tensor]) -> bool:
        pairs = zip(self._adapters, adapters, strict=True)
        return all(torch.equal(kept, now) for kept, now in pairs)

    def __getstate__(self) -> dict[str, Any]:
        return vars(KeptNorms())  # a copy's memory is elsewhere


def _is_capturing(frozen: Tensor) -> bool:
    return frozen.is_cuda and torch.cuda.is_current_stream_capturing()
