"""The machine's own speed: a copy and a bf16 product, timed before anything is compared."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.measure.floors import Rates
from bench.measure.record import Point
from bench.measure.timing import interleave


def gb_per_s(copy: Point) -> float:
    """Copy bandwidth of a `copy` row, bytes read and bytes written both counted."""
    return 4 * copy.M * copy.K / copy.p50 / 1e6


def tflop_per_s(product: Point) -> float:
    """Rate of a product's row, forward: 2 M N K FLOP."""
    return 2 * product.M * product.K * product.N / product.p50 / 1e9


class Machine(NamedTuple):
    """The two as rows: a copy of M x K bf16 values, a bf16 product."""

    copy: Point
    matmul: Point

    @property
    def rates(self) -> Rates:
        """The two as floors take them."""
        return Rates(gb_per_s(self.copy) * 1e9, tflop_per_s(self.matmul) * 1e12)


def measure_machine(device: torch.device, size: int | None = None, budget_s: float = 3.0) -> Machine:
    """Copy [4 size, size] and multiply [M, size] by [size, size], both bf16.

    On a CPU size is 4096 and M a quarter of it; on a CUDA device both are 8192, far past its cache.
    """
    on_cuda = device.type == "cuda"
    size = size or (8192 if on_cuda else 4096)
    rows, m = 4 * size, size if on_cuda else size // 4
    source = torch.randn(rows, size, dtype=torch.float32, device=device).bfloat16()
    target = torch.empty_like(source)
    x, weight = source[:m], source[m : m + size]
    calls = {"copy": lambda _: target.copy_(source), "matmul": lambda _: F.linear(x, weight)}
    found = interleave(calls, device, budget_s, min_rounds=5)
    return Machine(
        Point("copy", "torch", "forward", "time", rows, size, 0, 0, *found["copy"]),
        Point("matmul", "torch", "forward", "time", m, size, size, 0, *found["matmul"]),
    )
