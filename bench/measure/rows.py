"""Reading the benchmark CSV: the newest row of each case, measured and predicted ones apart."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.measure.record import COLUMNS, COUNTED, PREDICTED, Point


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
        return self.provider.startswith((PREDICTED, COUNTED))

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
        return Row(**{field.name: _READ.get(field.type, _optional)(cells[field.name]) for field in fields(Row)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _optional(cell: str) -> float | None:
    return float(cell) if cell else None


_READ: dict[Any, Callable[[str], Any]] = {str: str, int: int, float: float}  # by the type of a field
