"""Peak memory of one call: the most that is held at once, above what was held before it.

On CUDA the caching allocator keeps count: `max_memory_allocated` less what was allocated at the start.

On a CPU only the operating system keeps count, and a process that has run other things holds freed memory that the next
call would use unseen. So each measurement has a process of its own, forked from a server that has imported everything
and run nothing. The server's malloc maps every block above 64 KB separately and gives it back at once
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), so resident memory follows what is allocated; transparent huge pages
are off, so it follows by the page. The first call starts threads and has oneDNN compile code for the shapes (0.6 MB a
product, once in a process, for any caller); tensors that it leaves behind, such as scratch kept for later calls, are
counted. Then the peak (VmHWM) is reset by writing 5 to /proc/self/clear_refs, the call runs again, and the peak's
growth is added. This includes the memory of native code, which torch's allocator does not see, except what such code
keeps between calls. Two runs agree to `resolution()`: the system counts a process's pages on each processor separately
and adds them up in batches (0.13 to 0.2 MB seen over 24 runs on two processors).

    parent  --{"kernel": ..., "M": ...}-->  python -m bench.compare.memory  --fork-->  child: build, reset, call, print
"""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bench.compare.layers import LoraLayer, Provider
from bench.compare.providers import find_providers
from bench.measure.operands import Problem, draw_inputs, make_operands, missing
from bench.measure.record import ROOT

_PR_SET_THP_DISABLE = 41
CALLS = 7  # a call needs the same each time; the minimum leaves out pages that threads and allocator took once
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def resolution() -> int:
    """How many bytes two CPU readings of the same call may differ by.

    Each processor keeps a batch of pages to itself: `percpu_counter_batch` of Linux's lib/percpu_counter.c.
    """
    processors = os.cpu_count() or 1
    return max(32, 2 * processors) * processors * os.sysconf("SC_PAGE_SIZE")


def unavailable(device: torch.device) -> str | None:
    """Why peak memory cannot be measured here; None where it can."""
    if device.type == "cuda":
        return None
    try:
        _reset_peak()
        _peak()
    except (OSError, StopIteration) as error:
        return f"peak memory on a CPU is read from Linux's /proc, which does not work here ({error})"
    return None


def peak_on_cuda(layer: LoraLayer, problem: Problem, m: int, modes: tuple[str, ...]) -> dict[str, float]:
    """mode -> bytes, on the CUDA device of the problem."""
    x, dy = draw_inputs(problem, m, layer.grad)
    peaks = {}
    for mode in modes:
        torch.cuda.synchronize(problem.device)
        torch.cuda.reset_peak_memory_stats(problem.device)
        before = torch.cuda.memory_allocated(problem.device)
        _call(layer, mode, x, dy)
        torch.cuda.synchronize(problem.device)
        peaks[mode] = float(torch.cuda.max_memory_allocated(problem.device) - before)
    return peaks


class CpuMemory:
    """A server that measures in processes of its own; a context manager."""

    def __enter__(self) -> "CpuMemory":
        environment = os.environ | _MALLOC | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "bench.compare.memory"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def peak(self, provider: Provider, problem: Problem, m: int, modes: tuple[str, ...]) -> dict[str, float]:
        """mode -> bytes.

        Raises:
            RuntimeError: the child failed; its own message is on stderr.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        p = problem
        request = {"provider": provider.name, "kernel": p.kernel, "K": p.K, "N": p.N, "R": p.R, "dropout": p.dropout}
        print(json.dumps(request | {"M": m, "modes": modes}), file=self._server.stdin, flush=True)
        answer = json.loads(self._server.stdout.readline() or "{}")
        if not answer:
            raise RuntimeError(f"measuring the memory of {provider.name} at {p.kernel} M={m} K={p.K} N={p.N} failed")
        return answer


def _call(layer: LoraLayer, mode: str, x: Tensor, dy: Tensor) -> None:
    if mode == "forward":
        layer.forward(x)
    else:
        layer.both(x, dy)


def _measure(provider: Provider, request: dict[str, Any]) -> dict[str, float]:
    """In the child: every mode of one provider at one shape."""
    problem = Problem(
        request["kernel"], request["K"], request["N"], request["R"], torch.device("cpu"), request["dropout"]
    )
    layer = provider.build(make_operands(problem))[0]
    x, dy = draw_inputs(problem, request["M"], layer.grad)
    held = _held_by_tensors()
    peaks = {}
    for mode in request["modes"]:
        _call(layer, mode, x, dy)
        kept = _held_by_tensors() - held
        peaks[mode] = float(min(_growth(layer, mode, x, dy) for _ in range(CALLS)) + kept)
    return peaks


def _growth(layer: LoraLayer, mode: str, x: Tensor, dy: Tensor) -> int:
    """Bytes that one call made resident beyond what was resident before."""
    _reset_peak()
    before = _peak()
    _call(layer, mode, x, dy)
    return max(0, _peak() - before)  # pages are counted in batches: a call that needs none may read as -2


def _held_by_tensors() -> int:
    """Bytes of the storages of all tensors that Python knows of, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        plain = type(thing) in (Tensor, torch.nn.Parameter)  # a fake tensor has no storage to ask for
        if plain and thing.layout == torch.strided and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory this process has had resident since the reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10


def _serve() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    for line in sys.stdin:
        request = json.loads(line)
        (provider,) = find_providers([request["provider"]])
        quantizer = ("bitsandbytes",) if request["kernel"] != "bf16_linear" and not missing("bitsandbytes") else ()
        for package in ("fastlora.layers.lora_linear", *quantizer, *provider.needs(request["kernel"])):
            importlib.import_module(package)
        child = os.fork()
        if child == 0:
            print(json.dumps(_measure(provider, request)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            print("{}", flush=True)


if __name__ == "__main__":
    _serve()
