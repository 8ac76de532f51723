"""Find the fastest kernel for each product on this GPU, and write the table that `fastlora.kernels.choice` reads.

For every operation, shape and M, each candidate is compiled, checked against fp64 by the tests' tolerance rule and,
where it is right, timed in a CUDA graph on rotating copies of the weight, in turn with the others. The fastest becomes
a row of --out. Rows of other GPUs stay, and the file is replaced in one step after every case, so that a run cut short
keeps what it has. A case that has a row is skipped unless --again says so. Cases come in order of importance, until
--budget is spent. M* of a shape, the largest M at which dequantizing is not the fastest, is printed at the end.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from fastlora.kernels import choice
from fastlora.kernels.choice import LOW_RANK, PRODUCTS

from bench.measure.cuda import Graph
from bench.measure.models import parse_shape
from bench.measure.operands import Operands, Problem, error_line, make_operands
from bench.measure.timing import copies_past_cache, interleave
from bench.tune.trials import Trial, Truth, TuneCase, low_rank_trials, product_trials

SUMMARY = "time every kernel that could do a product on this GPU and write the table of choices"
_COMPILERS = 8  # threads: the compiler's passes and ptxas run in parallel
_CASE_S, _ROUNDS, _LEAST_CALLS = 0.15, 5, 4


class Grid(NamedTuple):
    """Where products and low-rank kernels are measured, the most important first in each list."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]  # K or N of what a low-rank kernel reads
    low_rank_tokens: tuple[int, ...]
    modes: tuple[str, ...]
    most_trials: int | None = None  # of a case

    def cases(self, r: int) -> list[TuneCase]:
        """All cases at rank r, the most important first: the first of each list, then the next of one of them."""
        worth: dict[TuneCase, int] = {}
        for i, m in enumerate(self.tokens):
            for j, (k, n) in enumerate(map(parse_shape, self.shapes)):
                worth |= {TuneCase(op, m, k, n, r): i + j for op in PRODUCTS}
        for i, m in enumerate(self.low_rank_tokens):
            for j, length in enumerate(self.lengths):
                for mode in self.modes:
                    worth |= {TuneCase(op, m, length, 0, r, mode): 2 * i + j + 1 for op in ("shrink", "x")}
                    worth[TuneCase("dy", m, 0, length, r, mode)] = 2 * i + j + 1
        return sorted(worth, key=worth.__getitem__)


_FULL = Grid(
    ("4096x14336", "4096x4096", "14336x4096", "8192x28672", "28672x8192", "8192x8192", "3584x18944", "4096x1024"),
    (1, 256, 64, 16, 512, 128, 32, 8, 1024, 2, 4),
    (4096, 14336),
    (8192, 1024, 64),
    ("narrow", "split"),
)
_TINY = Grid(("128x192",), (1, 24), (128,), (24,), ("narrow",), most_trials=2)


