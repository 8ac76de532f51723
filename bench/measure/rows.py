"""Reading the benchmark CSV: the newest row of each case, measured and predicted ones apart."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.measure.record import COLUMNS, PREDICTED, Point


@dataclass(frozen=True)
class Row(Point):
    """A point as it was recorded, with where and when."""

    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    timestamp: str = ""

    @property
    def predicted(self) -> bool:
        """Whether the row was computed, not measured."""
        return self.provider.startswith(PREDICTED)

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured, and on which machine: of several rows with one key the newest counts."""
        case = (self.kernel, self.provider, self.mode, self.metric, self.M, self.K, self.N, self.R, self.dropout)
        return (*case, self.dtype, self.device)


def read(paths: Iterable[Path]) -> list[Row]:
    """The newest row of each case, in the order of first appearance.

    Raises:
        ValueError: a file does not exist, is not a benchmark CSV, or has no rows.
    """
    newest: dict[tuple[object, ...], Row] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: measure first, with python -m bench kernels")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise ValueError(f"{path} is not a benchmark CSV: its first line must be {','.join(COLUMNS)}")
            for cells in reader:
                row = _row(cells, f"{path}, line {reader.line_num}")
                known = newest.get(row.key)
                if known is None or known.timestamp <= row.timestamp:
                    newest[row.key] = row
    if not newest:
        raise ValueError("the CSV holds no rows: measure first, with python -m bench kernels")
    return list(newest.values())


def measured_on_one_device(rows: list[Row], device: str | None = None) -> list[Row]:
    """The rows of one machine: the one named, or the one measured last.

    Raises:
        ValueError: a row among them was predicted, or that machine has no row.
    """
    if any(row.predicted for row in rows):
        raise ValueError("predicted rows are not mixed with measured ones: give a CSV that has measured rows only")
    device = device or max(rows, key=lambda row: row.timestamp).device
    found = [row for row in rows if row.device == device]
    if not found:
        raise ValueError(f"no rows of {device!r}; there are {', '.join(sorted({row.device for row in rows}))}")
    return found


def _row(cells: dict[str, str], where: str) -> Row:
    try:
        return Row(
            kernel=cells["kernel"],
            provider=cells["provider"],
            mode=cells["mode"],
            metric=cells["metric"],
            M=int(cells["M"]),
            K=int(cells["K"]),
            N=int(cells["N"]),
            R=int(cells["R"]),
            p50=float(cells["p50"]),
            p20=_optional(cells["p20"]),
            p80=_optional(cells["p80"]),
            share_of_floor=_optional(cells["share_of_floor"]),
            dropout=float(cells["dropout"]),
            dtype=cells["dtype"],
            device=cells["device"],
            torch=cells["torch"],
            triton=cells["triton"],
            commit=cells["commit"],
            timestamp=cells["timestamp"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _optional(cell: str) -> float | None:
    return float(cell) if cell else None


def gb_per_s(copy: Point) -> float:
    """Copy bandwidth of a `copy` row, bytes read and written both counted."""
    return 4 * copy.M * copy.K / copy.p50 / 1e6


def tflop_per_s(product: Point) -> float:
    """Rate of a product's row, forward: 2 M N K FLOP."""
    return 2 * product.M * product.K * product.N / product.p50 / 1e9
