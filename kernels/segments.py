"""Rows that do not all have the same adapter: stretches of them, and what a program needs to find its own.

    segment i: rows ends[i - 1] to ends[i], with adapter owner[i], or none where that is -1

Experts of a mixture are segments (segment i has adapter i), and so are the samples of a batch with several adapters.
The table is on the device, and no program count depends on it: a launch has a program for every tile of rows there can
be, `ceil(M / BLOCK_M) + segments`. Each counts tiles segment by segment until it comes to its own; surplus ones find no
rows. So nothing waits for the host, and a launch can be captured in a CUDA graph.

What differs from adapter to adapter besides A and B is in `facts`, [adapters, 4] in fp32: scaling · keep_scale,
scaling, keep_scale, and dropout's threshold (an integer up to 65535, which fp32 holds).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BOTH, SCALING, KEEP = 0, 1, 2  # columns of facts
FACTS = tl.constexpr(4)
THRESHOLD = tl.constexpr(3)


@triton.jit
def rows_of_tile(ends_ptr, segments, tile, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(segment, first row, end) of a tile of BLOCK_M rows, tiles counted segment by segment; no rows beyond the last.

    SEGMENTS: `segments`, padded to a power of two.
    """
    offs = tl.arange(0, SEGMENTS)
    ends = tl.load(ends_ptr + offs, mask=offs < segments, other=0)
    begins = tl.load(ends_ptr + offs - 1, mask=(offs > 0) & (offs < segments), other=0)
    upto = tl.cumsum((tl.maximum(ends - begins, 0) + BLOCK_M - 1) // BLOCK_M, 0)
    segment = tl.sum((upto <= tile).to(tl.int32), 0)
    first_tile = tl.max(tl.where(upto <= tile, upto, 0), 0)
    begin, end = bounds(ends_ptr, segments, segment)
    return segment, begin + (tile - first_tile).to(tl.int64) * BLOCK_M, end


@triton.jit
def bounds(ends_ptr, segments, segment):
    """(first row, end) of a segment, int64; (0, 0) beyond the last."""
    valid = segment < segments
    begin = tl.load(ends_ptr + segment - 1, mask=valid & (segment > 0), other=0)
    return begin.to(tl.int64), tl.load(ends_ptr + segment, mask=valid, other=0).to(tl.int64)


@triton.jit
def owner_of(owner_ptr, segments, adapters, segment, OWNED: tl.constexpr):
    """The adapter of a segment, int64, or -1. Without a table: the segment's number, if there are so many adapters."""
    if OWNED:
        owner = tl.load(owner_ptr + segment, mask=segment < segments, other=-1)
    else:
        owner = tl.where(segment < adapters, segment, -1)
    return owner.to(tl.int64)


class Segments(NamedTuple):
    """Which rows have which adapter."""

    ends: Tensor  # [S], int32: where each segment ends; rows beyond the last belong to none and are not written
    adapters: int
    owner: Tensor | None = None  # [S], int32; None: segment i has adapter i, and those beyond the adapters have none
    facts: Tensor | None = None  # [adapters, 4], fp32
    order: Tensor | None = None  # segments that have an adapter, by adapter; None: one each, in order
    sizes: tuple[int, ...] = ()  # how many segments each adapter has in `order`

    @property
    def number(self) -> int:
        """How many segments there are, including empty ones."""
        return self.ends.numel()

    def constants(self, column: int) -> tuple[int, bool, int]:
        """SEGMENTS, OWNED and FACTOR of a kernel. column: of the facts, to multiply by; -1: none."""
        factor = -1 if self.facts is None else column
        return triton.next_power_of_2(self.number), self.owner is not None, factor

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """A kernel's pointers: ends, owner, facts; `ends` stands for what is not there."""
        owner, facts = self.owner, self.facts
        return self.ends, self.ends if owner is None else owner, self.ends if facts is None else facts

    def sum_by_adapter(self, parts: Tensor) -> Tensor:
        """[S, ...] summed over the segments of each adapter, in order: [adapters, ...]."""
        if self.owner is None:
            return parts[: self.adapters]
        if self.order is None:
            return parts
        found = parts.index_select(0, self.order).split(self.sizes)
        return torch.stack([part[0] if part.shape[0] == 1 else part.sum(0) for part in found])


def by_offsets(offsets: Tensor, rows: int) -> Segments:
    """Experts as segments. offsets: [E], int32, where each one's rows end; later rows, up to `rows`, have no expert."""
    return Segments(F.pad(offsets, (0, 1), value=rows), offsets.numel())
