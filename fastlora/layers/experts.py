"""Stacks of experts (mixtures of experts) with LoRA; no W + B A is ever formed.

transformers keeps the experts of a layer as 3-D parameters: gate_up_proj [E, 2I, H] and down_proj [E, H, I], or with
the last two dimensions exchanged (`is_transposed`).

`forward` sorts the pairs of token and expert by expert, runs both projections as `grouped_lora_linear`, and adds up the
weighted results of each token in the order of its choices. transformers' "grouped_mm" computes the same, so the result
does not depend on atomics.

A stack may be packed in NF4 by bitsandbytes' parametrization (`peft_layers.packing`); then the product reads only the
codes of experts that have tokens.
"""

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.kernels.operands import Lora
from fastlora.ops.autograd import computed_in, constant_under_compile
from fastlora.ops.grouped import grouped_lora_linear
from fastlora.ops.nf4 import NF4Weight

INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "config")
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
_WIDENED = re.compile(r"_proj\[\w+\]\.(float\(\)|to\(torch\.float32\))")  # an expert's weight, cast to fp32


def routing_of(experts: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """(experts [T, k], weights [T, k]) of a call; None if it has other arguments."""
    if kwargs:
        try:
            args = tuple(inspect.signature(type(experts).forward).bind(experts, x, *args, **kwargs).arguments.values())
        except TypeError:
            return None
        args = args[2:]
    tensors = [value for value in args if isinstance(value, Tensor) and value.ndim == 2]
    if not len(tensors) == len(args) == 2 or tensors[0].shape != tensors[1].shape or tensors[0].is_floating_point():
        return None
    return tensors


def forward(experts: Any, count: int, updates: dict[str, Lora], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the module of experts computes, with adapters on its weights.

    Args:
        experts: a module with transformers' interface of experts. count: how many experts it has.
        updates: adapters by parameter name, a [E, R, K] and b [E, N, R]; a projection without one runs as it is.
        x: [T, H]. chosen: [T, k], indices of experts. weights: [T, k].
    Returns:
        [T, H], dtype of x.
    """
    tokens, choices = chosen.shape
    flat = chosen.reshape(-1)
    by_expert, order = torch.sort(flat, stable=True)
    up, down = projections(experts)
    steps = torch.arange(count, device=flat.device, dtype=flat.dtype)
    offsets = torch.searchsorted(by_expert, steps, right=True).to(torch.int32)  # [E]
    rows = x[order // choices]  # [T k, H]
    dtype = computed_in(x)
    rows = _project(experts, up, updates, rows.to(dtype), offsets)  # [T k, 2I], or [T k, I] without a gate
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)  # [T k, I]
    rows = _project(experts, down, updates, rows.to(dtype), offsets)  # [T k, H]
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    weighted = rows * weights.reshape(-1)[order].unsqueeze(-1)  # [T k, H]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return weighted[place].view(tokens, choices, weighted.shape[-1]).sum(dim=1).to(x.dtype)  # [T, H]


def projections(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def stack_of(experts: Any, name: str) -> Tensor | NF4Weight:
    """The weights of a projection: [E, N, K], or packed [E N, K]."""
    if parametrize.is_parametrized(experts, name):
        packed = experts.parametrizations[name]
        return NF4Weight.from_quant_state(packed.original, packed[0].quant_state)
    weight: Tensor = getattr(experts, name)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _project(experts: Any, name: str, updates: dict[str, Lora], rows: Tensor, offsets: Tensor) -> Tensor:
    weight = stack_of(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    lora = updates.get(name)
    if lora is None:
        return grouped_lora_linear(rows, weight, None, None, 0.0, offsets, bias)
    return grouped_lora_linear(rows, weight, lora.a, lora.b, lora.scaling, offsets, bias)


def computes_in_fp32(experts: Any) -> bool:
    """Whether the module runs its own forward ("eager") and that casts each expert's weights to fp32."""
    return getattr(experts.config, "_experts_implementation", None) in (None, "eager") and _widens(type(experts))  # type: ignore[arg-type]


@constant_under_compile
@functools.cache
def _widens(kind: Any) -> bool:
    try:
        return _WIDENED.search(inspect.getsource(inspect.unwrap(kind.forward))) is not None
    except (OSError, TypeError):  # there is no source
        return False
