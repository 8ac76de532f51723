"""Stacks of experts (mixtures of experts) with LoRA from peft's `target_parameters`, without forming any W + B A.

transformers keeps the experts of a layer as 3-D parameters: gate_up_proj [E, 2I, H] and down_proj [E, H, I], or with
the last two dimensions exchanged (`is_transposed`). peft wraps the module once for each adapted parameter and packs
all experts' adapters in two matrices:

    A [E·r, in]     expert slowest:  rows e·r to (e + 1)·r are A of expert e
    B [out, r·E]    expert fastest:  columns e, E + e, 2 E + e, ... are B of expert e

`forward` sorts the pairs of token and expert by expert, runs both projections as `grouped_lora_linear`, and adds the
weighted results up, each token's in the order of its choices: what transformers' "grouped_mm" computes, so the result
does not depend on atomics.
"""

import inspect
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.grouped import grouped_lora_linear
from fastlora.layer_report import Row
from fastlora.nf4 import FLOAT_DTYPES

# None in a peft that has no target_parameters yet.
ParamWrapper: Any = getattr(peft_layer, "ParamWrapper", None)

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "config")
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
_PLAIN = (nn.Parameter, Tensor)


class Update(NamedTuple):
    """Adapters of one stacked parameter: a [E, R, K], b [E, N, R], factor."""

    a: Tensor
    b: Tensor
    scaling: float


def is_wrapper(layer: Any) -> bool:
    """Whether a layer is peft's wrapper around a parameter."""
    return ParamWrapper is not None and isinstance(layer, ParamWrapper)


def chain(layer: Any) -> list[Any]:
    """peft's wrappers around one module, outermost first."""
    found = [layer]
    while is_wrapper(found[-1].base_layer):
        found.append(found[-1].base_layer)
    return found


def standing_reason(layer: Any) -> str:
    """Why a wrapper of peft's is not sped up as it now stands; empty where it can be."""
    experts = layer.get_base_layer()
    if layer.num_experts == 1:
        return "target_parameters with one matrix, not a stack of experts: peft forms W + B A"
    if any(not hasattr(experts, name) for name in _INTERFACE):
        return f"{type(experts).__name__} does not have transformers' interface of experts"
    if layer.parameter_name not in _projections(experts):
        return f"{layer.parameter_name} is none of the projections {_projections(experts)}"
    if getattr(experts.config, "_experts_implementation", None) not in _IMPLEMENTATIONS:
        return f"experts_implementation={experts.config._experts_implementation} is asked for"
    if getattr(experts, "_is_expert_parallel", False):
        return "experts are spread over devices"
    return ""


