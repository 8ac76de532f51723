"""What a run found, as a table in the terminal: a line a case."""

from collections.abc import Callable

from bench.measure.record import GRAPH, Point
from bench.report.cases import PRECISIONS, Case, Run


def show(points: list[Point]) -> None:
    """Print milliseconds (decode: eager/replayed), speed over peft, share of the floor, peak memory."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("no table, because rich is not installed; every row is above, and in the CSV")
        return

    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    run = Run(points)
    wrong = {(_judged(point), point.provider) for point in run.wrong()}
    in_order = sorted(points, key=lambda point: point.metric != "time")
    providers = list(dict.fromkeys(point.provider.removesuffix(GRAPH) for point in in_order))
    grid = Table(title="milliseconds (median), LoRA linear; peak memory in MB", title_justify="left")
    grid.add_column("kernel KxN", no_wrap=True)
    for name in ("mode", "M", "r", "p"):
        grid.add_column(name, justify="right")
    for name in providers:
        grid.add_column(name.replace("-", "\n"), justify="right")
    for precision in PRECISIONS:
        grid.add_column(f"x peft\n{precision}", justify="right", style="bold")
    for name in ("of floor", "MB peft", "MB ours"):
        grid.add_column(f"{name}\nfp32/bf16", justify="right")
    for case, found in run.cases().items():
        cells = [f"{case.kernel} {case.K}x{case.N}", case.mode, str(case.M), str(case.R), f"{case.dropout:g}"]
        for name in providers:
            cells.append("[red]wrong[/red]" if (_judged(case), name) in wrong else _ms(found, name))
        cells += [_speedup(found, precision) for precision in PRECISIONS]
        cells.append(_pair(found, "fastlora", lambda point: f"{point.share_of_floor or float('nan'):.2f}"))
        for package in ("peft", "fastlora"):
            held = run.cases("peak_memory").get(case, {})
            cells.append(_pair(held, package, lambda point: f"{point.p50:.1f}"))
        grid.add_row(*cells)
    console.print(grid)


def _judged(case: Case | Point) -> tuple[str, int, int, int, int]:
    """What a provider is judged at, once for all modes and dropouts."""
    return case.kernel, case.K, case.N, case.M, case.R


def _ms(found: dict[str, Point], name: str) -> str:
    points = [found.get(name), *([found[name + GRAPH]] if name + GRAPH in found else [])]
    return "/".join(f"{point.p50:.3g}" if point else "-" for point in points)


def _speedup(found: dict[str, Point], precision: str) -> str:
    ours, peft = found.get(f"fastlora-{precision}"), found.get(f"peft-{precision}")
    return f"{peft.p50 / ours.p50:.2f}" if ours and peft else "-"


def _pair(found: dict[str, Point], package: str, text: Callable[[Point], str]) -> str:
    points = [found.get(f"{package}-{precision}") for precision in PRECISIONS]
    return "/".join(text(point) if point else "-" for point in points)
