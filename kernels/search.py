"""The run-time search for a product's fastest kernel, for shapes that the table of `choice` does not have.

FASTLORA_AUTOTUNE=1 times the candidates at the first use of a shape, outside graph capture, and remembers the fastest
for the life of the process.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from fastlora.kernels import fused
from fastlora.kernels.choice import DECODE_UP_TO_M, Choice, choose, gpu_of

_SEARCH_CALLS = 5


def candidates(op: str, m: int, n: int, k: int, dropout: bool, device: torch.device, compiled: bool) -> list[Choice]:
    """What could run a product, first `dequantize`, which always can. compiled: as for `choice.choose`."""
    found = [Choice("dequantize")]
    if op == "linear" and m <= DECODE_UP_TO_M and not dropout:
        found += [Choice("decode-cuda")] if compiled else []
        found.append(Choice("decode"))
    return found + [Choice("fused", config) for config in fused.candidates(op, m, n, k, gpu_of(device)[1])]


_found: dict[tuple[Any, ...], Choice] = {}


def autotunes() -> bool:
    """Whether FASTLORA_AUTOTUNE asks for a search at run time."""
    return os.environ.get("FASTLORA_AUTOTUNE", "0") not in ("", "0")


def search(
    op: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dropout: bool,
    device: torch.device,
    compiled: bool,
    run: Callable[[Choice], object],
    fits: Callable[[Choice], bool],
) -> Choice:
    """The fastest candidate, timed once for all M up to the next power of two; while capturing, the table's choice.

    Args:
        compiled: as for `choice.choose`.
        run: does the product by a choice. A candidate for which it raises OutOfResources is dropped.
        fits: whether a candidate can do this product at all.
    """
    key = (op, (m - 1).bit_length(), n, k, r, dropout, device)
    if key in _found:
        return _found[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return choose(op, m, n, k, r, dropout, device, compiled)
    times = {}
    first = choose(op, m, n, k, r, dropout, device, compiled)
    for choice in dict.fromkeys([first, *candidates(op, m, n, k, dropout, device, compiled)]):
        if not fits(choice):
            continue
        try:
            times[choice] = _milliseconds(functools.partial(run, choice), device)
        except _out_of_resources():
            continue
    _found[key] = min(times, key=times.__getitem__)
    return _found[key]


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    call()  # compiles
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    samples = []
    for _ in range(_SEARCH_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)