def step_back_reason(wrappers: list[Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why this call must go to peft's forward; empty where the fused path computes the same."""
    outer, experts = wrappers[0], wrappers[-1].base_layer
    if not all(map(_is_plain, wrappers[1:])):
        return "a wrapper inside has hooks or a forward of its own"
    reason = next(filter(None, map(_wrapper_reason, wrappers)), "") or _experts_reason(experts)
    if reason:
        return reason
    if outer.disable_adapters:
        return "adapters are disabled"
    if outer.merged:
        return "adapters are merged"
    if not any(_active(wrapper) for wrapper in wrappers):
        return "no adapter of this layer is active"
    routing = routing_of(experts, x, args, kwargs)
    if routing is None or x.ndim != 2:
        return "called with other arguments than tokens, their experts and weights"
    return _dtype_reason(x, experts, wrappers)


def routing_of(experts: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """(experts [T, k], weights [T, k]) of a call; None where it has other arguments."""
    if kwargs:
        try:
            args = tuple(inspect.signature(type(experts).forward).bind(experts, x, *args, **kwargs).arguments.values())
        except TypeError:
            return None
        args = args[2:]
    tensors = [value for value in args if isinstance(value, Tensor) and value.ndim == 2]
    return tensors if len(tensors) == len(args) == 2 else None


def updates_of(wrappers: list[Any]) -> dict[str, Update]:
    """Parameter name -> its active adapters, several as one of the summed rank."""
    found = {}
    for wrapper in wrappers:
        parts = [_unpack(wrapper, name) for name in _active(wrapper)]
        if len(parts) == 1:
            found[wrapper.parameter_name] = parts[0]
        elif parts:
            a = torch.cat([part.a for part in parts], dim=1)
            b = torch.cat([part.b * part.scaling for part in parts], dim=2)
            found[wrapper.parameter_name] = Update(a, b, 1.0)
    return found


def forward(experts: Any, updates: dict[str, Update], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the module computes with its weights adapted.

    Args:
        experts: a module with transformers' interface of experts.
        updates: adapters by parameter name; a projection without any runs as it is.
        x: [T, H]. chosen: [T, k], indices of experts. weights: [T, k].
    Returns:
        [T, H], dtype of x.
    """
    tokens, choices = chosen.shape
    flat = chosen.reshape(-1)
    by_expert, order = torch.sort(flat, stable=True)
    up, down = _projections(experts)
    steps = torch.arange(getattr(experts, up).shape[0], device=flat.device, dtype=flat.dtype)
    offsets = torch.searchsorted(by_expert, steps, right=True).to(torch.int32)
    rows = x[order // choices]  # [T k, H]
    rows = _project(experts, up, updates, rows, offsets)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _project(experts, down, updates, rows, offsets)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    weighted = rows * weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return weighted[place].view(tokens, choices, -1).sum(dim=1).to(x.dtype)


def row(name: str, layer: Any, reason: str, path: str) -> Row:
    """A row of the report; `reason` says why peft computes the layer, empty where `path` does."""
    experts, rank = layer.get_base_layer(), next(iter(layer.r.values()), 0)
    shape, kind = (layer.out_features, layer.in_features), f"ParamWrapper({type(experts).__name__})"
    if reason:
        return Row(name, kind, shape, False, reason, r=rank)
    said = f"peft's stack sped up in place: {layer.num_experts} experts of {layer.parameter_name}, r={rank} each"
    return Row(name, kind, shape, True, said, path, rank, calls=layer.fastlora_calls)


def _projections(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _project(experts: Any, name: str, updates: dict[str, Update], rows: Tensor, offsets: Tensor) -> Tensor:
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    weight = weight.transpose(1, 2) if experts.is_transposed else weight  # [E, N, K]
    a, b, scaling = updates.get(name) or (None, None, 0.0)
    return grouped_lora_linear(rows.to(weight.dtype), weight, a, b, scaling, offsets, bias)


def _unpack(wrapper: Any, name: str) -> Update:
    a, b = (wrapper._modules[part]._modules[name].weight for part in ("lora_A", "lora_B"))
    count = wrapper.num_experts
    a = a.reshape(count, -1, a.shape[1])  # [E·r, K] -> [E, r, K]
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # [N, r·E] -> [E, N, r]
    return Update(a, b, wrapper.scaling[name])


def _active(wrapper: Any) -> list[str]:
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _wrapper_reason(wrapper: Any) -> str:
    if wrapper.disable_adapters and wrapper.merged:
        return "adapters are disabled while merged"
    reason = standing_reason(wrapper)
    for name in _active(wrapper):
        parts = [wrapper._modules[part]._modules[name] for part in ("lora_A", "lora_B")]
        if any(type(part) is not nn.Linear or not _is_plain(part) or part.bias is not None for part in parts):
            return reason or "A or B is no plain nn.Linear without hooks and bias"
        if any(type(part.weight) not in _PLAIN for part in parts):
            return reason or f"A is a {type(parts[0].weight).__name__}"
    return reason


def _experts_reason(experts: Any) -> str:
    if not _is_plain(experts):
        return "the experts have hooks or a forward of their own"
    if parametrize.is_parametrized(experts):
        return "the experts are parametrized"
    for name in _projections(experts):
        weight = getattr(experts, name)
        if type(weight) not in _PLAIN or weight.dtype not in FLOAT_DTYPES:
            return f"{name} is a {type(weight).__name__} in {weight.dtype}"
    return ""


def _dtype_reason(x: Tensor, experts: Any, wrappers: list[Any]) -> str:
    dtypes = {getattr(experts, name).dtype for name in _projections(experts)}
    adapters = {wrapper.lora_A[name].weight.dtype for wrapper in wrappers for name in _active(wrapper)}
    autocast = torch.is_autocast_enabled(x.device.type)
    if dtypes != {x.dtype} and not autocast:
        return f"dtypes: input {x.dtype}, experts {', '.join(map(str, dtypes))}"
    computed = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if autocast and dtypes != {computed}:
        return f"dtypes: experts {', '.join(map(str, dtypes))} under autocast to {computed}"
    return "" if adapters <= {torch.float32, computed} else f"dtypes: adapters {', '.join(map(str, adapters))}"


def _is_plain(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__
