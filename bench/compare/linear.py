"""Compare one LoRA linear between packages: time, accuracy, peak memory, launches.

Forward (as training runs it, with what backward needs recorded), backward, both, and decode (nothing recorded, at most
16 tokens), over bf16 and NF4 bases, and the bare expansion of an NF4 weight, against the floors of
`bench.measure.floors`. The machine's own copy bandwidth and matrix rate are measured first. A provider whose result
breaks the tolerance rule is reported as wrong and not timed; one that raises is named with its error; the others go
on. Rows are printed, and appended to --out, as they are measured. After --limit seconds the rest is left out, and
named.

On a CUDA device (--preset cuda, the default there) the shapes and tokens that matter most come first, in about two and
a half minutes.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bench.compare import memory
from bench.compare.layers import Provider
from bench.compare.providers import find_providers
from bench.compare.shape import DeviceLostError, Effort, ShapeBench
from bench.measure.floors import Rates
from bench.measure.machine import gb_per_s, measure_machine, tflop_per_s
from bench.measure.models import MODEL_SHAPES, model_shapes, parse_shape
from bench.measure.operands import DECODE_MAX_M, DEQUANTIZE, KERNELS, MODES, Problem
from bench.measure.record import Point, Recorder
from bench.measure.timing import device_name
from bench.report import goals, table

SUMMARY = "one LoRA linear: fastlora against peft, bitsandbytes, unsloth, torch.compile and the bare product"
LAUNCHES_S = 12.0  # the most that counting launches may take, at the end of a run
Timed = dict[tuple[str, int, float, str], tuple[Problem, set[str]]]  # kernel, M, dropout, mode -> problem, providers


class Preset(NamedTuple):
    """What is measured where the command line does not say.

    Args:
        dropout_from_m: below so many tokens only dropout 0 is measured.
        without: providers that take part only where named.
    """

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    dropouts: tuple[float, ...]
    repeats: int
    budget_s: float
    dropout_from_m: int = 1
    without: tuple[str, ...] = ("compile",)


PRESETS = {
    "cpu": Preset(("2048x2048", "4096x4096"), (1, 16, 256, 1024), (0.0,), repeats=9, budget_s=6.0),
    "quick": Preset(("1024x1024",), (1, 64), (0.0,), repeats=5, budget_s=0.5),
    "cuda": Preset(
        ("4096x4096", "4096x14336", "8192x28672"),
        (8192, 1, 256, 2048, 16),
        (0.0, 0.1),
        repeats=10,
        budget_s=0.25,
        dropout_from_m=64,
    ),
}
DEFAULT_MODES = ("forward", "both", "decode")


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    device: torch.device
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    dropout_from_m: int
    modes: tuple[str, ...]
    kernels: tuple[str, ...]
    providers: tuple[Provider, ...]
    effort: Effort
    with_memory: bool
    with_launches: bool
    deadline: float

    def cases(self, kernel: str) -> Iterator[tuple[int, float]]:
        """(M, dropout) in order; the expansion of a weight has neither."""
        if kernel == DEQUANTIZE:
            yield 0, 0.0
            return
        for m in self.tokens:
            for p in self.dropouts:
                if not p or m >= self.dropout_from_m:
                    yield m, p

    def problems(self) -> Iterator[Problem]:
        """Kernel, shape and rank of every part of the run, without dropout."""
        for kernel in self.kernels:
            for k, n in self.shapes:
                for r in (0, *self.ranks) if kernel == DEQUANTIZE else self.ranks:
                    yield Problem(kernel, k, n, r, self.device)

    def modes_at(self, kernel: str, m: int, dropout: float) -> tuple[str, ...]:
        """The modes of a case: decode is for a few tokens, and nothing is dropped there."""
        if kernel == DEQUANTIZE:
            return ("forward",)
        may_decode = m <= DECODE_MAX_M and not dropout
        return tuple(mode for mode in self.modes if mode != "decode" or may_decode)

    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m bench kernels`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to append to (bench/results/DEVICE/kernels.csv)")
    parser.add_argument("--preset", choices=PRESETS, help="what the other options default to (the device's name)")
    parser.add_argument("--quick", action="store_const", dest="preset", const="quick", help="--preset quick")
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help="in_features x out_features")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"their linear layers: {', '.join(MODEL_SHAPES)}")
    parser.add_argument("--m", nargs="+", type=int, metavar="M", help="tokens")
    parser.add_argument("--r", nargs="+", type=int, metavar="R", default=[16], help="ranks (16)")
    parser.add_argument("--dropout", nargs="+", type=float, metavar="P", help="LoRA dropout; accuracy is judged at 0")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--repeats", type=int, metavar="N", help="calls of each provider at the least")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for a case and mode, all providers")
    parser.add_argument("--limit", type=float, metavar="S", help="stop after so many seconds with what there is")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--no-launches", action="store_true", help="leave the number of launches out")


def run(arguments: argparse.Namespace) -> int:
    """Measure, write, print; 0 whatever the figures say, 1 where the device was lost.

    Raises:
        ValueError: an option that cannot be used, or no CUDA device where one is asked for.
    """
    plan = make_plan(arguments)
    name = device_name(plan.device)
    place = "cpu" if plan.device.type == "cpu" else name.lower().replace(" ", "-")
    recorder = Recorder(arguments.out or Path("bench/results") / place / "kernels.csv", name)
    print(f"{name}, torch {torch.__version__}, bf16", flush=True)
    machine = measure_machine(plan.device, budget_s=min(3.0, plan.effort.budget_s))
    print(f"copy {gb_per_s(machine.copy):.1f} GB/s, bf16 product {tflop_per_s(machine.matmul):.3f} TFLOP/s", flush=True)
    recorder.write(machine)
    points: list[Point] = []
    status = 0
    try:
        for group in measure(plan, machine.rates):
            recorder.write(group)
            points += group
    except DeviceLostError as error:
        print(f"{error}; what was measured before it is kept", file=sys.stderr)
        status = 1
    table.show(points)
    print(f"{len(points)} rows appended to {recorder.path}")
    for line in goals.verdict(points, name):
        print(line)
    return status


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check the options and fill in what was left out.

    Raises:
        ValueError: a shape that is not KxN, a number out of range, an unknown provider or model, no CUDA device.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    preset = PRESETS[arguments.preset or arguments.device]
    tokens = tuple(arguments.m or preset.tokens)
    dropouts = preset.dropouts if arguments.dropout is None else tuple(arguments.dropout)
    repeats = preset.repeats if arguments.repeats is None else arguments.repeats
    if min(*tokens, *arguments.r, repeats) < 1:
        raise ValueError("--m, --r and --repeats must be at least 1")
    for p in dropouts:
        if not 0 <= p < 1:
            raise ValueError(f"--dropout must be in [0, 1), not {p}")
    shapes = model_shapes(arguments.models or [])
    if arguments.shapes or not shapes:
        shapes += tuple(parse_shape(text) for text in arguments.shapes or preset.shapes)
    providers = find_providers(arguments.providers)
    if not arguments.providers:
        providers = tuple(provider for provider in providers if provider.name not in preset.without)
    return Plan(
        device=torch.device(arguments.device),
        shapes=tuple(dict.fromkeys(shapes)),
        tokens=tokens,
        ranks=tuple(arguments.r),
        dropouts=dropouts,
        dropout_from_m=preset.dropout_from_m if arguments.dropout is None else 1,
        modes=tuple(mode for mode in MODES if mode in arguments.modes),
        kernels=tuple(arguments.kernels),
        providers=providers,
        effort=Effort(preset.budget_s if arguments.budget is None else arguments.budget, repeats),
        with_memory=not arguments.no_memory,
        with_launches=not arguments.no_launches and arguments.device == "cuda",
        deadline=time.monotonic() + (float("inf") if arguments.limit is None else arguments.limit),
    )


def measure(plan: Plan, rates: Rates) -> Iterator[list[Point]]:
    """Rows of each (kernel, shape, rank, M, dropout, mode), as soon as they are measured."""
    reason = memory.unavailable(plan.device) if plan.with_memory else "left out on request"
    if reason:
        print(f"no peak memory: {reason}")
    server = memory.CpuMemory() if not reason and plan.device.type == "cpu" else nullcontext()
    began = time.monotonic()
    said: set[str] = set()
    timed: Timed = {}
    skipped = []
    reserve = min(LAUNCHES_S, plan.left_s() / 10) if plan.with_launches else 0.0
    with server as cpu_memory:
        for problem in plan.problems():
            if plan.left_s() <= reserve:
                skipped.append(f"{problem.kernel} {problem.K}x{problem.N} r={problem.R}")
                continue
            bench = ShapeBench(problem, plan.providers, plan.effort, rates, said)
            for m, p in plan.cases(problem.kernel):
                modes = plan.modes_at(problem.kernel, m, p)
                if plan.left_s() <= reserve:
                    skipped.append(f"{problem.kernel} {problem.K}x{problem.N} r={problem.R} M={m} p={p:g}")
                    continue
                if modes and not bench.is_judged(m):
                    yield bench.judge(m)
                for mode in modes:
                    found = bench.time(m, p, mode)
                    say(found, time.monotonic() - began)
                    yield found
                    timed.setdefault((problem.kernel, m, p, mode), (problem, {point.provider for point in found}))
                if not reason and modes:
                    yield bench.peak_memory(m, p, modes, cpu_memory)
            del bench
    if plan.with_launches:
        yield from count_launches(plan, rates, timed)
    if skipped:
        print(f"stopped at the limit; not measured: {', '.join(skipped)}")


def count_launches(plan: Plan, rates: Rates, timed: Timed) -> Iterator[list[Point]]:
    """Launches a call, for the first shape of every case that was timed, while `LAUNCHES_S` lasts.

    They come last, because a profiler that has been on slows what follows.
    """
    until = time.monotonic() + min(LAUNCHES_S, max(plan.left_s(), 0.0))
    bench: ShapeBench | None = None
    for (_, m, p, mode), (problem, names) in timed.items():
        if time.monotonic() > until:
            print("launches: not counted for every case, as their time is up")
            return
        if bench is None or bench.problem != problem:
            bench = ShapeBench(problem, plan.providers, plan.effort, rates, set())
        found = bench.launches(m, p, mode, names)
        say(found, None)
        yield found


def say(points: list[Point], elapsed_s: float | None) -> None:
    """One line for a case and mode, at once."""
    if not points:
        return
    p = points[0]
    stamp = f"{elapsed_s:4.0f} s  " if elapsed_s is not None else "launches  "
    print(f"{stamp}{p.case}: {', '.join(_figure(point) for point in points)}", flush=True)


def _figure(point: Point) -> str:
    if point.metric != "time":
        return f"{point.provider} {point.p50:g}"
    share = "" if point.share_of_floor is None else f" ({point.share_of_floor:.2f})"
    return f"{point.provider} {point.p50:.4g} ms{share}"
