"""What timing on a CUDA device needs beyond events: a head start, graphs, and the number of launches.

Python takes 50 to 500 us to issue a layer's kernels. On an idle device the time between two events is then Python's,
not the kernels'. There are two ways out, for two questions:

- What do the kernels take, as in a model so large that the device never waits? A spin (`head_start`) holds the device
  back until the whole call is queued; events around the call then time only kernels.
- What does a served token take when launches are replayed, not issued? The calls are captured in a CUDA graph, one on
  each copy of the weight, so that a replay reads every weight from memory; the time of a call is the replay's, divided
  by the number of calls.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import DeviceType

_CYCLES_PER_S = 2.0e9  # no GPU runs much faster; at a lower clock the spin only lasts longer
_LONGEST_SPIN_S = 5e-3
_GRAPH_WARM_UP = 2
_GRAPH_TOLERANCE = 1e-2


def head_start(seconds: float) -> None:
    """Hold the current stream back for about so long, while kernels are queued behind it."""
    torch.cuda._sleep(int(min(seconds, _LONGEST_SPIN_S) * _CYCLES_PER_S))  # type: ignore[no-untyped-call]


class Graph:
    """`count` calls captured in one CUDA graph; calling it replays them.

    Args:
        call: function of the copy to work on; it returns a tensor.
        count: how many copies to go through.
    Raises:
        RuntimeError: it cannot be captured, or a replay gives another result than the plain call.
    """

    def __init__(self, call: Callable[[int], Tensor], count: int) -> None:
        self.count = count
        plain = call(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_WARM_UP):
                for serial in range(count):
                    call(serial)
        current = torch.cuda.current_stream()
        current.wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = [call(serial) for serial in range(count)]
        except Exception:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
            _end_capturing()
            raise
        for output in self._outputs:
            output.fill_(float("nan"))
        self(0)
        torch.cuda.synchronize()
        off = (self._outputs[0] - plain).float().norm() / plain.float().norm().clamp(min=1e-30)
        if not off.item() <= _GRAPH_TOLERANCE or not all(t.isfinite().all().item() for t in self._outputs):
            raise RuntimeError("a replayed CUDA graph gives another result than the call it was captured from")

    def __call__(self, serial: int) -> None:
        """Replay; the number of the copy is ignored, because a replay works on all."""
        self._graph.replay()


def _end_capturing() -> None:
    """Capture something that succeeds: after a failed capture torch refuses random numbers until one has ended."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        counter = torch.zeros(1, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            counter.add_(1)


def count_launches(call: Callable[[int], object], before: Callable[[int], object] | None = None) -> int:
    """Kernels, copies and fills that one call puts on the device.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    if before is not None:
        before(0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize()
    found = [
        event
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return len(found)
