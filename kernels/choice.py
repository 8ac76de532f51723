"""Which kernel runs a product over an NF4 weight, and how the low-rank kernels are tiled: a table, not a search.

`choice.csv`, next to this file, has one row for a rung of M. Its columns:

    gpu       a GPU's name as torch reports it ("NVIDIA H200"), or sm_90: rows by name come before rows by architecture
    op        linear (y = x Wᵀ + LoRA), linear_t (dx = dy W + LoRA), or a low-rank kernel: shrink, dy, x
    m         the row holds for up to this many tokens; empty: for any number
    k, n, r   the shape and rank it was measured at; empty: any. A shape that was not measured takes the rows of the
              nearest one: least |log(k / k')| + |log(n / n')| + |log(r / r')|
    dropout   yes, no, or empty: either
    kernel    decode-cuda (compiled), decode (Triton), fused (expands tiles inside the product), dequantize (expands the
              weight, then cuBLAS); for a low-rank kernel, the mode of its products: narrow or split
    block_m … tma   the kernel's configuration; empty: its built-in one
    us        median microseconds measured; source: measured, or default

`python -m bench tune` writes the measured rows of the GPU it runs on. A measured row replaces the default at its own M,
and between two measured M only where both found the same kernel the fastest; elsewhere the defaults apply, so that a
table that is measured in part is never worse than none. Where dequantizing was best at the largest M measured, it is
used for every larger M too. A tile of a low-rank kernel holds only for ranks that are padded alike.

The defaults come from a model, not from a measurement. Dequantizing costs 2.516 bytes a weight at copy bandwidth B, and
the fused kernel reaches a share e of cuBLAS's rate F, so the two cost the same at

    M* = 2.516 F / (2 B) / (1/e - 1) = 1.258 (F / B) / (1/e - 1)

e = 0.6 is assumed. F / B in FLOP a byte: 153 A100, 76 RTX 3090, 164 RTX 4090, 181 H200, 281 B200, 117 RTX 5090, each
standing for its architecture. M* is rounded to whole tiles of 16 tokens.

Environment: FASTLORA_BACKEND=cuda takes decode-cuda wherever it applies, FASTLORA_BACKEND=triton never takes it;
FASTLORA_AUTOTUNE=1 searches at run time instead (`search`).
"""

import csv
import functools
import math
import os
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from fastlora.kernels.fused_config import Config

TABLE = Path(__file__).with_name("choice.csv")
_SIZES = ("m", "k", "n", "r")
_CONFIG = ("block_m", "block_n", "block_k", "splits", "warps", "stages", "tma")
COLUMNS = ["gpu", "op", *_SIZES, "dropout", "kernel", *_CONFIG, "us", "source"]
PRODUCTS, LOW_RANK = ("linear", "linear_t"), ("shrink", "dy", "x")
OPS = (*PRODUCTS, *LOW_RANK)
DECODE_UP_TO_M = 16
ANY_M = 1 << 62
_STAND_IN = (8, 0)  # the architecture whose rows serve the interpreter


class Choice(NamedTuple):
    """A kernel, and its configuration where the table has one."""

    kernel: str
    config: "Config | None" = None


class Tile(NamedTuple):
    """How a low-rank kernel cuts its activation."""

    rows: int
    columns: int
    warps: int
    stages: int


class TableRow(NamedTuple):
    """A line of the table; None where a cell is empty."""

    gpu: str
    op: str
    m: int | None
    k: int | None
    n: int | None
    r: int | None
    dropout: bool | None
    kernel: str
    config: tuple[int, ...] | None  # block_m, block_n, block_k, splits, warps, stages, tma
    us: float | None
    source: str


