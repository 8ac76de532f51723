"""Write the README's measured table and its picture from a benchmark CSV: no figure there is typed by hand.

Takes the newest row of each case. The table goes between the markers `<!-- measured -->` and `<!-- /measured -->`; the
picture shows forward + backward of peft, fastlora and the bare product.
"""

import argparse
from pathlib import Path

from bench.measure.models import parse_shape
from bench.measure.rows import Row, measured_on_one_device, read
from bench.report.cases import Case, Run
from bench.report.figures import training_bars

SUMMARY = "write the README's table and picture from the CSV"
START, END = "<!-- measured -->", "<!-- /measured -->"
NAMES = {"peft-fp32": "peft + bitsandbytes", "fastlora-fp32": "fastlora", "torch": "bare bf16 product"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench readme`."""
    parser.add_argument("--csv", type=Path, default=Path("bench/results/cpu/kernels.csv"))
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
    if START not in text or END not in text:
        raise ValueError(f"{arguments.readme} lacks the markers {START} and {END}")
    before, rest = text.split(START)
    table = "\n".join(markdown(times))
    arguments.readme.write_text(f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    training = {case: found for case, found in times.items() if (case.kernel, case.mode) == ("nf4_linear", "both")}
    title = f"LoRA linear over NF4, {k} to {n}, r={last.R}, forward + backward, {last.device}"
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    training_bars(training, NAMES, title).savefig(arguments.picture, dpi=110)
    return 0


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
