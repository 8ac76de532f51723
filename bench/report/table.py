"""What a run found, for a reader: one line a shape, and whether the aims are met."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.measure.record import GRAPH, Point

PRECISIONS = ("fp32", "bf16")
AIM_LARGE_M, AIM_SPEEDUP = 1024, 1.2
MEMORY_GRAIN_MB, MEMORY_GRAIN_SHARE = 0.5, 0.01  # what two runs of the same call differ by


class Case(NamedTuple):
    """What two providers are compared at."""

    kernel: str
    K: int
    N: int
    M: int
    R: int
    dropout: float
    mode: str

    def __str__(self) -> str:
        dropout = f" p={self.dropout:g}" if self.dropout else ""
        return f"{self.kernel} {self.K}x{self.N} M={self.M} r={self.R}{dropout} {self.mode}"


class Ratio(NamedTuple):
    """A comparison of fastlora with peft of the same adapter dtype."""

    value: float
    case: Case
    precision: str

    def __str__(self) -> str:
        return f"{self.value:.2f} at {self.case}, {self.precision} adapters"


def _cases(points: Iterable[Point], metric: str) -> dict[Case, dict[str, Point]]:
    cases: dict[Case, dict[str, Point]] = {}
    for point in points:
        if point.metric == metric:
            case = Case(point.kernel, point.K, point.N, point.M, point.R, point.dropout, point.mode)
            cases.setdefault(case, {})[point.provider] = point
    return cases


def show(points: list[Point]) -> None:
    """Print the table: milliseconds (decode: eager/replayed), speed over peft, share of the floor, peak memory."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("no table, for rich is not installed: every row is above, and in the CSV")
        return

    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    timed, held, judged = (_cases(points, metric) for metric in ("time", "peak_memory", "error"))
    in_order = sorted(points, key=lambda point: point.metric != "time")
    providers = list(dict.fromkeys(point.provider.removesuffix(GRAPH) for point in in_order))
    wrong = {(case[:5], name) for case, found in judged.items() for name, point in found.items() if point.p50 > 1}
    grid = Table(title="milliseconds (median), LoRA linear; peak memory in MB", title_justify="left")
    grid.add_column("kernel KxN", no_wrap=True)
    for name in ("mode", "M", "r", "p"):
        grid.add_column(name, justify="right")
    for name in providers:
        grid.add_column(name.replace("-", "\n"), justify="right")
    for precision in PRECISIONS:
        grid.add_column(f"x peft\n{precision}", justify="right", style="bold")
    grid.add_column("of floor\nfp32/bf16", justify="right")
    grid.add_column("MB peft\nfp32/bf16", justify="right")
    grid.add_column("MB ours\nfp32/bf16", justify="right")
    for case, found in timed.items():
        cells = [f"{case.kernel} {case.K}x{case.N}", case.mode, str(case.M), str(case.R), f"{case.dropout:g}"]
        for name in providers:
            cells.append(_ms(found, name) if (case[:5], name) not in wrong else "[red]wrong[/red]")
        cells += [_speedup(found, precision) for precision in PRECISIONS]
        cells.append(_pair(found, "fastlora", lambda point: f"{point.share_of_floor or float('nan'):.2f}"))
        for package in ("peft", "fastlora"):
            cells.append(_pair(held.get(case, {}), package, lambda point: f"{point.p50:.1f}"))
        grid.add_row(*cells)
    console.print(grid)


def _ms(found: dict[str, Point], name: str) -> str:
    points = [found.get(name), *([found[name + GRAPH]] if name + GRAPH in found else [])]
    return "/".join(f"{point.p50:.3g}" if point else "-" for point in points)


def _speedup(found: dict[str, Point], precision: str) -> str:
    ours, peft = found.get(f"fastlora-{precision}"), found.get(f"peft-{precision}")
    return f"{peft.p50 / ours.p50:.2f}" if ours and peft else "-"


def _pair(found: dict[str, Point], package: str, text: Callable[[Point], str]) -> str:
    points = [found.get(f"{package}-{precision}") for precision in PRECISIONS]
    return "/".join(text(point) if point else "-" for point in points)


def ratios(points: list[Point], metric: str) -> list[Ratio]:
    """peft's figure over fastlora's, wherever both were measured: above 1, ours is the smaller."""
    return [
        Ratio(found[f"peft-{precision}"].p50 / found[f"fastlora-{precision}"].p50, case, precision)
        for case, found in _cases(points, metric).items()
        for precision in PRECISIONS
        if f"peft-{precision}" in found and f"fastlora-{precision}" in found
    ]


def verdict(points: list[Point]) -> list[str]:
    """Whether each aim is met, with the worst case; "not measured" where the run does not tell."""
    times = ratios(points, "time")
    lines = [_aim("no shape slower than peft + bitsandbytes", times, [r for r in times if r.value < 1])]
    for kernel in dict.fromkeys(ratio.case.kernel for ratio in times):
        large = [r for r in times if r.case.kernel == kernel and r.case.M >= AIM_LARGE_M and r.case.mode == "both"]
        what = f"{kernel}, forward+backward at M={AIM_LARGE_M} at least {AIM_SPEEDUP}x"
        lines.append(_aim(what, large, [r for r in large if r.value < AIM_SPEEDUP]))
    wrong = [point for point in points if point.metric == "error" and point.p50 > 1]
    right = f"every provider within tolerance: {'no, wrong: ' + _names(wrong) if wrong else 'yes'}"
    return [*lines, _memory_aim(points), right]


def _aim(what: str, measured: list[Ratio], missed: list[Ratio]) -> str:
    if not measured:
        return f"{what}: not measured"
    if not missed:
        return f"{what}: yes (least {min(measured)})"
    return f"{what}: no, {len(missed)} of {len(measured)}: " + "; ".join(map(str, sorted(missed)))


def _memory_aim(points: list[Point]) -> str:
    what, measured, above = "peak memory never above peft + bitsandbytes", 0, []
    for case, found in _cases(points, "peak_memory").items():
        for precision in PRECISIONS:
            ours, peft = found.get(f"fastlora-{precision}"), found.get(f"peft-{precision}")
            if ours is None or peft is None:
                continue
            measured += 1
            if ours.p50 > peft.p50 * (1 + MEMORY_GRAIN_SHARE) + MEMORY_GRAIN_MB:
                above.append(f"{ours.p50:.1f} MB against {peft.p50:.1f} at {case}, {precision} adapters")
    if not measured:
        return f"{what}: not measured"
    return f"{what}: {f'no, {len(above)} of {measured}: ' + '; '.join(above) if above else 'yes'}"


def _names(points: list[Point]) -> str:
    return "; ".join(f"{p.provider} {p.kernel} {p.K}x{p.N} M={p.M} ({p.p50:.3g} of the limit)" for p in points)
