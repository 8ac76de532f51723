"""How the low-rank products are launched: precision of the dots, tiles, and splits that fill the device.

The kernels are in `kernels.lora`, which also says what the modes mean.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from fastlora.kernels import choice
from fastlora.kernels.choice import Tile
from fastlora.kernels.choice import padded as block_r
from torch import Tensor

PROGRAMS_PER_SM = 2
STAGES = 3
LONGEST_SUM = 1 << 14  # terms that one program adds up, tile after tile; several programs share a longer sum


class Dropout:
    """What the kernels need of dropout: p as a 16-bit threshold, and the scale of what is kept.

    Args:
        p: the share to drop, 0 <= p < 1. seed: int64, one element, on the device; None where p is 0.
    """

    def __init__(self, p: float = 0.0, seed: Tensor | None = None) -> None:
        self.threshold = round(p * 65536) if seed is not None else 0
        self.keep_scale = 65536 / (65536 - self.threshold)
        self.seed = seed
        self.active = self.threshold > 0

    @classmethod
    def by_adapter(cls, seed: Tensor) -> "Dropout":
        """Thresholds and scales that differ from adapter to adapter; they are in the facts of `kernels.segments`."""
        found = cls(0.0, seed)
        found.active = True
        return found


def mode(activation: torch.dtype, adapter: torch.dtype) -> str:
    """How activations and adapters of these dtypes are multiplied; see the head of `kernels.lora`."""
    if activation == torch.float32:
        return "ieee"
    if adapter != torch.float32:
        return "narrow"
    return "split" if activation == torch.bfloat16 else "tf32x3"


def halved(rows: int, columns: int) -> tuple[int, int]:
    """A tile of rows that do not begin at multiples of 16: an address for each value takes twice the registers."""
    return max(16, rows // 2), max(16, columns // 2)


def tile(op: str, r: int, how: str, dropout: bool, major: int) -> Tile:
    """The built-in tile of an activation for a padded rank and a mode; no register is spilled.

    A factor in three parts takes registers, and so do the mask and 32 ranks: then a tile is half as large. On sm_90 and
    sm_100 tensor cores read operands from shared memory, which leaves registers for 64 ranks.
    major: of the compute capability.
    """
    if how in ("ieee", "tf32x3"):
        return Tile(32, 64, 4, STAGES)
    if r > 32 and how == "split" and major in (9, 10) and not dropout:
        rows, columns, warps = {"shrink": (128, 64, 4), "x": (64, 128, 4), "dy": (32, 256, 8)}[op]
        return Tile(rows, columns, warps, STAGES)
    if r > 32:
        return Tile(32 if how == "split" else 64, 64, 8, STAGES)
    warps = 8 if r == 32 and (op != "shrink" or how == "split") else 4
    if how == "split" and op == "shrink" and (dropout or r == 32):
        return Tile(64, 64, warps, STAGES)
    return Tile(32 if how == "split" and op == "x" and dropout and r == 32 else 64, 128, warps, STAGES)


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: settled when they were decorated."""
    return bool(triton.knobs.runtime.interpret)


def tile_for(
    op: str, m: int, length: int, r: int, how: str, dropout: bool, device: torch.device, stride: int = 0
) -> Tile:
    """The tile for an activation [m, length]: the table's of `choice` where it has one, else the built-in one.

    The table's were measured where rows begin at multiples of 16 numbers. stride: from one row to the next.
    """
    loose = (length | stride) % 16 != 0
    if not loose and (found := choice.tile(op, m, length, r, how, dropout, device)):
        return found
    found = tile(op, block_r(r), how, dropout, choice.gpu_of(device)[1][0])
    return Tile(*halved(found.rows, found.columns), found.warps, found.stages) if loose else found


@dataclass(frozen=True, eq=False)
class Plan:
    """A launch: its tile, its grid, and how much of the reduction each program takes. Equal to itself only."""

    cut: Tile
    tiles: int
    splits: int
    per_split: int
    block_r: int
    r_parts: int

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        return self.tiles, self.splits, self.r_parts

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_r, "num_warps": self.cut.warps, "num_stages": self.cut.stages}


@functools.lru_cache(maxsize=4096)
def plan(
    op: str,
    m: int,
    length: int,
    r: int,
    how: str,
    dropout: bool,
    device: torch.device,
    cut: Tile | None = None,
    segments: int = 0,
    stride: int = 0,
) -> Plan:
    """How to launch on an activation [m, length]: tiles and splits of the reduction that together fill the device.

    The shrink sums over `length`, the other two over m. Where the rows are in `segments`, each segment is summed by
    itself, in as many parts as fill the device. No program sums more than LONGEST_SUM terms, because the error of a sum
    in order grows with its length. With many segments, any of which may have most of the rows, that limit holds only as
    far as writing the sums costs less than a sixteenth of reading the rows. Cached: a plan costs more than a launch.
    stride: of the activation, the larger one.
    """
    cut = cut or tile_for(op, m, length, r, how, dropout, device, stride)
    return divide(op, m, length, r, cut, programs_wanted(device.index), segments)


def divide(op: str, m: int, length: int, r: int, cut: Tile, wanted: int, segments: int = 0) -> Plan:
    """`plan` for a tile and for a device that so many programs fill."""
    parts = block_r(r), triton.cdiv(r, block_r(r))
    rows, columns = triton.cdiv(m, cut.rows), triton.cdiv(length, cut.columns)
    if op == "shrink":
        tiles, total, block = rows + segments, length, cut.columns
    elif segments:
        short = min(triton.cdiv(m, LONGEST_SUM), m // (64 * r * segments))
        shares = max(1, short, min(rows, wanted // (columns * segments)))
        return Plan(cut, columns, shares * segments, 0, *parts)
    else:
        tiles, total, block = columns, m, cut.rows
    splits = max(1, triton.cdiv(total, LONGEST_SUM), min(triton.cdiv(total, block), wanted // tiles))
    per_split = triton.cdiv(triton.cdiv(total, splits), block) * block
    return Plan(cut, tiles, triton.cdiv(total, per_split), per_split, *parts)


@functools.cache
def programs_wanted(device_index: int | None) -> int:
    """Programs that fill the device."""
    if device_index is None:
        return 8  # the interpreter
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device_index).multi_processor_count
