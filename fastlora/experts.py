"""Stacks of experts (mixtures of experts) with LoRA from peft's `target_parameters`, without forming any W + B A.

transformers keeps the experts of a layer as 3-D parameters: gate_up_proj [E, 2I, H] and down_proj [E, H, I], or with
the last two dimensions exchanged (`is_transposed`). peft wraps the module once for each adapted parameter and packs
all experts' adapters in two matrices:

    A [E·r, in]     expert slowest:  rows e·r to (e + 1)·r are A of expert e
    B [out, r·E]    expert fastest:  columns e, E + e, 2 E + e, ... are B of expert e

`forward` sorts the pairs of token and expert by expert, runs both projections as `grouped_lora_linear`, and adds the
weighted results up, each token's in the order of its choices: what transformers' "grouped_mm" computes, so the result
does not depend on atomics.

A stack may be packed in NF4 by `bitsandbytes.nn.parametrize.replace_parameter_4bit`, after peft has wrapped it (before,
peft does not find it); `quantize_experts` does that. Then QLoRA reads the packed codes of the experts that have
tokens, where peft would expand the stack. A stack kept as [E, in, out] is packed as [E, out, in], for blocks run along
what a product sums over, and a second parametrization turns it back: whoever asks for the parameter sees the old shape.
"""

import functools
import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fastlora.layer_report import Row
from fastlora.ops.autograd import computed_in
from fastlora.ops.grouped import grouped_lora_linear, kernels
from fastlora.ops.nf4 import FLOAT_DTYPES, NF4Weight

try:
    from peft.tuners.lora import layer as peft_layer

    from fastlora.peft_conditions import EXPECTED, active_names, adapter, is_plain
except ImportError:  # without peft there are no wrappers of its, and `forward` serves `fastlora.expert_layers`
    peft_layer = None  # type: ignore[assignment]

# None in a peft that has no target_parameters yet.
ParamWrapper: Any = getattr(peft_layer, "ParamWrapper", None)

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "config")
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
_WIDENED = re.compile(r"_proj\[\w+\]\.(float\(\)|to\(torch\.float32\))")  # an expert's weight, cast to fp32
_PLAIN = (nn.Parameter, Tensor)


class Update(NamedTuple):
    """Adapters of one stacked parameter: a [E, R, K], b [E, N, R], factor."""

    a: Tensor
    b: Tensor
    scaling: float


class Transposed(nn.Module):
    """The parametrization that shows a stack packed as [E, out, in] as [E, in, out]."""

    def forward(self, stack: Tensor) -> Tensor:
        """[E, out, in] to [E, in, out], a view."""
        return stack.transpose(1, 2)


def is_wrapper(layer: Any) -> bool:
    """Whether a layer is peft's wrapper around a parameter."""
    return ParamWrapper is not None and isinstance(layer, ParamWrapper)


def is_packed(layer: Any) -> bool:
    """Whether the parameter of one of peft's wrappers is packed: peft can then neither form W + B A nor merge it."""
    return parametrize.is_parametrized(layer.get_base_layer(), layer.parameter_name)


def follow(layer: Any) -> None:
    """Bring the scales of a packed stack to where its codes are: no buffers, they do not move with the module."""
    if is_packed(layer):
        packed = layer.get_base_layer().parametrizations[layer.parameter_name]
        if hasattr(packed[0], "quant_state"):
            packed[0].quant_state.to(packed.original.device)


def chain(layer: Any) -> list[Any]:
    """peft's wrappers around one module, outermost first."""
    found = [layer]
    while is_wrapper(found[-1].base_layer):
        found.append(found[-1].base_layer)
    return found


def standing_reason(layer: Any) -> str:
    """Why a wrapper of peft's is not sped up as it now stands; empty where it can be."""
    experts = layer.get_base_layer()
    if "forward" in layer.__dict__:
        return "its forward has been replaced on the instance"
    if layer.num_experts == 1:
        return "target_parameters with one matrix, not a stack of experts: peft forms W + B A"
    if any(not hasattr(experts, name) for name in _INTERFACE):
        return f"{type(experts).__name__} does not have transformers' interface of experts"
    if getattr(layer, "_did_swap_in_out_features", False) == bool(experts.is_transposed):
        return "this peft lays A and B of a stack out the other way: pip install 'peft>=0.20'"
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
    if outer.disable_adapters:
        return EXPECTED[0]
    if outer.merged:
        return EXPECTED[1]
    if not any(_active(wrapper) for wrapper in wrappers):
        return EXPECTED[2]
    if not all(map(is_plain, wrappers[1:])):
        return "a wrapper inside has hooks or a forward of its own"
    reason = next(filter(None, map(_wrapper_reason, wrappers)), "") or _experts_reason(experts)
    if reason:
        return reason
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks for all modules are registered"
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
    if not len(tensors) == len(args) == 2 or tensors[0].shape != tensors[1].shape or tensors[0].is_floating_point():
        return None
    return tensors


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


