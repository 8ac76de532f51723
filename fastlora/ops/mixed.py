"""A batch whose samples have different adapters, over one product with the base weight.

    y_i = x_i Wᵀ + bias + s_a · (dropout(x_i) A_aᵀ B_aᵀ + bias_a),     a the adapter of sample i, or none

On CUDA `mixed_cuda` uses kernels that look up each row's adapter, unless there are very few rows or torch.compile must
see the operators. Otherwise there are two ways to the update.

With all ranks side by side, h = x [A_1; A_2; ...]ᵀ is computed for every row and multiplied by s_a in the columns of
the row's own adapter and by 0 in the others; [B_1 B_2 ...] gathers it. That is three products however many adapters
there are, which suits few rows, as in decoding. (0 times an adapter that is not finite spoils other rows too.)

In segments, each adapter sees only its own rows. No product is wasted, which counts for many rows, and each adapter can
have its own dropout.

Either way the base product is computed once and, over a dense weight, added to the update with beta = 1 and rounded
once. If an adapter has a bias, which may be larger than all else, the update stays in fp32 until it is added to the
base product.

Source: arXiv:2310.18547 (Punica) and arXiv:2311.03285 (S-LoRA), for the idea.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.operands import Lora
from fastlora.ops.autograd import computed_in, keep_if_captured, seen_by_others
from fastlora.ops.backend import backend
from fastlora.ops.linear import nf4_linear
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import in_dtype, wide_product

# Rows times adapters beyond the first. Above it, rows are computed in segments. A CPU has no launches to save.
SIDE_BY_SIDE_UP_TO = {"cpu": 0, "cuda": 64}


def total_bias(base_bias: Tensor | None, adapter: Lora) -> Tensor | None:
    """The biases of a layer and of its adapter as one: [N], in fp32 where the adapter has one. Differentiable."""
    if adapter.bias is None:
        return base_bias
    update = adapter.bias.float() * adapter.scaling
    return update if base_bias is None else base_bias.float() + update


def joined(adapters: Sequence[Lora]) -> Lora:
    """Adapters without dropout that are active at once, as one of the summed rank: their updates add."""
    biases = [adapter.bias.float() * adapter.scaling for adapter in adapters if adapter.bias is not None]
    return Lora(
        torch.cat([adapter.a for adapter in adapters]),  # [R_1 + R_2 + ..., K]
        torch.cat([adapter.b * adapter.scaling for adapter in adapters], dim=1),  # [N, R_1 + R_2 + ...]
        1.0,
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def mixed_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    adapters: Mapping[str, Lora],
    names: Sequence[str],
) -> Tensor:
    """y = x Wᵀ + bias + the update of each sample's own adapter.

    Differentiable in x, the adapters, bias, and in a dense weight.

    Args:
        x: [B, ..., K], bf16, fp16 or fp32. Under autocast it is cast to autocast's dtype.
        weight: [N, K], dense in x's dtype, or an `NF4Weight`.
        bias: [N] or None.
        adapters: by name, A and B all of one dtype.
        names: one for each sample; a name that is not in `adapters` means no update.
    Returns:
        [B, ..., N], dtype of x; over a dense weight under autocast, autocast's.
    Raises:
        ValueError: the number of names is not B.
    """
    if len(names) != x.shape[0]:
        raise ValueError(f"one adapter name for each sample: got {len(names)} names for a batch of {x.shape[0]}")
    device, dtype = x.device.type, computed_in(x)
    present = {name: adapters[name] for name in dict.fromkeys(names) if name in adapters}
    with torch.autocast(device, enabled=False):
        rows = x.to(dtype)
        if not present and isinstance(weight, NF4Weight):
            return nf4_linear(rows, weight, bias)
        bias = None if bias is None else bias.float()  # its gradient is summed in fp32
        if not present and isinstance(weight, Tensor):
            return _affine(rows, in_dtype(weight, dtype), bias)
        wide = any(adapter.bias is not None for adapter in present.values())
        side_by_side = not any(adapter.dropout_p for adapter in present.values())
        few = x.numel() // x.shape[-1] * (len(present) - 1) <= SIDE_BY_SIDE_UP_TO.get(device, 0)
        kernels = x.numel() > 0 and not seen_by_others(x, None) and backend(x.device).name == "triton"
        if kernels and (torch.is_grad_enabled() or not (side_by_side and few)):  # autograd would add dx in 16 bits
            return _by_kernels(x, dtype, weight, bias, present, names, wide)
        if side_by_side and few:
            update = _side_by_side(x, bias, present, names)
        else:
            update = _in_segments(x, bias, present, names, dtype if isinstance(weight, Tensor) else x.dtype)
        return _added(rows, weight, update, wide, x.dtype)


def several_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, adapters: Sequence[Lora]) -> Tensor:
    """y = x Wᵀ + bias + the updates of several adapters, each with its own dropout and dtype, over one base product.

    Differentiable in x, the adapters, bias, and in a dense weight. The adapters' ranks are put side by side: one
    product gathers all updates, which are added to the base product as in `mixed_linear`.

    Args:
        x: [..., K], bf16, fp16 or fp32. Under autocast it is cast to autocast's dtype.
        weight: [N, K], dense in x's dtype, or an `NF4Weight`.
        bias: [N] or None.
        adapters: one or more.
    Returns:
        [..., N], dtype of x; over a dense weight under autocast, autocast's.
    """
    device, dtype = x.device.type, computed_in(x)
    with torch.autocast(device, enabled=False):
        widest = torch.float32 if any(each.dtype == torch.float32 for each in adapters) else adapters[0].dtype
        cast = {
            dtype: x.to(dtype) for dtype in (each.dtype for each in adapters)
        }  # once each: their gradients add up before the cast
        hidden = []
        for each in adapters:
            seen = F.dropout(cast[each.dtype], each.dropout_p)
            hidden.append(((seen @ each.a.t().to(each.dtype)) * each.scaling).to(widest))  # [..., R]
        lora_b = torch.cat([each.b.to(widest) for each in adapters], dim=1)  # [N, R_1 + R_2 + ...]
        wide = any(each.bias is not None for each in adapters)
        total = None if bias is None else bias.float()
        for each in adapters:
            total = total_bias(total, each)
        update = _affine(torch.cat(hidden, dim=-1), lora_b, total, wide)  # [..., R_1 + R_2 + ...] -> [..., N]
        return _added(x.to(dtype), weight, update, wide, x.dtype)


def _added(rows: Tensor, weight: Tensor | NF4Weight, update: Tensor, wide: bool, given: torch.dtype) -> Tensor:
    """rows Wᵀ + update, [..., N]. wide: the update may be larger than all else, and is added in fp32. given: of x."""
    if isinstance(weight, NF4Weight):
        dtype = torch.promote_types(given, rows.dtype)
        return (nf4_linear(rows, weight) + update.to(torch.float32 if wide else dtype)).to(dtype)
    weight = in_dtype(weight, rows.dtype)
    if wide:
        return (F.linear(rows, weight) + update).to(rows.dtype)
    y: Tensor = _AddedProduct.apply(update.to(rows.dtype).flatten(0, -2), rows.reshape(-1, rows.shape[-1]), weight)
    return y.view(update.shape)


class _AddedProduct(torch.autograd.Function):
    """update + x Wᵀ, rounded once. update: [M, N]; x: [M, K]; weight: [N, K], in one dtype."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        return torch.add(wide_product(x, weight.t()), update).to(x.dtype) if x.is_cuda else update.addmm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_update, need_x, need_weight = ctx.needs_input_grad
        return dy if need_update else None, dy @ weight if need_x else None, dy.t() @ x if need_weight else None