def read(path: Path = TABLE) -> list[TableRow]:
    """The rows of a table, in its order.

    Raises:
        ValueError: the columns are not these, or a cell cannot be read; the message has the line's number.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: the first line must be {','.join(COLUMNS)}")
        rows = []
        for cells in reader:
            try:
                rows.append(_row(cells))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error!r} in {','.join(map(str, cells.values()))}")  # noqa: B904
    return rows


def _row(cells: dict[str, str]) -> TableRow:
    m, k, n, r = (int(cells[name]) if cells[name] else None for name in _SIZES)
    dropout = {"": None, "yes": True, "no": False}[cells["dropout"]]
    config = tuple(int(cells[name] or 0) for name in _CONFIG) if cells["block_m"] else None
    us = float(cells["us"]) if cells["us"] else None
    return TableRow(cells["gpu"], cells["op"], m, k, n, r, dropout, cells["kernel"], config, us, cells["source"])


def write(rows: list[TableRow], path: Path) -> None:
    """Replace a table in one step: GPUs in the order given, each one's rows by operation, shape and M."""
    gpus = list(dict.fromkeys(row.gpu for row in rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_cells(row) for row in sorted(rows, key=lambda row: (gpus.index(row.gpu), *_order(row))))
    staged.replace(path)


def _order(row: TableRow) -> tuple[Any, ...]:
    sizes = (ANY_M if size is None else size for size in (row.k, row.n, row.r))
    return OPS.index(row.op), row.kernel if row.op in LOW_RANK else "", *sizes, _bound(row)


def _cells(row: TableRow) -> dict[str, str]:
    config = row.config or ("",) * len(_CONFIG)
    dropout = {None: "", True: "yes", False: "no"}[row.dropout]
    us = None if row.us is None else f"{row.us:.2f}"
    found = row._asdict() | dict(zip(_CONFIG, config, strict=True)) | {"dropout": dropout, "us": us}
    return {name: "" if found[name] is None else str(found[name]) for name in COLUMNS}


@functools.cache
def _table() -> list[TableRow]:
    return read()


def rows_for(
    name: str, capability: tuple[int, int], rows: Iterable[TableRow] | None = None
) -> tuple[list[TableRow], list[TableRow]]:
    """(rows by the GPU's name, rows by its architecture or, where that has none, by the next one below)."""
    rows = list(_table() if rows is None else rows)
    own = 10 * capability[0] + capability[1]
    known = {int(row.gpu[3:]) for row in rows if row.gpu.startswith("sm_")}
    nearest = max((arch for arch in known if arch <= own), default=min(known, default=0))
    return [row for row in rows if row.gpu == name], [row for row in rows if row.gpu == f"sm_{nearest}"]


def gpu_of(device: torch.device) -> tuple[str, tuple[int, int]]:
    """(name, compute capability) of a CUDA device; stand-ins for the interpreter."""
    if device.type != "cuda":
        return "interpreter", _STAND_IN
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def choose(
    op: str, m: int, n: int, k: int, r: int, dropout: bool, device: torch.device, compiled: bool = False
) -> Choice:
    """The kernel for a product with an NF4 weight [N, K] and a LoRA of rank R.

    Args:
        op: "linear", x [M, K] to y [M, N], or "linear_t", dy [M, N] to dx [M, K].
        r: 0 without LoRA.
        compiled: whether the compiled decode kernel runs on the device.
    Raises:
        ValueError: the table has no row that fits.
    """
    bounds, choices = _choices(op, n, k, r, dropout, device, compiled, os.environ.get("FASTLORA_BACKEND"))
    return choices[bisect_left(bounds, m)]


def steps(
    op: str, n: int, k: int, r: int, dropout: bool, device: torch.device, compiled: bool = False
) -> list[tuple[int, Choice]]:
    """(largest M, its kernel) for the products of `choose`, by rising M; the last bound is ANY_M."""
    return list(zip(*_choices(op, n, k, r, dropout, device, compiled, os.environ.get("FASTLORA_BACKEND")), strict=True))


def tile(op: str, m: int, length: int, r: int, mode: str, dropout: bool, device: torch.device) -> Tile | None:
    """The table's tile for a low-rank kernel that reads [M, length]; None where it has none."""
    bounds, tiles = _tiles(op, length, r, mode, dropout, device)
    return tiles[bisect_left(bounds, m)] if tiles else None


@functools.cache
def _choices(
    op: str, n: int, k: int, r: int, dropout: bool, device: torch.device, compiled: bool, forced: str | None
) -> tuple[list[int], list[Choice]]:
    from fastlora.kernels.fused_config import Config

    rungs = ladder(*rows_for(*gpu_of(device)), op, k, n, r, dropout)
    choices = []
    for rung in rungs:
        config = Config(*rung.config[:-1], bool(rung.config[-1])) if rung.config else None
        choices.append(Choice(rung.kernel, config))
    bounds = [_bound(rung) for rung in rungs]
    if not bounds or bounds[-1] < ANY_M:
        raise ValueError(f"{TABLE} has no row for {op} with any M on {gpu_of(device)}: add one, or reinstall fastlora")
    return _with_decode(bounds, choices, op, dropout, compiled, forced)


def _with_decode(
    bounds: list[int], choices: list[Choice], op: str, dropout: bool, compiled: bool, forced: str | None
) -> tuple[list[int], list[Choice]]:
    """The ladder with the compiled decode kernel where it is forced, and Triton's where the compiled one cannot run."""
    if forced == "cuda" and op == "linear" and not dropout:
        above = bisect_left(bounds, DECODE_UP_TO_M + 1)
        return [DECODE_UP_TO_M, *bounds[above:]], [Choice("decode-cuda"), *choices[above:]]
    if forced == "triton" or not compiled:
        choices = [Choice("decode") if choice.kernel == "decode-cuda" else choice for choice in choices]
    return bounds, choices


@functools.cache
def _tiles(
    op: str, length: int, r: int, mode: str, dropout: bool, device: torch.device
) -> tuple[list[int], list[Tile]]:
    sides: tuple[int | None, int | None] = (None, length) if op == "dy" else (length, None)
    by_name, by_arch = ([row for row in rows if row.kernel == mode] for rows in rows_for(*gpu_of(device)))
    tiles, bounds = [], []
    for rung in ladder(by_name, by_arch, op, *sides, r, dropout):
        if rung.config is not None:
            block_m, block_n, _, _, warps, stages, _ = rung.config
            tiles.append(Tile(block_m, block_n, warps, stages))
            bounds.append(_bound(rung))
    if bounds:
        bounds[-1] = ANY_M
    return bounds, tiles


def ladder(
    by_name: list[TableRow], by_arch: list[TableRow], op: str, k: int | None, n: int | None, r: int, dropout: bool
) -> list[TableRow]:
    """The rows that apply to a shape, by rising M: measured ones where they decide, else the architecture's."""
    if op in LOW_RANK:
        by_name, by_arch = ([row for row in rows if padded(row.r or r) == padded(r)] for rows in (by_name, by_arch))
    measured, defaults = (_nearest(rows, op, k, n, r, dropout) for rows in (by_name, by_arch))
    found: list[TableRow] = []
    below, before = 0, None
    for row in measured:
        if before is None or before.kernel != row.kernel:
            found += _between(defaults, below, _bound(row) - 1)
        found.append(row)
        below, before = _bound(row), row
    if before is not None and before.kernel == "dequantize":
        found[-1], below = before._replace(m=None), ANY_M
    return [*found, *_between(defaults, below, ANY_M)]


def _between(rows: list[TableRow], below: int, largest: int) -> list[TableRow]:
    """The rows, by rising M, for more than `below` and up to `largest` tokens."""
    found = []
    for row in rows:
        if below < min(_bound(row), largest):
            below = min(_bound(row), largest)
            found.append(row if below == _bound(row) else row._replace(m=below))
    return found


def padded(r: int) -> int:
    """The ranks that a low-rank kernel takes at a time: a power of two from 16 to 64."""
    return min(64, max(16, 1 << max(r - 1, 0).bit_length()))


def _nearest(rows: list[TableRow], op: str, k: int | None, n: int | None, r: int, dropout: bool) -> list[TableRow]:
    """The rows for `op` at the nearest shape they have, one for each M, by rising M."""
    fitting = [row for row in rows if row.op == op and row.dropout in (None, dropout)]
    if not fitting:
        return []

    def distance(row: TableRow) -> float:
        pairs = ((row.k, k), (row.n, n), (row.r, r))
        return sum(abs(math.log(max(mine, 1) / max(asked, 1))) for mine, asked in pairs if mine and asked is not None)

    least = min(map(distance, fitting))
    rungs: dict[int, TableRow] = {}
    for row in fitting:
        if distance(row) == least and (_bound(row) not in rungs or row.dropout is not None):
            rungs[_bound(row)] = row
    return [rungs[bound] for bound in sorted(rungs)]


def _bound(row: TableRow) -> int:
    return ANY_M if row.m is None else row.m


def describe(device: torch.device) -> tuple[bool, str]:
    """Whether the rows that apply to a device were measured on a GPU of its kind, and which rows they are."""
    name, capability = gpu_of(device)
    by_name, by_arch = rows_for(name, capability)
    shapes = {(row.k, row.n) for row in by_name if row.op in PRODUCTS and row.source == "measured"}
    if shapes:
        return True, f"{len(by_name)} rows measured on {name}, for {len(shapes)} shapes"
    return False, f"defaults of {by_arch[0].gpu}, not measured on {name}: `python -m bench tune` measures them"
