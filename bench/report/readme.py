"""Write the README's measured tables and its picture from benchmark CSVs: no figure there is typed by hand.

Takes the newest row of each case. The table of linears goes between the markers `<!-- measured -->` and
`<!-- /measured -->`, that of whole steps between `<!-- steps -->` and `<!-- /steps -->`; the picture shows forward +
backward of peft, fastlora and the bare product.
"""

import argparse
from pathlib import Path

from bench.measure.models import parse_shape
from bench.measure.rows import Row, measured_on_one_device, read
from bench.report.cases import Case, Run
from bench.report.figures import training_bars

SUMMARY = "write the README's table and picture from the CSV"
START, END = "<!-- measured -->", "<!-- /measured -->"
STEPS_START, STEPS_END = "<!-- steps -->", "<!-- /steps -->"
STEPS = {
    "peft": "peft",
    "fastlora": "`replace_linear`",
    "speed-up": "and `speed_up`",
    "speed-up-kept": "and `keep_linears`",
    "graphed": "all, replayed",
}
NAMES = {"peft-fp32": "peft + bitsandbytes", "fastlora-fp32": "fastlora", "torch": "bare bf16 product"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench readme`."""
    parser.add_argument("--csv", type=Path, default=Path("bench/results/cpu/kernels.csv"))
    parser.add_argument("--steps", type=Path, default=Path("bench/results/nvidia-h100-80gb-hbm3/steps.csv"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/cpu_linear.png"))
    parser.add_argument("--shape", default="4096x4096", metavar="KxN")


def run(arguments: argparse.Namespace) -> int:
    """Rewrite the table and the picture.

    Raises:
        ValueError: no such CSV, no rows for the shape, or a README without the markers.
    """
    k, n = parse_shape(arguments.shape)
    rows = measured_on_one_device(read([arguments.csv]))
    last = max(rows, key=lambda row: row.timestamp)
    times = case_times(rows, k, n, last.R)
    if not times:
        raise ValueError(f"{arguments.csv} has no times for {arguments.shape}: measure that shape first")
    text = arguments.readme.read_text(encoding="utf-8")
    for marker in (START, END, STEPS_START, STEPS_END):
        if marker not in text:
            raise ValueError(f"{arguments.readme} lacks the marker {marker}")
    text = _between(text, START, END, markdown(times))
    text = _between(text, STEPS_START, STEPS_END, steps_markdown(read([arguments.steps])))
    arguments.readme.write_text(text, encoding="utf-8")
    training = {case: found for case, found in times.items() if (case.kernel, case.mode) == ("nf4_linear", "both")}
    title = f"LoRA linear over NF4, {k} to {n}, r={last.R}, forward + backward, {last.device}"
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    training_bars(training, NAMES, title).savefig(arguments.picture, dpi=110)
    return 0


def _between(text: str, start: str, end: str, lines: list[str]) -> str:
    before, rest = text.split(start)
    table = "\n".join(lines)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def steps_markdown(rows: list[Row]) -> list[str]:
    """The table of `bench steps`, one line a case: wall time and the device's own, of the providers in `STEPS`."""
    found: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in rows:
        if row.metric == "time":
            found.setdefault((row.kernel, row.M), {})[row.provider, row.mode] = row.p50
    lines = [f"| model | base | tokens | {' | '.join(STEPS.values())} |"]
    lines.append("|---|---|---:" + "|---:" * len(STEPS) + "|")
    for (kernel, tokens), times in found.items():
        _, model, base = kernel.split("_")
        cells = (" ".join(_milliseconds(times, name)) or "–" for name in STEPS)
        lines.append(f"| {model} | {base.upper().replace('BF16', 'bf16')} | {tokens} | " + " | ".join(cells) + " |")
    return lines


def _milliseconds(times: dict[tuple[str, str], float], name: str) -> list[str]:
    """The wall time, and the device's own in parentheses; what was not measured is left out."""
    found = [(times.get((name, "step")), "{:.1f}"), (times.get((name, "kernels")), "({:.1f})")]
    return [form.format(ms) for ms, form in found if ms is not None]


def case_times(rows: list[Row], k: int, n: int, r: int) -> dict[Case, dict[str, float]]:
    """Median milliseconds by case and provider, NF4 first: cases of one shape and rank, no dropout, all of `NAMES`."""
    found = {
        case: {name: timed[name].p50 for name in NAMES}
        for case, timed in Run(rows).cases().items()
        if (case.K, case.N, case.R, case.dropout) == (k, n, r, 0) and set(NAMES) <= set(timed)
    }
    return dict(sorted(found.items(), key=lambda item: (item[0].kernel != "nf4_linear", item[0].M, item[0].mode)))


def markdown(times: dict[Case, dict[str, float]]) -> list[str]:
    """The table, one line a case."""
    lines = ["| base | M | pass | peft + bitsandbytes, ms | fastlora, ms | speed-up | bare bf16 product, ms |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for case, found in times.items():
        peft, ours, bare = (found[name] for name in NAMES)
        base = case.kernel.removesuffix("_linear").upper().replace("BF16", "bf16")
        passes = "forward + backward" if case.mode == "both" else case.mode
        lines.append(f"| {base} | {case.M} | {passes} | {peft:.3g} | {ours:.3g} | {peft / ours:.2f}x | {bare:.3g} |")
    return lines
