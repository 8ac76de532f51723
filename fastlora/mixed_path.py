"""A batch whose samples have different adapters, by Triton kernels in which every row meets its own adapter.

    y = x Wᵀ + s_a · (mask ∘ x) A_aᵀ B_aᵀ + bias_a,      a: the adapter of the row, or none

Neither samples nor updates are moved: neighbours with the same adapter are one stretch of rows, and four kernels do for
stretches what they do for a plain linear (`kernels.lora`, `kernels.segments`), each adapter with its own rate of
dropout. The adapters of a call are stacked, padded to the largest rank: a copy of a few hundred kilobytes, so that the
number of launches does not grow with the number of adapters. The update is written first, and cuBLAS adds the base
product with beta = 1; where an adapter has a bias, which may be larger than all else, the base product comes first and
the sum is formed in fp32. Saved for backward: x (where dA is wanted), h in fp32, the stacked adapters.

Source: arXiv:2310.18547 (Punica) and arXiv:2311.03285 (S-LoRA), for the idea of one launch for all adapters.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels import lora as kernel
from fastlora.kernels.lora import Dropout
from fastlora.kernels.segments import KEEP, Segments
from fastlora.operands import Base, refuse_second_derivative


class Rows(NamedTuple):
    """The stretches of a batch, on the device and on the host."""

    segments: Segments
    owners: tuple[int, ...]  # the adapter of each stretch, or -1
    lengths: tuple[int, ...]
    drops: bool


@lru_cache(maxsize=256)
def rows_of(
    places: tuple[int, ...],
    rows: int,
    facts: tuple[tuple[float, float], ...],
    device: torch.device,
    inference: bool,
) -> Rows:
    """The stretches of a batch of samples with `rows` rows each; one copy serves all layers of a step.

    Args:
        places: for each sample the place of its adapter, or -1.
        facts: for each adapter its scaling and its rate of dropout, 0 where nothing is dropped.
        inference: whether inference mode is on, whose tensors must not reach a graph.
    """
    stretches = [(owner, rows * len(list(group))) for owner, group in groupby(places)]
    owners, lengths = tuple(owner for owner, _ in stretches), tuple(length for _, length in stretches)
    by_adapter = [[place for place, owner in enumerate(owners) if owner == which] for which in range(len(facts))]
    order = [place for mine in by_adapter for place in mine]
    thresholds = [round(p * 65536) for _, p in facts]
    keep = [65536 / (65536 - threshold) for threshold in thresholds]
    table = [[s * k, s, k, t] for (s, _), k, t in zip(facts, keep, thresholds, strict=True)]
    segments = Segments(
        torch.tensor(lengths, device=device).cumsum(0).int(),
        len(facts),
        torch.tensor(owners, dtype=torch.int32, device=device),
        torch.tensor(table, dtype=torch.float32, device=device),
        None if order == list(range(len(owners))) else torch.tensor(order, device=device),
        tuple(map(len, by_adapter)),
    )
    return Rows(segments, owners, lengths, any(thresholds))


def stacked(adapters: Sequence[Tensor], dim: int) -> Tensor:
    """Matrices of different rank as one stack, padded with zeros along their rank, dimension `dim`. Differentiable."""
    rank = max(adapter.shape[dim] for adapter in adapters)
    if len(adapters) == 1:
        return adapters[0].unsqueeze(0)
    after = (0, 0) * (1 - dim)
    padded = [F.pad(each, (*after, 0, rank - each.shape[dim])) if each.shape[dim] < rank else each for each in adapters]
    return torch.stack(padded)


def linear(
    x: Tensor, base: Base, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, wide: bool, rows: Rows
) -> Tensor:
    """y [M, N], each row with its own adapter; differentiable in x, the adapters, the biases and a dense weight.

    Args:
        x: [M, K], bf16, fp16 or fp32. base: a weight [N, K], dense in x's dtype or NF4.
        lora_a: [adapters, R, K]. lora_b: [adapters, N, R]. Both fp32 or both x's dtype.
        bias: [adapters + 1, N], the last for rows without an adapter.
        wide: whether a bias may be larger than all else, and must not be rounded before the sum.
    """
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if rows.drops else None
    y: Tensor = _Linear.apply(x, base.weight, lora_a, lora_b, bias, base, seed, wide, rows)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, base: Base,
        seed: Tensor | None, wide: bool, rows: Rows,
    ) -> Tensor:  # fmt: skip
        segments, dropout = rows.segments, _dropout(seed)
        h = kernel.shrink(x, lora_a, dropout, segments=segments)
        base_first = bias is not None and wide
        dtype = torch.float32 if base_first else x.dtype
        update = kernel.expand(h, lora_b, 1.0, dtype, Dropout(), bias, segments)
        dense = base.dense(x.dtype).t()
        y = torch.add(x @ dense, update).to(x.dtype) if base_first else update.addmm_(x, dense)
        _, need_weight, need_a, need_b, *_ = ctx.needs_input_grad
        kept = x if need_weight or need_a else None, h if need_b else None
        ctx.save_for_backward(*kept, weight, lora_a, lora_b, seed)
        ctx.base, ctx.rows, ctx.bias_dtype = base, rows, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, weight, lora_a, lora_b, seed = ctx.saved_tensors
        need_x, need_weight, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        segments, dropout = ctx.rows.segments, _dropout(seed)
        dx = dw = da = db = dbias = g = None
        if need_x or need_a or need_b:
            g, db = kernel.dy_pass(dy, lora_b, dy if h is None else h, 1.0, need_x or need_a, need_b, segments=segments)
        if need_a:
            assert g is not None
            da = kernel.x_pass(x, g, dropout, lora_a.dtype, segments=segments).to(lora_a.dtype)
        if need_x:
            assert g is not None
            dx = kernel.expand(g, lora_a.mT, 1.0, dy.dtype, dropout, segments=segments, column=KEEP)
            dx.addmm_(dy, ctx.base._replace(weight=weight).dense(dy.dtype))
        if need_weight:
            dw = dy.t() @ x
        if need_bias:
            dbias = _bias_gradient(dy, ctx.rows).to(ctx.bias_dtype)
        return dx, dw, da, None if db is None else db.to(lora_b.dtype), dbias, None, None, None, None


def _dropout(seed: Tensor | None) -> Dropout:
    return Dropout() if seed is None else Dropout.by_adapter(seed)


def _bias_gradient(dy: Tensor, rows: Rows) -> Tensor:
    """dy summed over the rows of each adapter, and last over those of none: [adapters + 1, N], fp32."""
    found = dy.new_zeros(rows.segments.adapters + 1, dy.shape[1], dtype=torch.float32)
    for owner, part in zip(rows.owners, dy.split(rows.lengths), strict=True):
        found[owner] += part.sum(0, dtype=torch.float32)
    return found
