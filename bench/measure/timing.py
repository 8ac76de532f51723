"""How a time is taken: providers in turn, medians, inputs rotated past the cache.

On a shared machine the same call takes 10% more or less from one minute to the next, so a number means something only
next to its rivals' from the same moment. Each round calls every candidate once, in a new random order, each on the next
copy of the inputs; the median over rounds is reported with the 20th and 80th percentile.

On a CUDA device the time is between two events. Where launches are hidden (training modes) the device is held back
until the call is queued, so the time is that of the call's kernels. Where they are not (decoding), every call starts on
an idle device, and the time includes what Python takes to issue it.
"""

import functools
import gc
import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy
import torch

from bench.measure.cuda import head_start
from bench.measure.operands import error_line

_DEFAULT_CACHE = 32 << 20
_CACHE_SIZE_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_MAX_COPIES = 16
_MAX_ROUNDS = 200
_WARM_UP = 2
_HEAD_START, _LEAST_HEAD_START_S = 1.5, 50e-6  # a spin is so many times the issuing in the warm-up, plus this
T = TypeVar("T")


class Spread(NamedTuple):
    """Median and the percentiles around it."""

    p50: float
    p20: float
    p80: float


def spread(samples: list[float]) -> Spread:
    """Percentiles of the samples, interpolated linearly between neighbours.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples to take percentiles of")
    p50, p20, p80 = numpy.percentile(samples, (50, 20, 80)).tolist()
    return Spread(p50, p20, p80)


def interleave(
    candidates: Mapping[str, Callable[[int], object]],
    device: torch.device,
    budget_s: float,
    min_rounds: int,
    max_rounds: int = _MAX_ROUNDS,
    hide_launches: bool = True,
    failures: dict[str, str] | None = None,
) -> dict[str, Spread]:
    """Time candidates in turn: rounds of one call each until the budget is spent.

    Args:
        candidates: name -> function of the copy to work on, a number that grows by one with every call made. Where it
            has a method `before`, that is called first with the same number, and not timed.
        budget_s: seconds for all rounds together; `min_rounds` are made even where they take longer.
        hide_launches: on a CUDA device, time kernels only.
        failures: filled with name -> error of those that raise, which are then left out; without it errors are raised.
    Returns:
        name -> milliseconds a call.
    """
    live = dict(candidates)
    issue_s: dict[str, float] = {}
    serial = 0

    def attempt(name: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:
            if failures is None:
                raise
            failures[name] = error_line(error)
            del live[name]
            return None

    for _ in range(_WARM_UP):
        started = time.perf_counter()
        for name in list(live):
            issue_s[name] = attempt(name, functools.partial(_warm_up, live[name], serial, device)) or 0.0
            serial += 1
        a_round = time.perf_counter() - started
    rounds = max(min_rounds, min(max_rounds, int(budget_s / a_round)))

    order = random.Random(0)
    names = list(live)
    timers: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    gc.disable()
    try:
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                if name not in live:
                    continue
                spin = _HEAD_START * issue_s[name] + _LEAST_HEAD_START_S if hide_launches else 0.0
                timer = attempt(name, functools.partial(_timed, live[name], serial, device, spin))
                timers[name] += [timer] if timer else []
                serial += 1
            _synchronize(device)
    finally:
        gc.enable()
    return {name: spread([read() for read in timers[name]]) for name in candidates if name in live}


def _warm_up(call: Callable[[int], object], serial: int, device: torch.device) -> float:
    """Make the call; returns the seconds the CPU takes to issue it."""
    _before(call, serial)
    _synchronize(device)
    began = time.perf_counter()
    call(serial)
    issued = time.perf_counter() - began
    _synchronize(device)
    return issued


def _before(call: Callable[[int], object], serial: int) -> None:
    before = getattr(call, "before", None)
    if before is not None:
        before(serial)


def _timed(call: Callable[[int], object], serial: int, device: torch.device, spin_s: float) -> Callable[[], float]:
    """Make the call; returns a function that gives its milliseconds once the device is synchronized."""
    _before(call, serial)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if spin_s:
            head_start(spin_s)
        else:
            _synchronize(device)
        start.record()
        call(serial)
        end.record()
        return lambda: start.elapsed_time(end)
    began = time.perf_counter()
    call(serial)
    milliseconds = (time.perf_counter() - began) * 1e3
    return lambda: milliseconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_past_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` to rotate so that a copy has left the last-level cache when its turn comes again."""
    return max(2, min(_MAX_COPIES, -(2 * last_level_cache(device) // -max(nbytes, 1))))


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache: 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return int(_CACHE_SIZE_FILE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return _DEFAULT_CACHE


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name} ({torch.get_num_threads()} threads)"
