"""Compare one LoRA linear between packages: time, peak memory, accuracy.

Forward (as training runs it, with what backward needs recorded) and forward + backward ("both": dx, dA and dB), on bf16
and NF4 bases, against the bare bf16 product. A provider whose result breaks the tolerance rule is reported as wrong and
not timed. Rows are appended to --out as they are measured; a table and a verdict follow.

The floor, `torch`, is x Wᵀ (forward) or x Wᵀ and dy W (both) with W in bf16. At small M an NF4 layer may beat it, as
it has a quarter of the bytes to read.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import memory, table
from bench.accuracy import Judge
from bench.measure import Machine, copies_past_cache, device_name, interleave, measure_machine
from bench.providers import (
    KERNELS,
    MODES,
    LoraLayer,
    Operands,
    Problem,
    Provider,
    draw_inputs,
    find_providers,
    make_operands,
)
from bench.record import Point, Recorder

SUMMARY = "one LoRA linear: fastlora against peft + bitsandbytes and the bare product"


class Preset(NamedTuple):
    """What is measured where the command line does not say."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    repeats: int
    budget_s: float


_FULL = Preset(("2048x2048", "4096x4096"), (1, 16, 256, 1024), repeats=9, budget_s=6.0)
_QUICK = Preset(("1024x1024",), (1, 64), repeats=5, budget_s=0.5)


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    device: torch.device
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    rank: int
    dropout: float
    modes: tuple[str, ...]
    kernels: tuple[str, ...]
    providers: tuple[Provider, ...]
    min_rounds: int
    budget_s: float
    with_memory: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m bench kernels`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to append to (bench/results/DEVICE/kernels.csv)")
    parser.add_argument(
        "--shapes", nargs="+", metavar="KxN", help=f"in_features x out_features ({' '.join(_FULL.shapes)})"
    )
    parser.add_argument("--m", nargs="+", type=int, metavar="M", help=f"tokens ({' '.join(map(str, _FULL.tokens))})")
    parser.add_argument("--r", type=int, default=16, help="rank (16)")
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="LoRA dropout while timing; accuracy is checked at 0"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these (all)")
    parser.add_argument("--repeats", type=int, metavar="N", help="calls of each provider at the least (9)")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for a shape, M and mode, all providers (6)")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--quick", action="store_true", help="under a minute: 1024x1024, M = 1 and 64, few repeats")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 0 whatever the figures say.

    Raises:
        ValueError: an option that cannot be used, or no CUDA device where one is asked for.
    """
    plan = make_plan(arguments)
    name = device_name(plan.device)
    place = "cpu" if plan.device.type == "cpu" else name.lower().replace(" ", "-")
    recorder = Recorder(arguments.out or Path("bench/results") / place / "kernels.csv", name)
    print(f"{name}, torch {torch.__version__}, bf16, r={plan.rank}, dropout={plan.dropout:g}")
    machine = measure_machine(plan.device, budget_s=min(3.0, plan.budget_s))
    print(f"copy {machine.gb_per_s:.1f} GB/s, bf16 product {machine.tflop_per_s:.3f} TFLOP/s")
    recorder.write(machine_points(machine))
    points: list[Point] = []
    for group in measure(plan):
        recorder.write(group)
        points += group
    table.show(points)
    print(f"{len(points)} rows appended to {recorder.path}")
    for line in table.verdict(points):
        print(line)
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check the options and fill in what was left out.

    Raises:
        ValueError: a shape that is not KxN, a number out of range, an unknown provider, no CUDA device.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    preset = _QUICK if arguments.quick else _FULL
    tokens = tuple(arguments.m or preset.tokens)
    repeats = preset.repeats if arguments.repeats is None else arguments.repeats
    if min(*tokens, arguments.r, repeats) < 1:
        raise ValueError("--m, --r and --repeats must be at least 1")
    if not 0 <= arguments.dropout < 1:
        raise ValueError(f"--dropout must lie in [0, 1), not {arguments.dropout}")
    return Plan(
        device=torch.device(arguments.device),
        shapes=tuple(parse_shape(text) for text in arguments.shapes or preset.shapes),
        tokens=tokens,
        rank=arguments.r,
        dropout=arguments.dropout,
        modes=tuple(mode for mode in MODES if mode in arguments.modes),
        kernels=tuple(arguments.kernels),
        providers=find_providers(arguments.providers),
        min_rounds=repeats,
        budget_s=preset.budget_s if arguments.budget is None else arguments.budget,
        with_memory=not arguments.no_memory,
    )


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x14336" -> (4096, 14336), in_features and out_features.

    Raises:
        ValueError: not two positive integers with an x between them.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--shapes takes in_features x out_features such as 4096x14336, not {text!r}")
    return int(parts[0]), int(parts[1])


def machine_points(machine: Machine) -> list[Point]:
    """The machine's own speed as rows."""
    (rows, cols), (m, k, n) = machine.copy_shape, machine.matmul_shape
    return [
        Point("copy", "torch", "forward", "time", rows, cols, 0, 0, *machine.copy),
        Point("matmul", "torch", "forward", "time", m, k, n, 0, *machine.matmul),
    ]


def measure(plan: Plan) -> Iterator[list[Point]]:
    """The rows of each (kernel, shape, M), as soon as they are there."""
    reason = memory.unavailable(plan.device) if plan.with_memory else "left out on request"
    if reason:
        print(f"no peak memory: {reason}")
    server = memory.CpuMemory() if not reason and plan.device.type == "cpu" else nullcontext()
    began = time.perf_counter()
    with server as cpu_memory:
        for kernel in plan.kernels:
            providers = _present(plan.providers, kernel)
            for k, n in plan.shapes:
                problem = Problem(kernel, k, n, plan.rank, plan.device, plan.dropout)
                bench = ShapeBench(plan, problem, providers)
                for m in plan.tokens:
                    group = bench.measure(m)
                    if not reason:
                        group += bench.peak_memory(m, cpu_memory)
                    print(f"{kernel} {k}x{n} M={m}: {len(group)} rows, {time.perf_counter() - began:.0f} s", flush=True)
                    yield group


def _present(providers: tuple[Provider, ...], kernel: str) -> tuple[Provider, ...]:
    present = []
    for provider in providers:
        if kernel not in provider.kernels:
            continue
        if reason := provider.unavailable(kernel):
            print(f"{kernel}: {provider.name} is left out: {reason}")
        else:
            present.append(provider)
    return tuple(present)


class ShapeBench:
    """One kernel and weight shape: builds every provider's layers once, then measures at each M."""

    def __init__(self, plan: Plan, problem: Problem, providers: tuple[Provider, ...]) -> None:
        self.plan, self.problem, self.providers = plan, problem, providers
        dense_bytes = 2 * problem.K * problem.N
        operands = make_operands(
            problem,
            dense_copies=copies_past_cache(dense_bytes, problem.device),
            packed_copies=copies_past_cache(dense_bytes // 4, problem.device),
        )
        self.layers = {provider.name: provider.build(operands) for provider in providers}
        self.without_dropout = replace(operands, problem=replace(problem, dropout=0.0))
        self._right: dict[int, list[Provider]] = {}

    def measure(self, m: int) -> list[Point]:
        """Check everyone, then time those who are right, at m tokens."""
        p = self.problem
        copies = copies_past_cache(2 * m * (p.K + p.N), p.device)
        inputs = [draw_inputs(p, m, grad=True, seed=copy) for copy in range(copies)]
        points = self._check(m, *inputs[0])
        for mode in self.plan.modes:
            candidates = {
                provider.name: _candidate(self.layers[provider.name], mode, inputs)
                for provider in self._right[m]
                if mode in provider.modes
            }
            times = interleave(candidates, p.device, self.plan.budget_s, self.plan.min_rounds) if candidates else {}
            floor = times["torch"].p50 if "torch" in times else None
            for name, found in times.items():
                share = share_of_floor(floor, found.p50)
                points.append(self._point(name, mode, "time", m, found.p50, found.p20, found.p80, share))
        return points

    def _check(self, m: int, x: Tensor, dy: Tensor) -> list[Point]:
        """An error row for everyone but the floor; remembers who was right."""
        judge = Judge(self.without_dropout, x, dy)
        self._right[m] = []
        points = []
        for provider in self.providers:
            if provider.adapter_dtype is None:
                self._right[m].append(provider)
                continue
            layers = self.layers[provider.name]
            if self.plan.dropout:
                layers = provider.build(_first_copy(self.without_dropout))
            worst, wrong = judge.judge(provider, layers[0])
            mode = "both" if "both" in provider.modes else "forward"
            points.append(self._point(provider.name, mode, "error", m, worst))
            if wrong:
                p = self.problem
                print(f"WRONG, not timed: {provider.name}, {p.kernel} K={p.K} N={p.N} M={m}: {wrong}", file=sys.stderr)
            else:
                self._right[m].append(provider)
        return points

    def peak_memory(self, m: int, cpu_memory: memory.CpuMemory | None) -> list[Point]:
        """Peak memory of everyone who was right at m tokens; `measure(m)` comes first."""
        points = []
        for provider in self._right[m]:
            modes = tuple(mode for mode in self.plan.modes if mode in provider.modes)
            if cpu_memory is not None:
                peaks = cpu_memory.peak(provider, self.problem, m, modes)
            else:
                peaks = memory.peak_on_cuda(self.layers[provider.name][0], self.problem, m, modes)
            points += [self._point(provider.name, mode, "peak_memory", m, peak / 1e6) for mode, peak in peaks.items()]
        return points

    def _point(
        self,
        provider: str,
        mode: str,
        metric: str,
        m: int,
        p50: float,
        p20: float | None = None,
        p80: float | None = None,
        share: float | None = None,
    ) -> Point:
        p = self.problem
        return Point(p.kernel, provider, mode, metric, m, p.K, p.N, p.R, p50, p20, p80, share, dropout=p.dropout)


def share_of_floor(floor: float | None, p50: float) -> float | None:
    """The floor's time over a provider's: 1 is the floor's speed. None where the floor was not measured."""
    return None if floor is None else floor / p50


def _first_copy(operands: Operands) -> Operands:
    return replace(operands, dense=operands.dense[:1], packed=operands.packed[:1])


def _candidate(layers: list[LoraLayer], mode: str, inputs: list[tuple[Tensor, Tensor]]) -> Callable[[int], object]:
    """A call on the copy of that number."""
    if not layers[0].grad:
        inputs = [(x.detach(), dy) for x, dy in inputs]

    def forward(serial: int) -> object:
        return layers[serial % len(layers)].forward(inputs[serial % len(inputs)][0])

    def both(serial: int) -> object:
        return layers[serial % len(layers)].both(*inputs[serial % len(inputs)])

    return forward if mode == "forward" else both
