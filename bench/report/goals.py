"""What fastlora set out to reach, and whether a run shows it: met, missed, or not measured.

Every figure is a ratio of medians from one run. Where both adapter dtypes were measured, both must reach the goal.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.measure.operands import DEQUANTIZE
from bench.measure.record import GRAPH, Point

PRECISIONS = ("fp32", "bf16")
LARGE_M = 8192
Found = list[tuple[str, float]]  # what was compared, and the ratio


class Index:
    """Medians by what was measured."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = list(points)
        self._times = {
            (p.kernel, p.provider, p.mode, p.M, p.K, p.N, p.R, p.dropout): p for p in self.points if p.metric == "time"
        }

    def ms(
        self, kernel: str, provider: str, mode: str, m: int, k: int, n: int, dropout: float = 0.0, r: int = 16
    ) -> float | None:
        """The median time of one row; None where it was not measured."""
        found = self._times.get((kernel, provider, mode, m, k, n, r, dropout))
        return found.p50 if found else None

    def share(self, kernel: str, provider: str, mode: str, m: int, k: int, n: int) -> float | None:
        """Its share of the floor."""
        found = self._times.get((kernel, provider, mode, m, k, n, 16, 0.0))
        return found.share_of_floor if found else None


@dataclass(frozen=True)
class Goal:
    """One goal: `find` gives the ratios that a run has for it; they must be at most, or at least, `bound`."""

    what: str
    bound: float
    at_most: bool
    find: Callable[[Index], Found]

    def met(self, found: Found) -> bool:
        """Whether every ratio found is on the right side of the bound."""
        return all((value <= self.bound) if self.at_most else (value >= self.bound) for _, value in found)

    def verdict(self, index: Index) -> tuple[str, str, str]:
        """(goal, what was found, "met", "missed" or "not measured")."""
        found = self.find(index)
        bound = f"at {'most' if self.at_most else 'least'} {self.bound:g}"
        if not found:
            return f"{self.what}: {bound}", "", "not measured"
        shown = ", ".join(f"{name} {value:.2f}" for name, value in found)
        return f"{self.what}: {bound}", shown, "met" if self.met(found) else "missed"


def _ratio(above: float | None, below: float | None, name: str) -> Found:
    return [(name, above / below)] if above and below else []


def _over_bare(m: int, k: int, n: int, dropout: float) -> Callable[[Index], Found]:
    def find(index: Index) -> Found:
        found: Found = []
        for precision in PRECISIONS:
            ours = index.ms("nf4_linear", f"fastlora-{precision}", "both", m, k, n, dropout)
            found += _ratio(ours, index.ms("nf4_linear", "torch", "both", m, k, n, dropout), precision)
        return found

    return find


def _against(peer: str, ours: str, mode: str, m: int, k: int, n: int) -> Callable[[Index], Found]:
    def find(index: Index) -> Found:
        found: Found = []
        for suffix, name in ((GRAPH, "replayed"), ("", "eager")) if mode == "decode" else (("", ours),):
            theirs = index.ms("nf4_linear", peer + suffix, mode, m, k, n)
            found += _ratio(theirs, index.ms("nf4_linear", ours + suffix, mode, m, k, n), name)
        return found

    return find


def _over_decode_floor(index: Index) -> Found:
    shares = ((p, index.share("nf4_linear", f"fastlora-{p}{GRAPH}", "decode", 1, 4096, 14336)) for p in PRECISIONS)
    return [(precision, 1 / share) for precision, share in shares if share]


def _against_expanding(index: Index) -> Found:
    shape = (4096, 14336)
    expanding = index.ms(DEQUANTIZE, "fastlora-bf16", "forward", 0, *shape, r=0)
    bare = index.ms("nf4_linear", "torch", "forward", 256, *shape)
    if expanding is None or bare is None:
        return []
    found: Found = []
    for precision in PRECISIONS:
        ours = index.ms("nf4_linear", f"fastlora-{precision}", "forward", 256, *shape)
        found += _ratio(expanding + bare, ours, precision)
    return found


def _error(index: Index) -> Found:
    errors = [p.p50 for p in index.points if p.metric == "error" and p.provider.startswith("fastlora")]
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


ACCURACY = Goal("never less accurate than the bf16 reference by the tests' rule", 1.0, True, _error)
GPU_GOALS = (
    *_over_bare_goals(),
    _against_goal("times as fast as peft", 1.3, "peft-bf16", "fastlora-bf16", "both", LARGE_M, 4096, 4096),
    _against_goal("times as fast as peft", 1.6, "peft-fp32", "fastlora-fp32", "both", LARGE_M, 4096, 4096),
    _against_goal("times as fast as unsloth", 1.1, "unsloth", "fastlora-bf16", "both", LARGE_M, 4096, 4096),
    Goal("decode over its floor, 4096x14336, M=1, replayed", 1.6, True, _over_decode_floor),
    _against_goal("times as fast as peft + bitsandbytes", 2.0, "peft-eval", "fastlora-bf16", "decode", 1, 4096, 14336),
    Goal("times as fast as expanding and a product, 4096x14336, M=256, forward", 1.5, False, _against_expanding),
    ACCURACY,
)
CPU_GOALS = (
    _against_goal("times as fast as peft", 5.0, "peft-fp32", "fastlora-fp32", "forward", 1, 4096, 4096),
    _against_goal("times as fast as peft", 1.8, "peft-fp32", "fastlora-fp32", "both", 256, 4096, 4096),
    _against_goal("times as fast as peft", 1.6, "peft-fp32", "fastlora-fp32", "both", 1024, 4096, 4096),
    Goal(
        "forward+backward over two bare products, 4096x4096, M=1024", 1.15, True, _over_bare(1024, 4096, 4096, 0.0)
    ),
    ACCURACY,
)  # fmt: skip


def verdicts(points: Iterable[Point], device: str) -> list[tuple[str, str, str]]:
    """(goal, what was found, "met", "missed" or "not measured") of the goals that a machine of this name has."""
    index = Index(points)
    return [goal.verdict(index) for goal in (CPU_GOALS if device.endswith("threads)") else GPU_GOALS)]


def verdict(points: Iterable[Point], device: str) -> list[str]:
    """The same as lines to print."""
    return [f"{result}: {what}{f' ({found})' if found else ''}" for what, found, result in verdicts(points, device)]
