"""Tensors that wait in pinned host memory between forward and backward, copied on a stream of their own.

    forward   a copy to the host is queued behind what made the tensor, and its memory is free once that is done
    backward  a tensor is copied back when it is asked for, and then the one packed before it, for which backward will
              ask next

Made for the inputs of checkpointed layers, one a layer: the copies then take place while layers compute.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20


class _Waiting:
    """One tensor on the host. previous: the one packed before it."""

    def __init__(self, tensor: Tensor, previous: "_Waiting | None") -> None:
        self._device, self._previous = tensor.device, None if previous is None else weakref.ref(previous)
        self._back: tuple[Tensor, Any] | None = None  # a copy that is under way, and its event
        cuda = tensor.is_cuda
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda, device="cpu")
        if not cuda:
            self._host.copy_(tensor)
            return
        stream = _stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Begin to copy it back, unless that has begun."""
        if self._back is not None:
            return
        if self._device.type != "cuda":
            self._back = self._host.clone(), None
            return
        stream = _stream(self._device)
        with torch.cuda.stream(stream):
            back = torch.empty_like(self._host, device=self._device, pin_memory=False)
            back.copy_(self._host, non_blocking=True)
            self._back = back, stream.record_event()

    def take(self) -> Tensor:
        """The tensor on its device; the one before it is on its way."""
        self.fetch()
        assert self._back is not None
        back, event = self._back
        self._back = None
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            back.record_stream(current)
        if self._previous is not None and (previous := self._previous()) is not None:
            previous.fetch()
        return back


class _Last(threading.local):
    packed: "weakref.ref[_Waiting] | None" = None


_last = _Last()
_streams: dict[torch.device, Any] = {}


def _stream(device: torch.device) -> Any:
    """The device's stream for these copies."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


class offloaded(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 (a context, as torch names its own)
    """In this context floating tensors that autograd saves wait on the host, if they are large.

    Not those of a CUDA graph that is being captured.

    Args:
        least: bytes of a tensor that is worth it.
    """

    def __init__(self, least: int = LEAST_BYTES) -> None:
        def pack(tensor: Tensor) -> Any:
            kept = isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point() or tensor.nbytes < least
            if kept or (tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return tensor
            previous = None if _last.packed is None else _last.packed()
            waiting = _Waiting(tensor, previous)
            _last.packed = weakref.ref(waiting)
            return waiting

        super().__init__(pack, lambda packed: packed.take() if isinstance(packed, _Waiting) else packed)
