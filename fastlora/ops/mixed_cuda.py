"""A batch whose samples have different adapters, by Triton kernels that look up each row's adapter.

    y = x Wᵀ + s_a · (mask ∘ x) A_aᵀ B_aᵀ + bias_a,      a: the adapter of the row, or none

Neither samples nor updates are moved: neighbours with the same adapter are one stretch of rows, and four kernels do for
stretches what they do for a plain linear (`kernels.lora`, `kernels.segments`), with each adapter's own dropout rate.
The adapters of a call are stacked, padded to the largest rank: a copy of a few hundred kilobytes, so that the number of
launches does not grow with the number of adapters. The update is added to the base product in fp32. Few rows over an
NF4 weight read it packed (`linear_cuda`).
Saved for backward: x (where dA is wanted), h in fp32, the stacked adapters.

Source: arXiv:2310.18547 (Punica) and arXiv:2311.03285 (S-LoRA), for the idea of one launch for all adapters.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels import lora as kernel
from fastlora.kernels.lora_plan import Dropout
from fastlora.kernels.segments import KEEP, Segments
from fastlora.ops import linear_cuda
from fastlora.ops.autograd import keep_if_captured, refuse_second_derivative
from fastlora.ops.nf4 import NF4Weight


class Rows(NamedTuple):
    """The stretches of a batch, on the device."""

    segments: Segments
    totals: Segments  # the same, but rows without an adapter count as an adapter of their own, the last
    drops: bool


def rows_of(places: tuple[int, ...], rows: int, facts: tuple[tuple[float, float], ...], device: torch.device) -> Rows:
    """The stretches of a batch of samples with `rows` rows each, cached: one copy serves all layers of a step.

    Args:
        places: for each sample the position of its adapter, or -1.
        facts: for each adapter its scaling and its dropout rate, 0 where nothing is dropped.
    """
    return keep_if_captured(_rows_of(places, rows, facts, device, torch.is_inference_mode_enabled()), device)


@lru_cache(maxsize=256)
def _rows_of(
    places: tuple[int, ...], rows: int, facts: tuple[tuple[float, float], ...], device: torch.device, inference: bool
) -> Rows:
    stretches = [(owner, rows * len(list(group))) for owner, group in groupby(places)]
    owners = [owner for owner, _ in stretches]
    count, adapters = len(owners), len(facts)
    thresholds = [round(p * 65536) for _, p in facts]
    keep = [65536 / (65536 - threshold) for threshold in thresholds]
    table = [[s * k, s, k, t] for (s, _), k, t in zip(facts, keep, thresholds, strict=True)]
    everyones = [adapters if owner < 0 else owner for owner in owners]
    order = sorted((place for place in range(count) if owners[place] >= 0), key=owners.__getitem__)
    whole = sorted(range(count), key=everyones.__getitem__)
    ends = list(accumulate(length for _, length in stretches))
    numbers = _moved(torch.tensor([*ends, *owners, *everyones, *order, *whole], dtype=torch.int32), device)
    ends_, owners_, everyones_, order_, whole_ = numbers.split([count, count, count, len(order), count])
    sizes = [owners.count(which) for which in range(-1, adapters)]
    segments = Segments(
        ends_,
        adapters,
        owners_,
        _moved(torch.tensor(table, dtype=torch.float32), device),
        None if order == list(range(count)) else order_,
        tuple(sizes[1:]),
    )
    totals = Segments(ends_, adapters + 1, everyones_, None, whole_, (*sizes[1:], sizes[0]))
    return Rows(segments, totals, any(thresholds))


def _moved(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device, without waiting for it. A graph that is being captured reads the pinned one at replays."""
    if device.type != "cuda":
        return table
    return keep_if_captured(table.pin_memory(), device).to(device, non_blocking=True)


def stacked(adapters: Sequence[Tensor], dim: int) -> Tensor:
    """Matrices of different ranks as one stack, padded with zeros along the rank, dimension `dim`. Differentiable."""
    rank = max(adapter.shape[dim] for adapter in adapters)
    if len(adapters) == 1:
        return adapters[0].unsqueeze(0)
    after = (0, 0) * (1 - dim)
    padded = [F.pad(each, (*after, 0, rank - each.shape[dim])) if each.shape[dim] < rank else each for each in adapters]
    return torch.stack(padded)


