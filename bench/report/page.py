"""One page with everything a run found: machine, goals, where a peer is faster, every time, pictures.

The page is one file: styles and pictures are inside it, and it loads nothing from the network. Predicted rows come from
files of their own and have a section of their own, with no picture and no comparison.
"""

import argparse
import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from bench.measure import rows
from bench.measure.machine import gb_per_s, tflop_per_s
from bench.measure.operands import KERNELS
from bench.measure.record import PREDICTED
from bench.measure.rows import Row
from bench.report import goals, plot
from bench.report.cases import FLOOR, MODES, Case, Run, case_of, comparisons, in_order
from bench.report.figures import LOOKS

SUMMARY = "one self-contained HTML page from the CSV: goals, tables, pictures, where a peer is faster"
_RANK = {kernel: i for i, kernel in enumerate(KERNELS)}
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headings, and rows of cells as HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); } th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; } td small { opacity: .65; } .best { font-weight: 700; }
.met { color: #00734f; } .missed { color: #b33a00; font-weight: 700; }
@media (prefers-color-scheme: dark) { .met { color: #4fd0a5; } .missed { color: #ff9a5c; } }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
summary { cursor: pointer; font-weight: 600; }
"""
_METRICS = {
    "launches": "Launches of a call",
    "peak_memory": "Peak memory of a call, MB above what was held before",
    "error": "Accuracy: worst error over the error allowed (above 1 is wrong)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench report`."""
    parser.add_argument("csv", nargs="*", type=Path, metavar="CSV", help="the newest kernels.csv under bench/results")
    parser.add_argument("--csv", dest="csv_option", nargs="+", type=Path, metavar="CSV", help="the same, as an option")
    parser.add_argument("--predicted", type=Path, metavar="CSV", help="predicted rows, in a section of their own")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html next to the first CSV)")


def run(arguments: argparse.Namespace) -> int:
    """Read, write the page, say where it is.

    Raises:
        ValueError: a CSV that is not there or holds measured and predicted rows at once, or nothing at all to show.
    """
    paths = [*arguments.csv, *(arguments.csv_option or [])] or [plot.newest_csv()]
    measured: list[Path] = []
    predicted: list[Path] = []
    for path in [*paths, *([arguments.predicted] if arguments.predicted else [])]:
        found = rows.read([path])
        marks = {row.predicted for row in found}
        if len(marks) > 1:
            raise ValueError(f"{path} mixes predicted rows with measured ones: keep them in files of their own")
        (predicted if marks == {True} else measured).append(path)
    out: Path = arguments.out or paths[0].with_name("report.html")
    text = page(rows.read(measured) if measured else [], rows.read(predicted) if predicted else [])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text) / 1e6:.1f} MB, nothing outside it is needed")
    return 0


def page(measured: list[Row], predicted: list[Row]) -> str:
    """The whole page."""
    devices = list(dict.fromkeys(row.device for row in sorted(measured, key=lambda row: row.timestamp, reverse=True)))
    parts = ["<h1>fastlora: measured against its peers and the machine's limits</h1>"]
    parts += [_device(device, [row for row in measured if row.device == device]) for device in devices]
    if predicted:
        parts.append(_predicted(predicted))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fastlora bench</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _device(device: str, found: list[Row]) -> str:
    sections = [
        f"<h2>{escape(device)}</h2>",
        _table(_facts(found), "facts"),
        "<h3>Goals</h3>",
        _table(_goals(found, device), "facts"),
        "<h3>Where a peer is faster</h3>",
        _slower(found),
        _wrong(found),
        "<h3>Times</h3><p>Milliseconds, median; small: share of the floor; bold: the fastest except the bare product; "
        "-graph: replayed from a CUDA graph.</p>",
        *_times(found),
        *_others(found),
        "<h3>Pictures</h3>",
        *(_picture(name, files["svg"]) for name, files in plot.draw(found, ("svg",)).items()),
    ]
    return "\n".join(sections)


def _facts(found: list[Row]) -> Table:
    stamps = sorted(row.timestamp for row in found)
    facts = [(name, ", ".join(sorted({getattr(row, name) for row in found}))) for name in ("torch", "triton", "commit")]
    facts += [("measured", f"{stamps[0]} to {stamps[-1]}"), ("rows", str(len(found)))]
    for row in found:
        if row.kernel == "copy":
            facts.append(("copy bandwidth", f"{gb_per_s(row):.1f} GB/s"))
        if row.kernel == "matmul":
            facts.append(("bf16 product", f"{tflop_per_s(row):.3g} TFLOP/s"))
    return ("fact", "value"), [(escape(name), escape(value)) for name, value in facts]


