"""What a call costs the CPU: candidates timed in turn by the thread's clock, and the table and rows of them."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.record import Point, Recorder
from bench.measure.timing import device_name


class Candidate(NamedTuple):
    """A layer to call. `leaves` are the tensors whose gradients are taken: x, A and B."""

    kernel: str
    provider: str
    call: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dy: Tensor


class Cost(NamedTuple):
    """Microseconds of CPU time a call."""

    kernel: str
    provider: str
    mode: str
    p50: float
    p20: float
    p80: float
    dtype: str


class Counts(NamedTuple):
    """What one call makes."""

    launches: int  # of Triton's
    library: int  # calls that launch a kernel on CUDA
    allocations: int


@contextmanager
def one_thread() -> Iterator[None]:
    """torch, and fastlora with it, on the calling thread only: its clock sees no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class EmptyFunction(torch.autograd.Function):
    """Nothing but what autograd does around a Function: y is left as it was allocated, the gradients are given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, grads: Any) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.grads = grads
        return x.new_empty((x.shape[0], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, da, db = ctx.grads
        return dx, None, da, db, None


class ThreeProducts(torch.autograd.Function):
    """y = x Wᵀ + scaling · (x Aᵀ) Bᵀ by torch's own products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, grads: Any) -> Tensor:
        h = F.linear(x, a)  # [M, R]
        ctx.save_for_backward(x, weight, a, b, h)
        return F.linear(x, weight).addmm_(h, b.t(), alpha=2.0)  # [M, N]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, h = ctx.saved_tensors
        g = (dy @ b).mul_(2.0)  # [M, R]
        dx = (dy @ weight).addmm_(g, a)  # [M, K]
        return dx, None, g.t() @ x, (dy.t() @ h).mul_(2.0), None


def measure(work: list[tuple[Candidate, str, Callable[[], object]]], rounds: int, calls: int) -> list[Cost]:
    """CPU time of each candidate's action in each mode, in turn."""
    samples: dict[int, list[float]] = {place: [] for place in range(len(work))}
    for _, _, action in work:
        _block_us(action, max(calls // 4, 3))
    order, places = random.Random(0), list(samples)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order.shuffle(places)
            for place in places:
                samples[place].append(_block_us(work[place][2], calls))
    finally:
        gc.enable()
    return [
        Cost(c.kernel, c.provider, mode, *_spread(samples[place]), str(c.dy.dtype).removeprefix("torch."))
        for place, (c, mode, _) in enumerate(work)
    ]


def _block_us(action: Callable[[], object], calls: int) -> float:
    """Microseconds of the thread's CPU time for one of so many calls."""
    began = time.thread_time_ns()
    for _ in range(calls):
        action()
    return (time.thread_time_ns() - began) / calls / 1e3


def _spread(samples: list[float]) -> tuple[float, float, float]:
    """p50, p20, p80."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]


def table(costs: list[Cost], modes: Sequence[str], providers: Sequence[str]) -> str:
    """The table that is printed, a line for each layer."""
    lines = [
        "microseconds of CPU time a call (median, [p20 p80])",
        f"{'kernel':<13}{'provider':<16}" + "".join(f"{mode:>23}" for mode in modes),
    ]
    by_layer: dict[tuple[str, str], dict[str, Cost]] = {}
    for cost in costs:
        by_layer.setdefault((cost.kernel, cost.provider), {})[cost.mode] = cost
    ordered = sorted(by_layer.items(), key=lambda item: (item[0][0], providers.index(item[0][1])))
    for (kernel, provider), found in ordered:
        cells = (
            f"{found[mode].p50:.1f} [{found[mode].p20:.1f} {found[mode].p80:.1f}]" if mode in found else ""
            for mode in modes
        )
        lines.append(f"{kernel:<13}{provider:<16}" + "".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)


def record(
    costs: list[Cost], out: Path, device: torch.device, sizes: tuple[int, int, int, int], dropout: float = 0.0
) -> str:
    """Append to the CSV. sizes: tokens, K, N and the rank."""
    Recorder(out, device_name(device)).write(
        Point(c.kernel, c.provider, c.mode, "host", *sizes, c.p50, c.p20, c.p80, dropout=dropout, dtype=c.dtype)
        for c in costs
    )
    return f"appended to {out}"
