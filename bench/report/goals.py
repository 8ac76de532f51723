"""What fastlora set out to reach, and whether a run shows it: met, missed, or not measured.

Every figure is a ratio of medians from one run, except that of memory. Where both adapter dtypes were measured, both
must reach the goal. Some goals hold on every machine, in every case that a run has; others are for one case on a GPU,
or on a CPU.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from bench.measure.operands import DEQUANTIZE, KERNELS, LINEAR_KERNELS, MODES
from bench.measure.record import GRAPH, Point
from bench.report.cases import OURS, PRECISIONS, Case, Run

LARGE_M = 8192
LEAST_M, LEAST_SPEEDUP = 1024, 1.2
MEMORY_GRAIN_MB, MEMORY_GRAIN_SHARE = 0.5, 0.01  # what two runs of the same call differ by
_FEW = 3  # ratios that are all shown
Found: TypeAlias = list[tuple[str, float]]  # what was compared, and the ratio
Find: TypeAlias = Callable[[Run[Point]], Found]


@dataclass(frozen=True)
class Goal:
    """One goal: `find` gives the ratios that a run has for it; they must be at most, or at least, `bound`."""

    what: str
    bound: float
    at_most: bool
    find: Find

    def is_met(self, value: float) -> bool:
        """Whether a ratio is on the right side of the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def verdict(self, run: Run[Point]) -> tuple[str, str, str]:
        """(goal, what was found, "met", "missed" or "not measured")."""
        found = self.find(run)
        bound = f"{self.what}: at {'most' if self.at_most else 'least'} {self.bound:g}"
        if not found:
            return bound, "", "not measured"
        return bound, self._shown(found), "met" if all(self.is_met(value) for _, value in found) else "missed"

    def _shown(self, found: Found) -> str:
        """All ratios where they are few; of many those that miss the bound, or the worst."""
        if len(found) <= _FEW:
            return ", ".join(f"{name} {value:.2f}" for name, value in found)
        worst_first = sorted(found, key=lambda pair: pair[1], reverse=self.at_most)
        missed = [f"{value:.2f} {name}" for name, value in worst_first if not self.is_met(value)]
        if missed:
            return f"{len(missed)} of {len(found)}: " + "; ".join(missed)
        return f"worst of {len(found)}: {worst_first[0][1]:.2f} {worst_first[0][0]}"


def _nf4(mode: str, m: int, k: int, n: int, dropout: float = 0.0) -> Case:
    return Case("nf4_linear", mode, k, n, m, 16, dropout)


def _ratios(case: Case, above: str, below: str, names: dict[str, str]) -> Find:
    """The time of one provider over another's; {} in their names stands for each key of `names`, key -> shown name."""

    def find(run: Run[Point]) -> Found:
        found: Found = []
        for key, name in names.items():
            over, under = run.find(case, above.format(key)), run.find(case, below.format(key))
            found += [(name, over.p50 / under.p50)] if over and under else []
        return found

    return find


def _over_bare(m: int, k: int, n: int, dropout: float) -> Find:
    return _ratios(_nf4("both", m, k, n, dropout), f"{OURS}{{}}", "torch", {p: p for p in PRECISIONS})


def _against(peer: str, ours: str, mode: str, m: int, k: int, n: int) -> Find:
    names = {GRAPH: "replayed", "": "eager"} if mode == "decode" else {"": ours}
    return _ratios(_nf4(mode, m, k, n), f"{peer}{{}}", f"{ours}{{}}", names)


def _over_decode_floor(run: Run[Point]) -> Found:
    points = {p: run.find(_nf4("decode", 1, 4096, 14336), f"{OURS}{p}{GRAPH}") for p in PRECISIONS}
    return [(p, 1 / point.share_of_floor) for p, point in points.items() if point and point.share_of_floor]


def _against_expanding(run: Run[Point]) -> Found:
    case = _nf4("forward", 256, 4096, 14336)
    expanding = run.find(case._replace(kernel=DEQUANTIZE, M=0, R=0), "fastlora-bf16")
    bare = run.find(case, "torch")
    if expanding is None or bare is None:
        return []
    ours = {p: run.find(case, OURS + p) for p in PRECISIONS}
    return [(p, (expanding.p50 + bare.p50) / point.p50) for p, point in ours.items() if point]


def _against_peft(kernels: tuple[str, ...] = KERNELS, modes: tuple[str, ...] = MODES, least_m: int = 0) -> Find:
    def find(run: Run[Point]) -> Found:
        return [
            (f"{case}, {precision} adapters", peft.p50 / ours.p50)
            for case, precision, ours, peft in run.beside_peft("time")
            if case.kernel in kernels and case.mode in modes and least_m <= case.M
        ]

    return find


