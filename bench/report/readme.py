"""Write the README's measured table and its picture from a benchmark CSV: no figure there is typed by hand.

Takes the newest run in the CSV. The table goes between the markers `<!-- measured -->` and
`<!-- /measured -->`; the picture shows forward + backward of peft, fastlora and the bare product.
"""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

SUMMARY = "write the README's table and picture from the CSV"
START, END = "<!-- measured -->", "<!-- /measured -->"
PROVIDERS = ("peft-fp32", "fastlora-fp32", "torch")
LABELS = {"peft-fp32": "peft + bitsandbytes", "fastlora-fp32": "fastlora", "torch": "bare bf16 product"}
COLORS = {"peft-fp32": "#b0b7c3", "fastlora-fp32": "#2a6fdb", "torch": "#e8c468"}

Case = tuple[str, int, int, int, str]  # kernel, K, N, M, mode


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
    if not arguments.csv.is_file():
        raise ValueError(f"{arguments.csv} does not exist: measure first, with python -m bench kernels")
    k, n = map(int, arguments.shape.split("x"))
    with arguments.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = newest_times(rows, k, n)
    if not times:
        raise ValueError(f"{arguments.csv} has no times for {arguments.shape}: measure that shape first")
    text = arguments.readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise ValueError(f"{arguments.readme} lacks the markers {START} and {END}")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    table = "\n".join(markdown(times))
    arguments.readme.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    draw(
        times,
        arguments.picture,
        f"LoRA linear over NF4, {k} to {n}, r={rows[-1]['R']}, forward + backward, {rows[-1]['device']}",
    )
    return 0


def newest_times(rows: Iterable[dict[str, str]], k: int, n: int) -> dict[Case, dict[str, float]]:
    """Median milliseconds by case and provider; of several runs the last counts."""
    times: dict[Case, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "time" and (int(row["K"]), int(row["N"])) == (k, n) and float(row["dropout"]) == 0:
            case = (row["kernel"], k, n, int(row["M"]), row["mode"])
            times.setdefault(case, {})[row["provider"]] = float(row["p50"])
    return {case: found for case, found in times.items() if set(PROVIDERS) <= set(found)}


def markdown(times: dict[Case, dict[str, float]]) -> list[str]:
    """The table, one line a case."""
    lines = ["| base | M | pass | peft + bitsandbytes, ms | fastlora, ms | speed-up | bare bf16 product, ms |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|")
    for (kernel, _, _, m, mode), found in sorted(times.items(), key=lambda item: (item[0][0] != "nf4_linear", item[0])):
        peft, ours, bare = (found[name] for name in PROVIDERS)
        base = kernel.removesuffix("_linear").upper().replace("BF16", "bf16")
        passes = "forward + backward" if mode == "both" else mode
        lines.append(f"| {base} | {m} | {passes} | {peft:.3g} | {ours:.3g} | {peft / ours:.2f}x | {bare:.3g} |")
    return lines


def draw(times: dict[Case, dict[str, float]], path: Path, title: str) -> None:
    """Bars of forward + backward over an NF4 base, a group for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted(case for case in times if case[0] == "nf4_linear" and case[4] == "both")
    figure, axes = pyplot.subplots(figsize=(8, 3.6), dpi=110)
    width = 0.27
    for offset, name in enumerate(PROVIDERS):
        heights = [times[case][name] for case in cases]
        places = [index + (offset - 1) * width for index in range(len(cases))]
        bars = axes.bar(places, heights, width * 0.92, label=LABELS[name], color=COLORS[name])
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(cases)), [f"M = {case[3]}" for case in cases])
    axes.set_ylabel("milliseconds, log scale")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
