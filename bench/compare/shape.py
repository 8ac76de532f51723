"""One kernel and weight shape, measured: every provider built once, judged at each M, then timed.

A provider that raises, wherever it does, is reported with its error and left out of that case; the others go on.
Only a CUDA device that no longer answers ends the run.
"""

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.compare import memory
from bench.compare.accuracy import Judge
from bench.compare.layers import LoraLayer, Provider
from bench.measure import cuda
from bench.measure.floors import Rates, floor_ms, share_of_floor
from bench.measure.operands import DECODE_MAX_M, DEQUANTIZE, Operands, Problem, draw_inputs, error_line, make_operands
from bench.measure.record import GRAPH, Point
from bench.measure.timing import Spread, copies_past_cache, interleave

MEMORY_MODES = ("forward", "both")
Inputs = list[tuple[Tensor, Tensor]]


class DeviceLostError(RuntimeError):
    """The CUDA device no longer answers; what was measured before is written."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        budget_s: seconds for one case and mode, all providers. min_rounds: calls of each at the least.
    """

    budget_s: float
    min_rounds: int


class Call:
    """A provider's call in one mode, on the copy of a number."""

    def __init__(self, layers: list[LoraLayer], mode: str, inputs: Inputs) -> None:
        self.layers, self.mode = layers, mode
        recorded = layers[0].grad and mode != "decode"
        self.inputs = inputs if recorded else [(x.detach(), dy) for x, dy in inputs]
        self._y: Tensor | None = None

    def before(self, serial: int) -> None:
        """What the mode needs beforehand: for backward, a recorded y."""
        if self.mode == "backward":
            self._y = self._layer(serial).forward(self._inputs(serial)[0])

    def __call__(self, serial: int) -> object:
        """Make the call; `before` comes first, with the same number."""
        layer, (x, dy) = self._layer(serial), self._inputs(serial)
        if self.mode == "forward":
            return layer.forward(x)
        if self.mode == "both":
            return layer.both(x, dy)
        if self.mode == "decode":
            return layer.decode(x)
        assert self._y is not None
        y, self._y = self._y, None
        return layer.backward(y, x, dy)

    def decoded(self, serial: int) -> Tensor:
        """y of a decode call."""
        return self._layer(serial).decode(self._inputs(serial)[0])

    def _layer(self, serial: int) -> LoraLayer:
        return self.layers[serial % len(self.layers)]

    def _inputs(self, serial: int) -> tuple[Tensor, Tensor]:
        return self.inputs[serial % len(self.inputs)]