def _by_kernels(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    adapters: Mapping[str, Lora],
    names: Sequence[str],
    wide: bool,
) -> Tensor:
    """`mixed_linear` as a whole by the Triton kernels of `ops.mixed_cuda`; x: [B, ..., K], cast to `dtype`."""
    from fastlora.ops import mixed_cuda

    parts, places, k = list(adapters.values()), _places(adapters, names), x.shape[-1]
    facts = tuple((part.scaling, part.dropout_p) for part in parts)
    stretches = mixed_cuda.rows_of(places, x.numel() // k // len(names), facts, x.device)
    biases = None
    if wide or bias is not None:
        nothing = x.new_zeros(weight.shape[0], dtype=torch.float32) if bias is None else bias
        totals = (total_bias(bias, part) for part in parts)
        biases = torch.stack([*(nothing if total is None else total for total in totals), nothing])  # [adapters + 1, N]
    adapted = torch.float32 if torch.float32 in [part.dtype for part in parts] else dtype
    lora_a = mixed_cuda.stacked([part.a.to(adapted) for part in parts], 0)  # [adapters, R, K]
    lora_b = mixed_cuda.stacked([part.b.to(adapted) for part in parts], 1)  # [adapters, N, R]
    result = dtype if isinstance(weight, Tensor) else torch.promote_types(x.dtype, dtype)
    y = mixed_cuda.linear(
        x.reshape(-1, k),
        in_dtype(weight, dtype),
        lora_a,
        lora_b,
        biases,
        stretches,
        dtype,
        result,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool = False) -> Tensor:
    """x weightᵀ + bias; the gradient of an fp32 bias is summed in fp32. wide: the result is fp32, for the bias."""
    if wide and bias is not None:
        return F.linear(x, weight).float() + bias
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.addmm(_Expanded.apply(bias, rows.shape[0], x.dtype), rows, weight.t())
    return y.view(*x.shape[:-1], weight.shape[0])


class _Expanded(torch.autograd.Function):
    """An fp32 bias [N] as [M, N] in another dtype, without memory; its backward sums rows in fp32."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        return bias.to(dtype).expand(rows, -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dy.sum(0, dtype=torch.float32), None, None


def _places(adapters: Mapping[str, Lora], names: Sequence[str]) -> tuple[int, ...]:
    """For each sample the position of its adapter, or -1."""
    known = {name: place for place, name in enumerate(adapters)}
    return tuple(known.get(name, -1) for name in names)


def _side_by_side(x: Tensor, bias: Tensor | None, adapters: Mapping[str, Lora], names: Sequence[str]) -> Tensor:
    """The updates and the bias, [B, ..., N], with ranks side by side; in fp32 where adapters have biases."""
    parts = list(adapters.values())
    dtype = parts[0].dtype
    lora_a = torch.cat([part.a for part in parts]) if len(parts) > 1 else parts[0].a
    columns = [part.b for part in parts]
    places = _places(adapters, names)
    shape = (len(names), *[1] * (x.ndim - 2), -1)
    factors = _kept(_factors, places, tuple((part.a.shape[0], part.scaling) for part in parts), x.device)
    h = ((x.to(dtype) @ lora_a.t().to(dtype)) * factors.view(shape)).to(dtype)  # [B, ..., R_1 + R_2 + ...]
    biased = [part for part in parts if part.bias is not None]
    if biased:
        # a bias is one more column of B, times 1 in the rows of its adapter
        columns += [(part.bias.float() * part.scaling).unsqueeze(1) for part in biased if part.bias is not None]
        ones = _kept(_factors, places, tuple((0 if part.bias is None else 1, 1.0) for part in parts), x.device)
        dtype = torch.float32
        h = torch.cat((h, ones.view(shape).expand(*h.shape[:-1], -1)), dim=-1)  # in fp32
    lora_b = torch.cat([column.to(dtype) for column in columns], dim=1) if len(columns) > 1 else columns[0].to(dtype)
    return _affine(h, lora_b, bias)  # [B, ..., N]


def _in_segments(
    x: Tensor, bias: Tensor | None, adapters: Mapping[str, Lora], names: Sequence[str], out_dtype: torch.dtype
) -> Tensor:
    """As `_side_by_side`, by one product for each adapter over its own samples, which are gathered first."""
    wide = any(adapter.bias is not None for adapter in adapters.values())
    out_dtype = torch.float32 if wide else out_dtype
    mine: dict[str | None, list[int]] = {}
    for place, name in enumerate(names):
        mine.setdefault(name if name in adapters else None, []).append(place)
    order = [place for places in mine.values() for place in places]
    is_sorted = order == list(range(len(names)))
    gathered = x if is_sorted else x.index_select(0, _kept(_indices, tuple(order), x.device))
    n = next(iter(adapters.values())).b.shape[0]
    updates = []
    for owner, seen in zip(mine, gathered.split([len(places) for places in mine.values()]), strict=True):
        if owner is None:
            nothing = seen.new_zeros(n) if bias is None else bias
            rows = _Expanded.apply(nothing, seen.numel() // seen.shape[-1], out_dtype)
            updates.append(rows.view(*seen.shape[:-1], n))
            continue
        part, dtype = adapters[owner], adapters[owner].dtype
        seen = seen.to(dtype)
        if part.dropout_p:
            seen = F.dropout(seen, part.dropout_p)
        h = (seen @ part.a.t().to(dtype)) * part.scaling  # [its samples, ..., R]
        updates.append(_affine(h, part.b.to(dtype), total_bias(bias, part), wide).to(out_dtype))
    update = torch.cat(updates) if len(updates) > 1 else updates[0]
    if is_sorted:
        return update
    back = sorted(range(len(order)), key=order.__getitem__)
    return update.index_select(0, _kept(_indices, tuple(back), x.device))


def _kept(make: Any, *key: Any) -> Tensor:
    """make(*key) on the device, cached: one copy serves all layers of a step, and all steps of a generation."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return make.__wrapped__(*key, False)  # type: ignore[no-any-return]  # it belongs to a graph or a mode
    found: Tensor = make(*key, torch.is_inference_mode_enabled())
    return keep_if_captured(found, found.device)


@lru_cache(maxsize=256)
def _factors(
    places: tuple[int, ...], columns: tuple[tuple[int, float], ...], device: torch.device, inference: bool
) -> Tensor:
    """[B, R_1 + R_2 + ...], fp32: for each sample, its own adapter's factor in that adapter's columns, 0 elsewhere.

    Args:
        places: for each sample the position of its adapter, or -1.
        columns: for each adapter the number of its columns, and its factor.
    """
    rows = [
        [factor if place == own else 0.0 for own, (width, factor) in enumerate(columns) for _ in range(width)]
        for place in places
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@lru_cache(maxsize=256)
def _indices(places: tuple[int, ...], device: torch.device, inference: bool) -> Tensor:
    return torch.tensor(places, device=device)
