"""The cases of `python -m bench kernels` under pytest-benchmark, a small set, to compare two commits.

    pytest tests/bench/bench_kernels.py --benchmark-only --benchmark-save=before
    pytest tests/bench/bench_kernels.py --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

A test's name is its case, the same in every commit. A provider whose result breaks the tolerance rule is not timed:
ours fails, a peer is skipped. On a CUDA device a call is timed until the device has finished it, launches included.
"""

import functools
import itertools

import pytest
import torch

from bench.compare.providers import find_providers
from bench.compare.shape import Call, Effort, ShapeBench
from bench.measure.floors import Rates
from bench.measure.operands import DEQUANTIZE, KERNELS, Problem

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = (4096, 14336) if CUDA else (1024, 1024)
TOKENS = (1, 256, 8192) if CUDA else (1, 64)
PROVIDERS = ("torch", "peft-fp32", "peft-bf16", "peft-eval", "bitsandbytes", "fastlora-fp32", "fastlora-bf16")
ROUNDS, WARM_UP = (50, 5) if CUDA else (15, 2)
RANK = 16


def _cases() -> list[tuple[str, int, int, str, str]]:
    """(kernel, M, rank, mode, provider)."""
    cases: list[tuple[str, int, int, str, str]] = []
    for kernel, name in itertools.product(KERNELS, PROVIDERS):
        (provider,) = find_providers([name])
        for m, r in [(0, 0), (0, RANK)] if kernel == DEQUANTIZE else [(m, RANK) for m in TOKENS]:
            if provider.takes_part(Problem(kernel, *SHAPE, r, DEVICE)):
                modes = [mode for mode in ("forward", "both", "decode") if mode in provider.modes_for(kernel)]
                cases += [(kernel, m, r, mode, name) for mode in modes if mode != "decode" or m == 1]
    return cases


@functools.cache
def _bench(kernel: str, rank: int) -> ShapeBench:
    problem = Problem(kernel, *SHAPE, rank, DEVICE)
    return ShapeBench(problem, find_providers(list(PROVIDERS)), Effort(0.0, 1), Rates(1.0, 1.0), set())


def _call(kernel: str, m: int, rank: int, mode: str, provider: str) -> Call:
    call = _bench(kernel, rank).calls(m, 0.0, mode).get(provider)
    if call is None and provider.startswith("fastlora"):
        pytest.fail(f"{provider} is wrong, or cannot be built: see the captured output")
    if call is None:
        pytest.skip(f"{provider} is absent, or wrong")
    return call


@pytest.mark.parametrize(("kernel", "m", "rank", "mode", "provider"), _cases())
def test_kernel(benchmark, kernel: str, m: int, rank: int, mode: str, provider: str) -> None:  # type: ignore[no-untyped-def]
    call = _call(kernel, m, rank, mode, provider)
    serials = itertools.count()

    def setup() -> tuple[tuple[int], dict[str, object]]:
        serial = next(serials)
        call.before(serial)
        if CUDA:
            torch.cuda.synchronize()
        return (serial,), {}

    def timed(serial: int) -> None:
        call(serial)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{kernel} {SHAPE[0]}x{SHAPE[1]} M={m} r={rank} {mode}"
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP)
