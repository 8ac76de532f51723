"""What `bench tune` compares: every way to do one product, or every tile of one low-rank kernel, and the right answer.

A product is done by the code that trains and serves, with its kernel given instead of chosen. For `linear` the time is
that of a forward as it serves, with the shrink where the kernel needs h. For `linear_t` it is that of dx only, because
backward forms g in any case, for dA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.compare.accuracy import share_of_limit
from bench.measure.operands import SCALING, Operands, draw_inputs
from fastlora import reference

_TILES = (  # rows, columns, warps, stages
    (64, 128, 4, 3), (64, 128, 8, 3), (64, 128, 4, 2), (32, 128, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3),
    (128, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 4), (64, 256, 8, 3), (128, 128, 8, 3), (32, 256, 8, 3),
)  # fmt: skip


class TuneCase(NamedTuple):
    """A point of the table: an operation at M tokens over a weight [N, K] with rank R.

    A low-rank kernel reads [M, k] (shrink, x) or [M, n] (dy), the other being 0, and has a mode: "narrow" with 16-bit
    adapters, "split" with fp32 ones.
    """

    op: str
    m: int
    k: int
    n: int
    r: int
    mode: str = ""

    def __str__(self) -> str:
        how = f" {self.mode}" if self.mode else ""
        shape = f"{self.k}x{self.n}" if self.k and self.n else str(self.k or self.n)
        return f"{self.op}{how} {shape} r={self.r} M={self.m}"


@dataclass(frozen=True)
class Trial:
    """One way to do it: its entry in the table, and a call on the copy of a given number.

    copies: after so many calls the first copy's turn comes again.
    """

    kernel: str
    config: tuple[int, ...] | None
    call: Callable[[int], tuple[Tensor, ...]]
    copies: int = 1

    def result(self) -> Tensor:
        """All that one call returns, flat."""
        return torch.cat([part.flatten() for part in self.call(0)])

    def __str__(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.config))}" if self.config else self.kernel


@dataclass(frozen=True)
class Truth:
    """The result in fp64, and the same in the dtype under test, both flat: what the tolerance rule needs."""

    oracle: Tensor
    baseline: Tensor

    def fault(self, found: Tensor) -> str:
        """What is wrong with a result; empty where nothing is."""
        share = share_of_limit(found, self.baseline, self.oracle)
        return "" if share <= 1 else f"error {share:.3g} times what is allowed"


def product_trials(case: TuneCase, operands: Operands) -> tuple[list[Trial], Truth]:
    """The ways to do a product on these operands, and the truth about it."""
    from fastlora.kernels import choice, lora, search
    from fastlora.kernels.operands import Lora

    from fastlora.ops import linear_cuda
    from fastlora.ops.backend import compiled_decode

    problem = operands.problem
    x, dy = draw_inputs(problem, case.m, grad=False)
    weights = operands.packed
    adapters = Lora(operands.lora_a, operands.lora_b, SCALING, 0.0, None)
    g, _ = lora.dy_pass(dy, adapters.b, dy, SCALING, need_g=True, need_db=False)

    def call(chosen: choice.Choice, serial: int) -> tuple[Tensor, ...]:
        weight = weights[serial % len(weights)]
        if case.op == "linear":
            return linear_cuda.forward_by(chosen, x, weight, adapters, None, False)[:1]
        return (linear_cuda.dx_by(chosen, dy, g, weight, adapters),)

    found = []
    for chosen in search.candidates(
        case.op, case.m, case.n, case.k, False, problem.device, compiled_decode(problem.device)[0]
    ):
        refusal = linear_cuda.refusal(chosen.kernel, x.dtype, case.m, case.k, case.n, weights[0].blocksize, case.r)
        if not refusal:
            config = tuple(map(int, chosen.config)) if chosen.config is not None else None
            found.append(Trial(chosen.kernel, config, partial(call, chosen), len(weights)))
    return found, _truth_of_product(case, operands, x if case.op == "linear" else dy)


def _truth_of_product(case: TuneCase, operands: Operands, rows: Tensor) -> Truth:
    """y by the reference, or dx, which is the same function of dy with the weight and the adapters transposed."""

    def result(dtype: torch.dtype, adapter_dtype: torch.dtype, weight: Tensor) -> Tensor:
        a, b = operands.lora_a.to(adapter_dtype), operands.lora_b.to(adapter_dtype)
        if case.op == "linear":
            return reference.lora_linear(rows.to(dtype), weight.to(dtype), a, b, SCALING)
        return reference.lora_linear(rows.to(dtype), weight.to(dtype).t(), b.t(), a.t(), SCALING)

    oracle = result(torch.float64, torch.float64, operands.exact_weight)
    return Truth(oracle.flatten(), result(rows.dtype, torch.float32, operands.dense[0]).flatten())


def low_rank_trials(case: TuneCase, device: torch.device, dtype: torch.dtype) -> tuple[list[Trial], Truth]:
    """The tiles of a low-rank kernel, the built-in one first, and the truth about it."""
    from fastlora.kernels import lora, lora_plan
    from fastlora.kernels.choice import Tile

    generator = torch.Generator(device).manual_seed(0)
    length = case.k or case.n

    def draw(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device=device).to(dtype)

    x = draw(case.m, length, dtype)  # or dy
    copies = (x, x.clone())
    adapter = draw(case.r, length, torch.float32 if case.mode == "split" else dtype)  # A, or B transposed
    low = draw(case.m, case.r, torch.float32)  # h, or g
    none = lora.Dropout()

    def call(cut: Tile, serial: int) -> tuple[Tensor, ...]:
        rows = copies[serial % len(copies)]
        if case.op == "shrink":
            return (lora.shrink(rows, adapter, none, cut=cut),)
        if case.op == "x":
            return (lora.x_pass(rows, low, none, adapter.dtype, cut=cut),)
        g, db = lora.dy_pass(rows, adapter.t(), low, SCALING, need_g=True, need_db=True, cut=cut)
        assert g is not None
        assert db is not None
        return g, db

    def result(wide: torch.dtype) -> Tensor:
        product, outer = x.to(wide) @ adapter.to(wide).t(), low.to(wide).t() @ x.to(wide)
        if case.op == "dy":
            return SCALING * torch.cat((product.flatten(), outer.t().flatten()))
        return (product if case.op == "shrink" else outer).flatten()

    default = lora_plan.tile_for(case.op, case.m, length, case.r, case.mode, False, device)
    found = [
        Trial(case.mode, (cut.rows, cut.columns, 0, 0, cut.warps, cut.stages, 0), partial(call, cut), len(copies))
        for cut in dict.fromkeys((default, *(Tile(*tile) for tile in _TILES)))
    ]
    return found, Truth(result(torch.float64), result(dtype))