class ShapeBench:
    """Builds every provider's layers over one weight, then measures at each M.

    Args:
        problem: kernel, shape and rank, without dropout.
        providers: those to compare; which of them can take part is found here.
        rates: the machine's own, for the floors.
        said: lines already printed about absent providers, so that each is printed once.
    """

    def __init__(
        self, problem: Problem, providers: tuple[Provider, ...], effort: Effort, rates: Rates, said: set[str]
    ) -> None:
        self.problem, self.effort, self.rates, self._said = problem, effort, rates, said
        self.providers = tuple(provider for provider in providers if provider.takes_part(problem))
        dense_bytes = 2 * problem.K * problem.N
        self.operands = make_operands(
            problem,
            dense_copies=copies_past_cache(dense_bytes, problem.device),
            packed_copies=copies_past_cache(dense_bytes // 4, problem.device),
        )
        gc.collect()  # once here, and never while calls are timed
        self._built: dict[tuple[str, float], list[LoraLayer] | None] = {}
        self._right: dict[int, tuple[Provider, ...]] = {}
        self._inputs_of: tuple[int, Inputs] = (-1, [])

    def is_judged(self, m: int) -> bool:
        """Whether the providers have been judged at m tokens."""
        return m in self._right

    def judge(self, m: int) -> list[Point]:
        """An error row for every provider except the floor, at m tokens; only those that were right are measured."""
        judge = Judge(self.operands, *self._inputs(m)[0])
        points, right = [], []
        self._right[m] = ()
        for provider in self.providers:
            layers = self._layers(provider, 0.0) if m >= provider.least_m or not m else None
            if not layers:
                continue
            if provider.checked:
                try:
                    worst, wrong = judge.judge(provider, layers[0])
                except torch.OutOfMemoryError as error:  # the fp64 oracle's; a provider's own is an error of its own
                    self._left_out(provider.name, m, "cannot be judged", error_line(error))
                    continue
                modes = provider.modes_for(self.problem.kernel)
                points.append(self._point(provider.name, "both" if "both" in modes else modes[0], "error", m, worst))
                if wrong:
                    print(f"WRONG, not timed: {provider.name}, {self.problem} M={m}: {wrong}", file=sys.stderr)
                    self._require_device(provider.name)
                    continue
            right.append(provider)
        self._right[m] = tuple(right)
        return points

    def time(self, m: int, dropout: float, mode: str) -> list[Point]:
        """A time row for every provider that was right at m tokens and takes part in the mode."""
        calls = self.calls(m, dropout, mode)
        if not calls:
            return []
        times = self._interleave(calls, m, mode)
        floors = {"": self._floor(m, mode, times.get("torch"))}
        if mode == "decode" and self.problem.device.type == "cuda":
            replayed = self._replay({name: call for name, call in calls.items() if name in times}, m)
            floors[GRAPH] = self._floor(m, mode, replayed.get("torch" + GRAPH))
            times |= replayed
        points = []
        for name, found in times.items():
            floor = floors[GRAPH if name.endswith(GRAPH) else ""]
            share = share_of_floor(floor, found.p50)
            points.append(self._point(name, mode, "time", m, found.p50, found.p20, found.p80, share, dropout))
        return points

    def peak_memory(
        self, m: int, dropout: float, modes: Iterable[str], cpu_memory: memory.CpuMemory | None
    ) -> list[Point]:
        """Peak memory of every provider that was right at m tokens."""
        points = []
        for provider in self._right[m]:
            taken = tuple(mode for mode in modes if mode in MEMORY_MODES and mode in self._modes(provider, m))
            layers = self._layers(provider, dropout) if taken else None
            if not layers:
                continue
            problem = self.operands.with_dropout(dropout).problem
            try:
                if cpu_memory is not None:
                    peaks = cpu_memory.peak(provider, problem, m, taken)
                else:
                    peaks = memory.peak_on_cuda(layers[0], problem, m, taken)
            except Exception as error:
                self._left_out(provider.name, m, "peak memory", error_line(error))
                continue
            points += [
                self._point(provider.name, mode, "peak_memory", m, peak / 1e6, dropout=dropout)
                for mode, peak in peaks.items()
            ]
        return points

    def launches(self, m: int, dropout: float, mode: str, names: set[str]) -> list[Point]:
        """How many kernels a call of these providers launches, on CUDA only. They are not judged again."""
        self._right[m] = tuple(provider for provider in self.providers if provider.name in names)
        points = []
        for name, call in self.calls(m, dropout, mode).items():
            try:
                for serial in range(2):
                    call.before(serial)
                    call(serial)
                found = cuda.count_launches(call, call.before)
            except Exception as error:
                self._left_out(name, m, f"{mode}, launches", error_line(error))
                continue
            points.append(self._point(name, mode, "launches", m, found, dropout=dropout))
        return points

    def calls(self, m: int, dropout: float, mode: str) -> dict[str, Call]:
        """Name -> call, of every provider that was right at m tokens and takes part in the mode."""
        if m not in self._right:
            self.judge(m)
        calls = {}
        for provider in self._right[m]:
            layers = self._layers(provider, dropout) if mode in self._modes(provider, m) else None
            if layers:
                calls[provider.name] = Call(layers, mode, self._inputs(m))
        return calls

    def _modes(self, provider: Provider, m: int) -> tuple[str, ...]:
        modes = provider.modes_for(self.problem.kernel)
        return modes if m <= DECODE_MAX_M else tuple(mode for mode in modes if mode != "decode")

    def _interleave(self, calls: dict[str, Call], m: int, mode: str) -> dict[str, Spread]:
        failures: dict[str, str] = {}
        found = interleave(
            calls,
            self.problem.device,
            self.effort.budget_s,
            self.effort.min_rounds,
            hide_launches=mode != "decode",
            failures=failures,
        )
        for name, error in failures.items():
            self._left_out(name, m, mode, error)
        return found

    def _replay(self, calls: dict[str, Call], m: int) -> dict[str, Spread]:
        """NAME-graph -> milliseconds a call, of those that a CUDA graph can hold."""
        graphs = {}
        for name, call in calls.items():
            try:
                graphs[name + GRAPH] = cuda.Graph(call.decoded, len(call.layers))
            except Exception as error:
                self._left_out(name + GRAPH, m, "decode", error_line(error))
        if not graphs:
            return {}
        device, effort = self.problem.device, self.effort
        found = interleave(graphs, device, effort.budget_s, effort.min_rounds)
        return {name: Spread(*(t / graphs[name].count for t in times)) for name, times in found.items()}

    def _layers(self, provider: Provider, dropout: float) -> list[LoraLayer] | None:
        """The provider's layers with this dropout, built once; None where it cannot take part."""
        key = (provider.name, dropout)
        if key not in self._built:
            operands = self.operands.with_dropout(dropout)
            if reason := provider.unavailable(operands.problem):
                self._built[key] = None
                self._say(f"{self.problem.kernel}: {provider.name} is left out: {reason}")
            else:
                self._built[key] = self._build(provider, operands)
        return self._built[key]

    def _build(self, provider: Provider, operands: Operands) -> list[LoraLayer] | None:
        try:
            return provider.build(operands)
        except Exception as error:
            print(f"LEFT OUT: {provider.name}, {operands.problem}: {error_line(error)}", file=sys.stderr, flush=True)
            self._require_device(provider.name)
            return None

    def _inputs(self, m: int) -> Inputs:
        p = self.problem
        if self._inputs_of[0] != m:
            copies = 1 if p.kernel == DEQUANTIZE else copies_past_cache(2 * m * (p.K + p.N), p.device)
            self._inputs_of = (m, [draw_inputs(p, m, grad=True, seed=copy) for copy in range(copies)])
        return self._inputs_of[1]

    def _floor(self, m: int, mode: str, bare: Spread | None) -> float | None:
        p = self.problem
        return floor_ms(p.kernel, mode, m, p.K, p.N, self.rates, bare.p50 if bare else None)

    def _left_out(self, name: str, m: int, what: str, error: str) -> None:
        print(f"LEFT OUT: {name}, {self.problem} M={m} {what}: {error}", file=sys.stderr, flush=True)
        self._require_device(name)

    def _require_device(self, name: str) -> None:
        """Raise where an error has broken the CUDA device, as a wild write does."""
        if self.problem.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.problem.device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(f"after {name} the CUDA device no longer answers: {error_line(error)}") from error

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(line, flush=True)

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
        dropout: float = 0.0,
    ) -> Point:
        p = self.problem
        return Point(p.kernel, provider, mode, metric, m, p.K, p.N, p.R, p50, p20, p80, share, dropout=dropout)