def _memory_above_peft(run: Run[Point]) -> Found:
    return [
        (
            f"at {case}, {precision} adapters: {ours.p50:.1f} MB against {peft.p50:.1f}",
            ours.p50 - peft.p50 * (1 + MEMORY_GRAIN_SHARE) - MEMORY_GRAIN_MB,
        )
        for case, precision, ours, peft in run.beside_peft("peak_memory")
    ]


def _errors(run: Run[Point]) -> Found:
    return [
        (f"{name}, {case}", point.p50) for case, found in run.cases("error").items() for name, point in found.items()
    ]


def _our_worst_error(run: Run[Point]) -> Found:
    errors = [value for name, value in _errors(run) if name.startswith("fastlora")]
    return [("worst error over the error allowed", max(errors))] if errors else []


def _over_bare_goals() -> list[Goal]:
    goals = []
    for p, bounds in ((0.0, (1.12, 1.08, 1.06)), (0.1, (1.17, 1.12, 1.08))):
        for (k, n), bound in zip(((4096, 4096), (4096, 14336), (8192, 28672)), bounds, strict=True):
            what = f"forward+backward over two bare products, {k}x{n}, M={LARGE_M}, p={p:g}"
            goals.append(Goal(what, bound, True, _over_bare(LARGE_M, k, n, p)))
    return goals


def _against_goal(what: str, bound: float, peer: str, ours: str, mode: str, m: int, k: int, n: int) -> Goal:
    return Goal(f"{what}, {k}x{n}, M={m}, {mode}", bound, False, _against(peer, ours, mode, m, k, n))


EVERYWHERE = (
    Goal("peft's time over ours, every case", 1.0, False, _against_peft()),
    *(
        Goal(
            f"peft's time over ours, {kernel}, forward+backward, M from {LEAST_M}",
            LEAST_SPEEDUP,
            False,
            _against_peft((kernel,), ("both",), LEAST_M),
        )
        for kernel in LINEAR_KERNELS
    ),
    Goal("MB of peak memory above peft's, beyond what two runs differ by", 0.0, True, _memory_above_peft),
    Goal("error over the error allowed, every provider", 1.0, True, _errors),
    Goal("never less accurate than the bf16 reference by the tests' rule", 1.0, True, _our_worst_error),
)
GPU_GOALS = (
    *_over_bare_goals(),
    _against_goal("times as fast as peft", 1.3, "peft-bf16", "fastlora-bf16", "both", LARGE_M, 4096, 4096),
    _against_goal("times as fast as peft", 1.6, "peft-fp32", "fastlora-fp32", "both", LARGE_M, 4096, 4096),
    _against_goal("times as fast as unsloth", 1.1, "unsloth", "fastlora-bf16", "both", LARGE_M, 4096, 4096),
    Goal("decode over its floor, 4096x14336, M=1, replayed", 1.6, True, _over_decode_floor),
    _against_goal("times as fast as peft + bitsandbytes", 2.0, "peft-eval", "fastlora-bf16", "decode", 1, 4096, 14336),
    Goal("times as fast as expanding and a product, 4096x14336, M=256, forward", 1.5, False, _against_expanding),
    *EVERYWHERE,
)
CPU_GOALS = (
    _against_goal("times as fast as peft", 5.0, "peft-fp32", "fastlora-fp32", "forward", 1, 4096, 4096),
    _against_goal("times as fast as peft", 1.8, "peft-fp32", "fastlora-fp32", "both", 256, 4096, 4096),
    _against_goal("times as fast as peft", 1.6, "peft-fp32", "fastlora-fp32", "both", 1024, 4096, 4096),
    Goal(
        "forward+backward over two bare products, 4096x4096, M=1024", 1.15, True, _over_bare(1024, 4096, 4096, 0.0)
    ),
    *EVERYWHERE,
)  # fmt: skip


def verdicts(points: Iterable[Point], device: str) -> list[tuple[str, str, str]]:
    """(goal, what was found, "met", "missed" or "not measured") of the goals that a machine of this name has."""
    run = Run(points)
    return [goal.verdict(run) for goal in (CPU_GOALS if device.endswith("threads)") else GPU_GOALS)]


def verdict(points: Iterable[Point], device: str) -> list[str]:
    """The same as lines to print."""
    return [f"{result}: {what}{f' ({found})' if found else ''}" for what, found, result in verdicts(points, device)]