def linear(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, rows: Rows,
    dtype: torch.dtype, result: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [M, N], each row with its own adapter; differentiable in x, the adapters, the biases and a dense weight.

    Args:
        x: [M, K], bf16, fp16 or fp32. weight: [N, K], dense in `dtype` or NF4.
        lora_a: [adapters, R, K]. lora_b: [adapters, N, R]. Both fp32 or both `dtype`.
        bias: [adapters + 1, N], the last row for rows without an adapter.
        dtype: of the products; x is cast to it. result: dtype of y; a sum in fp32 is rounded only to it.
    """
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device) if rows.drops else None
    whole, packed = (None, weight) if isinstance(weight, NF4Weight) else (weight, None)
    y: Tensor = _Linear.apply(x, whole, lora_a, lora_b, bias, packed, seed, rows, dtype, result)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, whole: Tensor | None, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None,
        packed: NF4Weight | None, seed: Tensor | None, rows: Rows, dtype: torch.dtype, result: torch.dtype,
    ) -> Tensor:  # fmt: skip
        weight: Any = packed if whole is None else whole
        ctx.given, x = x.dtype, x.to(dtype)
        segments, dropout = rows.segments, _dropout(seed)
        h = kernel.shrink(x, lora_a, dropout, segments=segments)  # [M, R]
        base = linear_cuda.base_product("linear", x, weight)
        y = kernel.expand(h, lora_b, 1.0, result, Dropout(), bias, base, segments)  # [M, N]
        _, need_weight, need_a, need_b, *_ = ctx.needs_input_grad
        kept = x if need_weight or need_a else None, h if need_b else None
        ctx.save_for_backward(*kept, whole if packed is None else packed.codes, lora_a, lora_b, seed)
        ctx.packed, ctx.rows, ctx.dtype, ctx.bias_dtype = packed, rows, dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, frozen, lora_a, lora_b, seed = ctx.saved_tensors
        need_x, need_weight, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
        segments, dropout, dy = ctx.rows.segments, _dropout(seed), dy.to(ctx.dtype)
        dx = dw = da = db = dbias = g = None
        if need_x or need_a or need_b:
            g, db = kernel.dy_pass(dy, lora_b, dy if h is None else h, 1.0, need_x or need_a, need_b, segments=segments)
        if need_a:
            assert g is not None
            da = kernel.x_pass(x, g, dropout, lora_a.dtype, segments=segments).to(lora_a.dtype)  # [adapters, R, K]
        if need_x:
            assert g is not None
            weight = frozen if ctx.packed is None else ctx.packed
            dx = _dx(dy, g, lora_a, weight, segments, dropout, ctx.given)
        if need_weight:
            dw = dy.t() @ x  # [N, K]
        if need_bias:
            dbias = _bias_gradient(dy, ctx.rows).to(ctx.bias_dtype)
        return dx, dw, da, None if db is None else db.to(lora_b.dtype), dbias, *(None,) * 5


def _dx(
    dy: Tensor, g: Tensor, lora_a: Tensor, weight: Tensor | NF4Weight, segments: Segments, dropout: Dropout,
    result: torch.dtype,
) -> Tensor:  # fmt: skip
    """dx [M, K], in dtype `result`."""
    base = linear_cuda.base_product("linear_t", dy, weight)
    return kernel.expand(g, lora_a.mT, 1.0, result, dropout, None, base, segments, KEEP)


def _dropout(seed: Tensor | None) -> Dropout:
    return Dropout() if seed is None else Dropout.by_adapter(seed)


def _bias_gradient(dy: Tensor, rows: Rows) -> Tensor:
    """dy summed over the rows of each adapter, and last over rows without one: [adapters + 1, N], fp32."""
    ones = dy.new_ones(dy.shape[0], 1, dtype=torch.float32)
    none = dy.new_empty(rows.totals.adapters, dy.shape[1], 1)  # in place of B, which dB does not read
    _, sums = kernel.dy_pass(dy, none, ones, 1.0, False, True, segments=rows.totals)
    assert sums is not None
    return sums.squeeze(2)
