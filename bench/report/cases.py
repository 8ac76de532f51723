"""fastlora beside each peer, case by case: which of our rows is compared with which of theirs.

fp32 adapters are compared with fp32 adapters, bf16 with bf16, a replayed graph with a replayed graph. bitsandbytes'
product has no LoRA in it, which favours it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from bench.measure.record import GRAPH, Point

FLOOR = "torch"
OURS = "fastlora-"
P = TypeVar("P", bound=Point)
_FP32_PEERS = ("peft-fp32",)


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


class Comparison(NamedTuple):
    """A peer's time over ours: above 1 we are the quicker."""

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


def by_case(points: Iterable[P], metric: str = "time") -> dict[Case, dict[str, P]]:
    """Case -> provider -> point, of one metric; the machine's own copy and product are left out."""
    cases: dict[Case, dict[str, P]] = {}
    for point in points:
        if point.metric == metric and point.kernel not in ("copy", "matmul"):
            cases.setdefault(case_of(point), {})[point.provider] = point
    return cases


def match(peer: str, providers: Iterable[str]) -> str | None:
    """Which of our providers a peer is compared with; None for our own, the floor, and where ours is absent."""
    if peer.startswith((OURS, FLOOR)):
        return None
    suffix = GRAPH if peer.endswith(GRAPH) else ""
    precision = "fp32" if peer.removesuffix(GRAPH) in _FP32_PEERS else "bf16"
    ours = f"{OURS}{precision}{suffix}"
    return ours if ours in providers else None


def comparisons(points: Iterable[Point]) -> list[Comparison]:
    """Every peer that was timed, beside ours."""
    found = []
    for case, timed in by_case(points).items():
        for peer, point in timed.items():
            ours = match(peer, timed)
            if ours is not None:
                found.append(Comparison(case, ours, peer, timed[ours].p50, point.p50))
    return found


def slower(points: Iterable[Point]) -> list[Comparison]:
    """Where a peer is quicker, the worst first."""
    return sorted((c for c in comparisons(points) if c.speedup < 1), key=lambda c: c.speedup)


def wrong(points: Iterable[Point]) -> list[Point]:
    """Providers whose result broke the tolerance rule, and so were not timed."""
    return [point for point in points if point.metric == "error" and point.p50 > 1]


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Providers in the order in which they are always shown, graphs after all others."""
    known = {name: i for i, name in enumerate(order)}
    return sorted(
        set(names), key=lambda name: (name.endswith(GRAPH), known.get(name.removesuffix(GRAPH), len(known)), name)
    )
