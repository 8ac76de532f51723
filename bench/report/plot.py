"""Draw a run from its CSV and nothing else: speedup bars, the roofline, the share of the floor against M.

Each picture is written as PNG and SVG. Predicted rows are refused: pictures show what was measured.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib

from bench.measure import rows
from bench.report.figures import all_figures

SUMMARY = "pictures of a run, from its CSV: speedup, roofline, share of the floor"
_RC: dict[Any, Any] = {"svg.hashsalt": "fastlora", "svg.fonttype": "path", "hatch.linewidth": 0.6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench plot`."""
    parser.add_argument("csv", nargs="?", type=Path, metavar="CSV", help="the newest kernels.csv under bench/results")
    parser.add_argument("--csv", dest="csv_option", type=Path, metavar="CSV", help="the same, as an option")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (plots/ next to the CSV)")
    parser.add_argument("--device", metavar="NAME", help="which machine's rows, where a CSV has several (the last)")


def run(arguments: argparse.Namespace) -> int:
    """Draw and write.

    Raises:
        ValueError: no such CSV, no rows that can be drawn, or predicted ones among them.
    """
    path = arguments.csv_option or arguments.csv or newest_csv()
    found = rows.measured_on_one_device(rows.read([path]), arguments.device)
    pictures = draw(found)
    if not pictures:
        raise ValueError(f"{path} has no times of a linear kernel to draw")
    out: Path = arguments.out or path.parent / "plots"
    out.mkdir(parents=True, exist_ok=True)
    for name, files in pictures.items():
        for kind, content in files.items():
            (out / f"{name}.{kind}").write_bytes(content)
    print(f"{', '.join(pictures)}: PNG and SVG in {out}")
    return 0


def newest_csv(folder: Path = Path("bench/results")) -> Path:
    """The kernels.csv last written.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.glob("*/kernels.csv"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no kernels.csv under {folder}: measure first, with python -m bench kernels, or name a CSV")
    return found[-1]


def draw(found: list[rows.Row], formats: tuple[str, ...] = ("png", "svg")) -> dict[str, dict[str, bytes]]:
    """Name -> format -> file of every picture that the rows have something for; the same bytes for the same rows."""
    pictures = {}
    with matplotlib.rc_context(_RC):
        for name, figure in all_figures(found).items():
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, for every file
            pictures[name] = {kind: _file(figure, kind) for kind in formats}
    return pictures


def _file(figure: Any, kind: str) -> bytes:
    file = io.BytesIO()
    no_date = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    figure.savefig(file, format=kind, dpi=130, metadata=no_date[kind])
    return file.getvalue()