def forward(experts: Any, count: int, updates: dict[str, Update], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the module computes with its weights adapted.

    Args:
        experts: a module with transformers' interface of experts. count: how many it has.
        updates: adapters by parameter name; a projection without any runs as it is.
        x: [T, H]. chosen: [T, k], indices of experts. weights: [T, k].
    Returns:
        [T, H], dtype of x.
    """
    tokens, choices = chosen.shape
    flat = chosen.reshape(-1)
    by_expert, order = torch.sort(flat, stable=True)
    up, down = _projections(experts)
    steps = torch.arange(count, device=flat.device, dtype=flat.dtype)
    offsets = torch.searchsorted(by_expert, steps, right=True).to(torch.int32)
    rows = x[order // choices]  # [T k, H]
    dtype = computed_in(x)
    rows = _project(experts, up, updates, rows.to(dtype), offsets)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _project(experts, down, updates, rows.to(dtype), offsets)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    weighted = rows * weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return weighted[place].view(tokens, choices, weighted.shape[-1]).sum(dim=1).to(x.dtype)


def quantize_experts(model: nn.Module, blocksize: int = 64, double_quant: bool = True) -> nn.Module:
    """Pack every stack of experts that peft has wrapped in NF4, for QLoRA over mixtures of experts.

    The wrappers run fused from then on, for peft cannot compute over a packed stack, nor merge into one, nor add a
    further adapter: add adapters first, save them, and merge into the model as it was loaded. `torch.save` of the whole
    model is refused by torch, as for every parametrized module. A state dict has the codes of a stack [E, in, out] as
    those of [E, out, in].

    Args:
        model: with adapters on 3-D parameters (`LoraConfig(target_parameters=...)`).
        blocksize: values a scale serves. double_quant: whether the scales are quantized too.
    Returns:
        the same model.
    Raises:
        ValueError: no such parameter, or a shape or layout that the packed path cannot take. Nothing is changed.
        ImportError: bitsandbytes is not installed.
    """
    import bitsandbytes.nn.parametrize  # noqa: F401, here for its ImportError: nothing is changed yet

    from fastlora import peft_swap

    wrappers: list[Any] = [module for module in model.modules() if is_wrapper(module)]
    if not wrappers:
        raise ValueError(
            "no adapters on stacks of experts: wrap the model first, with peft.LoraConfig(target_parameters=[...])"
        )
    for wrapper in wrappers:
        experts, name = wrapper.get_base_layer(), wrapper.parameter_name
        reason = standing_reason(wrapper) or _packing_reason(experts, name, blocksize)
        if wrapper.merged:
            reason = "adapters are merged into it: unmerge them first"
        if reason:
            raise ValueError(f"{name} of {type(experts).__name__} cannot be packed in NF4: {reason}")
    for wrapper in wrappers:
        _pack(wrapper.get_base_layer(), wrapper.parameter_name, blocksize, double_quant)
        peft_swap.fuse(wrapper)
    return model


def _packing_reason(experts: Any, name: str, blocksize: int) -> str:
    if parametrize.is_parametrized(experts, name):
        return "it is parametrized already"
    if _computes_in_fp32(experts):
        return "its forward computes in fp32 on purpose"
    rows, columns = getattr(experts, name).shape[1:]
    return f"blocks of {blocksize} would cross from expert to expert" if rows * columns % blocksize else ""


def _pack(experts: Any, name: str, blocksize: int, double_quant: bool) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    if experts.is_transposed:
        turned = getattr(experts, name).data.transpose(1, 2).contiguous()
        setattr(experts, name, nn.Parameter(turned, requires_grad=False))
    replace_parameter_4bit(experts, name, double_quant, quant_type="nf4", blocksize=blocksize)
    if experts.is_transposed:
        parametrize.register_parametrization(experts, name, Transposed(), unsafe=True)


def row(name: str, layer: Any, reason: str, path: str) -> Row:
    """A row of the report; `reason` says why peft computes the layer, empty where `path` does."""
    experts, rank = layer.get_base_layer(), next(iter(layer.r.values()), 0)
    shape, kind = (layer.out_features, layer.in_features), f"ParamWrapper({type(experts).__name__})"
    if reason:
        return Row(name, kind, shape, False, reason, r=rank)
    said = f"peft's stack sped up in place: {layer.num_experts} experts of {layer.parameter_name}, r={rank} each"
    packed = is_packed(layer)
    stored = experts.parametrizations[layer.parameter_name] if packed else None
    device = (stored.original if stored else getattr(experts, layer.parameter_name)).device
    dtype = stored[0].quant_state.dtype if stored else getattr(experts, layer.parameter_name).dtype
    blocksize = stored[0].quant_state.blocksize if stored else 0
    computed = kernels(device, dtype, layer.num_experts, *shape, blocksize, rank)
    return Row(name, kind, shape, True, said, path, rank, packed, layer.fastlora_calls, computed)


def _projections(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _stack(experts: Any, name: str) -> Tensor | NF4Weight:
    """The weights of a projection: [E, N, K], or packed [E N, K]."""
    if parametrize.is_parametrized(experts, name):
        packed = experts.parametrizations[name]
        return NF4Weight.from_quant_state(packed.original, packed[0].quant_state)
    weight: Tensor = getattr(experts, name)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _project(experts: Any, name: str, updates: dict[str, Update], rows: Tensor, offsets: Tensor) -> Tensor:
    weight = _stack(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    a, b, scaling = updates.get(name) or (None, None, 0.0)
    return grouped_lora_linear(rows, weight, a, b, scaling, offsets, bias)


def _unpack(wrapper: Any, name: str) -> Update:
    a, b, scaling, *_ = adapter(wrapper, name)
    count = wrapper.num_experts
    a = a.reshape(count, -1, a.shape[1])  # [E·r, K] -> [E, r, K]
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # [N, r·E] -> [E, N, r]
    return Update(a, b, scaling)


def _active(wrapper: Any) -> list[str]:
    return [] if wrapper.disable_adapters or wrapper.merged else active_names(wrapper)


def _wrapper_reason(wrapper: Any) -> str:
    if wrapper.disable_adapters and wrapper.merged:
        return "adapters are disabled while merged"
    reason = standing_reason(wrapper)
    for name in _active(wrapper):
        parts = [wrapper._modules[part]._modules[name] for part in ("lora_A", "lora_B")]
        if any(type(part) is not nn.Linear or not is_plain(part) or part.bias is not None for part in parts):
            return reason or "A or B is no plain nn.Linear without hooks and bias"
        if any(type(part.weight) not in _PLAIN for part in parts):
            return reason or f"A is a {type(parts[0].weight).__name__}"
    return reason


def _experts_reason(experts: Any) -> str:
    if not _is_plain_but_for_bitsandbytes(experts):
        return "the experts have hooks or a forward of their own"
    for name in _projections(experts):
        if parametrize.is_parametrized(experts, name):
            reason = _parametrized_reason(experts, name)
            if reason:
                return reason
            continue
        weight = getattr(experts, name)
        if type(weight) not in _PLAIN or weight.dtype not in FLOAT_DTYPES:
            return f"{name} is a {type(weight).__name__} in {weight.dtype}"
    return ""


def _parametrized_reason(experts: Any, name: str) -> str:
    """Why a parametrized stack cannot be read: only what bitsandbytes packed in NF4 can."""
    found = experts.parametrizations[name]
    kinds = [type(parametrization).__name__ for parametrization in found]
    if kinds[:1] != ["Bnb4bitParametrization"] or kinds[1:] not in ([], ["Transposed"]):
        return f"{name} is parametrized"
    if len(kinds) != 1 + bool(experts.is_transposed):
        return f"{name} is packed as [in, out]: quantize_experts packs it as the product reads it"
    state = found[0].quant_state
    if state.quant_type != "nf4" or state.dtype not in FLOAT_DTYPES:
        return f"{name} is {state.quant_type} of {state.dtype}"
    return "" if state.shape[1:].numel() % state.blocksize == 0 else f"blocks of {name} cross from expert to expert"


def _dtype_reason(x: Tensor, experts: Any, wrappers: list[Any]) -> str:
    dense = [name for name in _projections(experts) if not parametrize.is_parametrized(experts, name)]
    dtypes = {getattr(experts, name).dtype for name in dense}
    adapters = {wrapper.lora_A[name].weight.dtype for wrapper in wrappers for name in _active(wrapper)}
    computed = computed_in(x)
    if computed is not torch.float32 and _computes_in_fp32(experts):
        return "its forward computes in fp32 on purpose"
    if computed not in FLOAT_DTYPES or not dtypes <= {computed}:
        return f"dtypes: computed in {computed}, experts {', '.join(map(str, dtypes)) or 'packed'}"
    return "" if adapters <= {torch.float32, computed} else f"dtypes: adapters {', '.join(map(str, adapters))}"


def _computes_in_fp32(experts: Any) -> bool:
    """Whether the module's own forward, which "eager" stands for, casts each expert's weights to fp32."""
    return getattr(experts.config, "_experts_implementation", None) in (None, "eager") and _widens(type(experts))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _widens(kind: Any) -> bool:
    try:
        return _WIDENED.search(inspect.getsource(inspect.unwrap(kind.forward))) is not None
    except (OSError, TypeError):  # no source to be had
        return False


def _is_plain_but_for_bitsandbytes(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # bitsandbytes' own keep its expanded stacks for the length of a call: there are none here.
    others = [hook for hook in hooks if getattr(hook, "__module__", "") != "bitsandbytes.nn.parametrize"]
    return not (others or module._backward_hooks or module._backward_pre_hooks) and "forward" not in module.__dict__
