"""The points of a run by case, and which of our rows is compared with which of a peer's.

fp32 adapters are compared with fp32 adapters, bf16 with bf16, a replayed graph with a replayed graph. bitsandbytes'
product has no LoRA in it, which favours it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from bench.measure.record import GRAPH, Point

FLOOR = "torch"
OURS = "fastlora-"
PRECISIONS = ("fp32", "bf16")  # of adapters
MODES = {
    "both": "forward + backward",
    "forward": "forward",
    "backward": "backward",
    "decode": "decode, nothing recorded",
}
_MACHINE = ("copy", "matmul")
_FP32_PEERS = ("peft-fp32",)
P = TypeVar("P", bound=Point)


class Case(NamedTuple):
    """What two providers are compared at."""

    kernel: str
    mode: str
    K: int
    N: int
    M: int
    R: int
    dropout: float

    @property
    def shape(self) -> str:
        """In and out features."""
        return f"{self.K} → {self.N}"

    def __str__(self) -> str:
        dropout = f" p={self.dropout:g}" if self.dropout else ""
        return f"{self.kernel} {self.K}x{self.N} M={self.M} r={self.R}{dropout} {self.mode}"


class Run(Generic[P]):
    """Points by metric, case and provider; rows of the machine's own copy and product are left out."""

    def __init__(self, points: Iterable[P]) -> None:
        self._found: dict[str, dict[Case, dict[str, P]]] = {}
        for point in points:
            if point.kernel not in _MACHINE:
                cases = self._found.setdefault(point.metric, {})
                cases.setdefault(case_of(point), {})[point.provider] = point

    def cases(self, metric: str = "time") -> dict[Case, dict[str, P]]:
        """Case -> provider -> point, of one metric."""
        return self._found.get(metric, {})

    def find(self, case: Case, provider: str) -> P | None:
        """The time of a provider; None where it was not measured."""
        return self.cases().get(case, {}).get(provider)

    def beside_peft(self, metric: str) -> Iterator[tuple[Case, str, P, P]]:
        """(case, precision, our point, peft's) wherever both were measured with adapters of one precision."""
        for case, found in self.cases(metric).items():
            for precision in PRECISIONS:
                ours, peft = found.get(f"{OURS}{precision}"), found.get(f"peft-{precision}")
                if ours and peft:
                    yield case, precision, ours, peft

    def wrong(self) -> list[P]:
        """Points of providers whose result broke the tolerance rule, which therefore were not timed."""
        return [point for found in self.cases("error").values() for point in found.values() if point.p50 > 1]


class Comparison(NamedTuple):
    """A peer's time over ours: above 1 we are faster."""

    case: Case
    ours: str
    peer: str
    ours_ms: float
    peer_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast as the peer."""
        return self.peer_ms / self.ours_ms


def case_of(point: Point) -> Case:
    """The case of a point."""
    return Case(point.kernel, point.mode, point.K, point.N, point.M, point.R, point.dropout)


def match(peer: str, providers: Iterable[str]) -> str | None:
    """Which of our providers a peer is compared with; None for our own, the floor, and where ours is absent."""
    if peer.startswith((OURS, FLOOR)):
        return None
    suffix = GRAPH if peer.endswith(GRAPH) else ""
    precision = "fp32" if peer.removesuffix(GRAPH) in _FP32_PEERS else "bf16"
    ours = f"{OURS}{precision}{suffix}"
    return ours if ours in providers else None


def comparisons(points: Iterable[Point]) -> list[Comparison]:
    """Every peer that was timed, with ours."""
    found = []
    for case, timed in Run(points).cases().items():
        for peer, point in timed.items():
            ours = match(peer, timed)
            if ours is not None:
                found.append(Comparison(case, ours, peer, timed[ours].p50, point.p50))
    return found


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Providers in the order in which they are always shown, graphs after all others."""
    known = {name: i for i, name in enumerate(order)}
    return sorted(
        set(names), key=lambda name: (name.endswith(GRAPH), known.get(name.removesuffix(GRAPH), len(known)), name)
    )