def _goals(found: list[Row], device: str) -> Table:
    cells = []
    for what, values, result in goals.verdicts(found, device):
        mark = result if result in ("met", "missed") else ""
        cells.append((escape(what), escape(values), f'<span class="{mark}">{result}</span>'))
    return ("goal", "found", "result"), cells


def _slower(found: list[Row]) -> str:
    compared = comparisons(found)
    faster = sorted((c for c in compared if c.speedup < 1), key=lambda c: c.speedup)  # the worst first
    if not faster:
        return "<p>Nowhere, among what was measured.</p>"
    cells = [
        (*_case_cells(c.case), c.ours, f"{c.ours_ms:.4g}", escape(c.peer), f"{c.peer_ms:.4g}", f"{c.speedup:.2f}")
        for c in faster
    ]
    headings = (*_CASE_HEADINGS, "ours", "ms", "peer", "ms", "peer's time over ours")
    return f"<p>{len(faster)} of {len(compared)} comparisons.</p>" + _table((headings, cells))


def _wrong(found: list[Row]) -> str:
    refused = Run(found).wrong()
    if not refused:
        return ""
    cells = [(*_case_cells(case_of(p)), escape(p.provider), f"{p.p50:.3g}") for p in refused]
    return "<h3>Wrong, and so not timed</h3>" + _table(((*_CASE_HEADINGS, "provider", "error over allowed"), cells))


_CASE_HEADINGS = ("kernel", "mode", "K → N", "M", "r", "p")


def _case_cells(case: Case) -> tuple[str, ...]:
    return (case.kernel, case.mode, case.shape, str(case.M), str(case.R), f"{case.dropout:g}")


def _times(found: list[Row]) -> Iterable[str]:
    cases = Run(found).cases()
    kinds = dict.fromkeys((case.kernel, case.mode) for case in sorted(cases, key=lambda c: (_RANK[c.kernel], c)))
    for kernel, mode in kinds:
        of_kind = {case: timed for case, timed in cases.items() if (case.kernel, case.mode) == (kernel, mode)}
        yield f"<h4>{kernel}, {MODES.get(mode, mode)}</h4>"
        yield _table(_grid(of_kind, _CASE_HEADINGS[2:], times=True))


def _others(found: list[Row]) -> Iterable[str]:
    for metric, title in _METRICS.items():
        cases = Run(found).cases(metric)
        if cases:
            yield f"<details><summary>{title}</summary>{_table(_grid(cases, _CASE_HEADINGS))}</details>"


def _grid(cases: Mapping[Case, Mapping[str, Row]], headings: Sequence[str], times: bool = False) -> Table:
    """A line a case, a column a provider; `headings` are the last of a case's columns that are shown."""
    providers = in_order((name for timed in cases.values() for name in timed), list(LOOKS))
    cells = []
    for case in sorted(cases):
        timed = cases[case]
        contest = {name: point.p50 for name, point in timed.items() if not name.startswith(FLOOR)}
        best = min(contest, key=lambda name: contest[name]) if times and contest else ""
        line = list(_case_cells(case)[-len(headings) :])
        for name in providers:
            line.append(_cell(timed.get(name), name == best))
        cells.append(line)
    return (*headings, *providers), cells


def _cell(point: Row | None, best: bool) -> str:
    if point is None:
        return "–"
    text = f"{point.p50:.4g}"
    if best:
        text = f'<span class="best">{text}</span>'
    return text if point.share_of_floor is None else f"{text} <small>{point.share_of_floor:.2f}</small>"


def _picture(name: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    title = escape(name.replace("_", " "))
    return f'<figure><img alt="{title}" src="data:image/svg+xml;base64,{data}"></figure>'


def _predicted(found: list[Row]) -> str:
    parts = [
        '<section id="predicted"><h2>Predicted, not measured</h2>',
        "<p>Computed by the floor model (bytes over bandwidth, FLOP over rate, launches; python -m bench predict) for "
        "machines that were not measured. Milliseconds; small: share of the floor.</p>",
    ]
    for device in dict.fromkeys(row.device for row in found):
        of_device = [row for row in found if row.device == device]
        cases = Run(of_device).cases()
        bare = {case: {n.removeprefix(PREDICTED): p for n, p in timed.items()} for case, timed in cases.items()}
        headings, cells = _grid(bare, _CASE_HEADINGS)
        marked = [f"predicted {name}" if name not in _CASE_HEADINGS else name for name in headings]
        parts.append(f"<details><summary>{escape(device)}</summary>{_table((marked, cells))}</details>")
    return "\n".join(parts) + "\n</section>"


def _table(content: Table, kind: str = "") -> str:
    headings, cells = content
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in cells)
    table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="{kind}">{table}</table></div>'