class Plan(NamedTuple):
    """What one run measures."""

    device: torch.device
    dtype: torch.dtype
    cases: list[TuneCase]
    most_trials: int | None  # of a case
    again: bool
    budget_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench tune`."""
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("kernels/choice.csv"), help="table to update")
    parser.add_argument("--ops", nargs="+", choices=(*PRODUCTS, *LOW_RANK), default=[*PRODUCTS, *LOW_RANK])
    shapes = " ".join(_FULL.shapes)
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help=f"in_features x out_features ({shapes})")
    parser.add_argument("--m", nargs="+", type=int, metavar="M", help="tokens (1 to 1024; low-rank kernels 64 to 8192)")
    parser.add_argument("--r", type=int, default=16, help="rank (16)")
    parser.add_argument("--budget", type=float, default=300.0, metavar="S", help="seconds; no case begins later (300)")
    parser.add_argument("--again", action="store_true", help="also measure cases that the table has")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: the interpreter, tiny shapes, fp16")


def run(arguments: argparse.Namespace) -> int:
    """Tune and write; 1 where some case had no kernel that is right.

    Raises:
        ValueError: no CUDA device, an option that cannot be used, or a table that cannot be read.
    """
    plan = make_plan(arguments)
    gpu = choice.gpu_of(plan.device)[0]
    table = choice.read(arguments.out if arguments.out.exists() else choice.TABLE)
    known = set() if plan.again else {_case_of(row) for row in table if row.gpu == gpu}
    to_do = [case for case in plan.cases if case not in known]
    print(f"{gpu}: {len(to_do)} cases to measure, {len(plan.cases) - len(to_do)} in the table already", flush=True)
    began, bench, wrong, measured = time.monotonic(), _Bench(plan), 0, 0
    for case in to_do:
        if time.monotonic() - began > plan.budget_s:
            break
        row = bench.fastest(case, gpu)
        measured += 1
        wrong += row is None
        if row is not None:
            table = [other for other in table if (other.gpu, _case_of(other)) != (gpu, case)] + [row]
            choice.write(table, arguments.out)
    for line in crossovers([row for row in table if row.gpu == gpu]):
        print(line)
    left = len(to_do) - measured
    print(f"{measured - wrong} rows written to {arguments.out}, {left} cases left" + (": run again" if left else ""))
    return 1 if wrong else 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check the options and fill in what was left out.

    Raises:
        ValueError: no CUDA device, a shape that is not KxN, a number out of range, triton not in its interpreter.
    """
    if arguments.dry_run:
        _interpret()
    elif not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; --dry-run goes the same way without one")
    grid = _TINY if arguments.dry_run else _FULL
    if arguments.m:
        grid = grid._replace(tokens=tuple(arguments.m), low_rank_tokens=tuple(arguments.m))
    if arguments.shapes:
        grid = grid._replace(shapes=tuple(arguments.shapes))
    if arguments.r < 1 or min(grid.tokens) < 1:
        raise ValueError("--m and --r must be at least 1")
    cases = [case for case in grid.cases(arguments.r) if case.op in arguments.ops]
    device, dtype = ("cpu", torch.float16) if arguments.dry_run else ("cuda:0", torch.bfloat16)
    return Plan(torch.device(device), dtype, cases, grid.most_trials, arguments.again, arguments.budget)


def _interpret() -> None:
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        raise ValueError("--dry-run needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")


def _case_of(row: choice.TableRow) -> TuneCase:
    mode = row.kernel if row.op in LOW_RANK else ""
    return TuneCase(row.op, row.m or 0, row.k or 0, row.n or 0, row.r or 0, mode)


class _Bench:
    """Draws the operands of a shape once, and times the candidates."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._drawn: dict[tuple[int, int, int], Operands] = {}

    def fastest(self, case: TuneCase, gpu: str) -> choice.TableRow | None:
        """The row of the fastest candidate that is right; None where none is right."""
        if case.op in LOW_RANK:
            found, truth = low_rank_trials(case, self.plan.device, self.plan.dtype)
        else:
            found, truth = product_trials(case, self._operands(case))
        right = [trial for trial in self._compiled(found[: self.plan.most_trials]) if _is_right(case, trial, truth)]
        times = self._times(right)
        if not times:
            print(f"{case}: no kernel is right", file=sys.stderr)
            return None
        ranking = sorted(times, key=times.__getitem__)
        print(f"{case}: " + ", ".join(f"{trial} {times[trial]:.2f} us" for trial in ranking[:3]), flush=True)
        best = ranking[0]
        dropout = False if best.kernel.startswith("decode") else None
        sides = case.m, case.k or None, case.n or None, case.r
        return choice.TableRow(gpu, case.op, *sides, dropout, best.kernel, best.config, times[best], "measured")

    def _operands(self, case: TuneCase) -> Operands:
        key = case.k, case.n, case.r
        if key not in self._drawn:
            problem = Problem("nf4_linear", case.k, case.n, case.r, self.plan.device, dtype=self.plan.dtype)
            copies = copies_past_cache(case.k * case.n // 2, self.plan.device)
            self._drawn[key] = make_operands(problem, packed_copies=copies)
        return self._drawn[key]

    def _compiled(self, found: list[Trial]) -> list[Trial]:
        """Those that compile and launch, in order. Each is called once; the first one before threads share anything."""
        threads = _COMPILERS if self.plan.device.type == "cuda" else 1
        faults = list(map(_fault, found[:1]))
        with ThreadPoolExecutor(threads) as pool:
            faults += pool.map(_fault, found[1:])
        return [trial for trial, fault in zip(found, faults, strict=True) if not fault]

    def _times(self, found: list[Trial]) -> dict[Trial, float]:
        """Median microseconds a call, on a CUDA device without the launching."""
        candidates: dict[str, Callable[[int], object]] = {str(trial): trial.call for trial in found}
        calls = 1
        if found and self.plan.device.type == "cuda":
            calls = max(_LEAST_CALLS, found[0].copies)
            candidates = {str(trial): graph for trial in found if (graph := _captured(trial, calls))}
        failures: dict[str, str] = {}
        spreads = interleave(candidates, self.plan.device, _CASE_S, _ROUNDS, failures=failures)
        for name, reason in failures.items():
            print(f"{name} left out: {reason}", file=sys.stderr)
        return {trial: spreads[str(trial)].p50 * 1e3 / calls for trial in found if str(trial) in spreads}


def _fault(trial: Trial) -> str:
    """Why a trial cannot run, which is printed too; empty where it can."""
    try:
        trial.call(0)
    except Exception as error:  # a candidate may ask too much of a GPU: the others go on
        print(f"{trial} left out: {error_line(error)}", file=sys.stderr)
        return error_line(error)
    return ""


def _captured(trial: Trial, calls: int) -> Graph | None:
    """A graph of so many calls, each on the next copy; None, and a line that says so, where it cannot be captured."""
    try:
        return Graph(lambda serial: trial.call(serial)[0], calls)
    except RuntimeError as error:
        print(f"{trial} left out: {error_line(error)}", file=sys.stderr)
        return None


def _is_right(case: TuneCase, trial: Trial, truth: Truth) -> bool:
    fault = truth.fault(trial.result())
    if fault:
        print(f"WRONG, not timed: {case}, {trial}: {fault}", file=sys.stderr)
    return not fault


def crossovers(rows: list[choice.TableRow]) -> Iterator[str]:
    """A line for each product and shape: the largest M measured at which dequantizing was not the fastest."""
    shapes = dict.fromkeys((row.op, row.k, row.n) for row in rows if row.op in PRODUCTS)
    for op, k, n in shapes:
        mine = [row for row in rows if (row.op, row.k, row.n) == (op, k, n)]
        below = max((row.m or 0 for row in mine if row.kernel != "dequantize"), default=0)
        least = min((row.m or 0 for row in mine if row.kernel == "dequantize" and (row.m or 0) > below), default=0)
        yield f"{op} {k}x{n}: M* is {below} or more" + (f", below {least}" if least else "")
