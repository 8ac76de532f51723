"""peft's wrappers around stacks of experts (`target_parameters`): what they hold, and when they can be sped up.

peft wraps the module of experts once for each adapted parameter, and packs the adapters of all experts in two matrices:

    A [E·r, in]     expert slowest:  rows e·r to (e + 1)·r are A of expert e
    B [out, r·E]    expert fastest:  columns e, E + e, 2 E + e, ... are B of expert e
"""

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, compiler, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fastlora.kernels.operands import FLOAT_DTYPES, Lora
from fastlora.layers import experts
from fastlora.layers.experts import (
    IMPLEMENTATIONS,
    INTERFACE,
    computes_in_fp32,
    projections,
    routing_of,
)
from fastlora.layers.report import LayerRow
from fastlora.ops.autograd import computed_in
from fastlora.ops.grouped import computed_by
from fastlora.peft_layers.conditions import EXPECTED, active_names, adapter, is_plain
from fastlora.peft_layers.linear import SPED_UP, SpedUp, count

# None in a peft that does not have target_parameters yet.
ParamWrapper: Any = getattr(peft_layer, "ParamWrapper", None)

_PLAIN = (nn.Parameter, Tensor)
# What peft calls inside a stack's parametrization, and ours does not: a replaced one is left to peft to call.
_PROXIES = [
    (kind, kind.forward)
    for name in ("_LoraParameterProxy", "_LoraFactorsProxy")
    if (kind := getattr(peft_layer, name, None)) is not None
]


def is_wrapper(layer: Any) -> bool:
    """Whether a layer is peft's wrapper around a parameter."""
    return ParamWrapper is not None and isinstance(layer, ParamWrapper)


def is_packed(layer: Any) -> bool:
    """Whether the parameter of one of peft's wrappers is packed: then peft can neither form W + B A nor merge."""
    return parametrize.is_parametrized(layer.get_base_layer(), layer.parameter_name)


def follow(layer: Any) -> None:
    """Move the scales of a packed stack to its codes: they are not buffers, so they do not move with the module."""
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


def parameter_reason(layer: Any) -> str:
    """Why one of peft's wrappers cannot be sped up in its present state; empty where it can."""
    experts = layer.get_base_layer()
    if "forward" in layer.__dict__:
        return "its forward has been replaced on the instance"
    if layer.num_experts == 1:
        return "target_parameters with one matrix, not a stack of experts: peft forms W + B A"
    if any(not hasattr(experts, name) for name in INTERFACE):
        return f"{type(experts).__name__} does not have transformers' interface of experts"
    if getattr(layer, "_did_swap_in_out_features", False) == bool(experts.is_transposed):
        return "this peft stores A and B of a stack the other way: pip install 'peft>=0.20'"
    if layer.parameter_name not in projections(experts):
        return f"{layer.parameter_name} is not one of the projections {projections(experts)}"
    if getattr(experts.config, "_experts_implementation", None) not in IMPLEMENTATIONS:
        return f"experts_implementation={experts.config._experts_implementation} is asked for"
    if getattr(experts, "_is_expert_parallel", False):
        return "experts are spread over devices"
    return ""


def step_back_reason(wrappers: list[Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why this call must go to peft's forward; empty where ours computes the same."""
    outer, experts = wrappers[0], wrappers[-1].base_layer
    if outer.disable_adapters:
        return EXPECTED[0]
    if outer.merged:
        return EXPECTED[1]
    if not any(_active(wrapper) for wrapper in wrappers):
        return EXPECTED[2]
    if not all(map(is_plain, wrappers[1:])):
        return "a wrapper inside has hooks or a forward of its own"
    if any(kind.forward is not forward for kind, forward in _PROXIES):
        return "the forward of peft's parametrization has been replaced"
    reason = next(filter(None, map(_wrapper_reason, wrappers)), "") or _experts_reason(experts)
    if reason:
        return reason
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks for all modules are registered"
    routing = routing_of(experts, x, args, kwargs)
    if routing is None or x.ndim != 2:
        return "called with other arguments than tokens, their experts and weights"
    return _dtype_reason(x, experts, wrappers)


def updates_of(wrappers: list[Any]) -> dict[str, Lora]:
    """Parameter name -> its active adapters; several become one of the summed rank."""
    found = {}
    for wrapper in wrappers:
        parts = [_unpack(wrapper, name) for name in _active(wrapper)]
        if len(parts) == 1:
            found[wrapper.parameter_name] = parts[0]
        elif parts:
            a = torch.cat([part.a for part in parts], dim=1)  # [E, R_1 + R_2 + ..., K]
            b = torch.cat([part.b * part.scaling for part in parts], dim=2)  # [E, N, R_1 + R_2 + ...]
            found[wrapper.parameter_name] = Lora(a, b)
    return found


def row(name: str, layer: Any, reason: str) -> LayerRow:
    """A row of the report. reason: why peft computes the layer; empty if fastlora does."""
    experts, rank = layer.get_base_layer(), next(iter(layer.r.values()), 0)
    shape, kind = (layer.out_features, layer.in_features), f"ParamWrapper({type(experts).__name__})"
    if reason:
        return LayerRow(name, kind, shape, False, reason, r=rank)
    said = f"peft's stack sped up in place: {layer.num_experts} experts of {layer.parameter_name}, r={rank} each"
    packed = is_packed(layer)
    stored = experts.parametrizations[layer.parameter_name] if packed else None
    device = (stored.original if stored else getattr(experts, layer.parameter_name)).device
    dtype = stored[0].quant_state.dtype if stored else getattr(experts, layer.parameter_name).dtype
    blocksize = stored[0].quant_state.blocksize if stored else 0
    path, kernels = computed_by(device, dtype, layer.num_experts, *shape, blocksize, rank)
    return LayerRow(name, kind, shape, True, said, path, rank, packed, layer.fastlora_calls, kernels)


def _unpack(wrapper: Any, name: str) -> Lora:
    a, b, scaling, *_ = adapter(wrapper, name)
    count = wrapper.num_experts
    a = a.reshape(count, -1, a.shape[1])  # [E·r, K] -> [E, r, K]
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # [N, r·E] -> [E, N, r]
    return Lora(a, b, scaling)


def _active(wrapper: Any) -> list[str]:
    return [] if wrapper.disable_adapters or wrapper.merged else active_names(wrapper)


def _wrapper_reason(wrapper: Any) -> str:
    if wrapper.disable_adapters and wrapper.merged:
        return "adapters are disabled while merged"
    reason = parameter_reason(wrapper)
    for name in _active(wrapper):
        parts = [wrapper._modules[part]._modules[name] for part in ("lora_A", "lora_B")]
        if any(type(part) is not nn.Linear or not is_plain(part) or part.bias is not None for part in parts):
            return reason or "A or B is not a plain nn.Linear without hooks and bias"
        if any(type(part.weight) not in _PLAIN for part in parts):
            return reason or f"A is a {type(parts[0].weight).__name__}"
    return reason


def _experts_reason(experts: Any) -> str:
    if not _is_plain_except_bitsandbytes(experts):
        return "the experts have hooks or a forward of their own"
    for name in projections(experts):
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
    """Why a parametrized stack cannot be read; empty where it can: only what bitsandbytes packed in NF4."""
    found = experts.parametrizations[name]
    kinds = [type(parametrization).__name__ for parametrization in found]
    if kinds[:1] != ["Bnb4bitParametrization"] or kinds[1:] not in ([], ["Transposed"]):
        return f"{name} is parametrized"
    if len(kinds) != 1 + bool(experts.is_transposed):
        return f"{name} is packed as [in, out]: pack it with quantize_experts, as the product reads it"
    state = found[0].quant_state
    if state.quant_type != "nf4" or state.dtype not in FLOAT_DTYPES:
        return f"{name} is {state.quant_type} of {state.dtype}"
    return "" if state.shape[1:].numel() % state.blocksize == 0 else f"blocks of {name} cross from expert to expert"


def _dtype_reason(x: Tensor, experts: Any, wrappers: list[Any]) -> str:
    dense = [name for name in projections(experts) if not parametrize.is_parametrized(experts, name)]
    dtypes = {getattr(experts, name).dtype for name in dense}
    adapters = {wrapper.lora_A[name].weight.dtype for wrapper in wrappers for name in _active(wrapper)}
    computed = computed_in(x)
    if computed is not torch.float32 and computes_in_fp32(experts):
        return "its forward computes in fp32 on purpose"
    if computed not in FLOAT_DTYPES or not dtypes <= {computed}:
        return f"dtypes: computed in {computed}, experts {', '.join(map(str, dtypes)) or 'packed'}"
    return "" if adapters <= {torch.float32, computed} else f"dtypes: adapters {', '.join(map(str, adapters))}"


def _is_plain_except_bitsandbytes(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # bitsandbytes' own hooks keep its expanded stacks during a call; here nothing is expanded.
    others = [hook for hook in hooks if getattr(hook, "__module__", "") != "bitsandbytes.nn.parametrize"]
    return not (others or module._backward_hooks or module._backward_pre_hooks) and "forward" not in module.__dict__


if ParamWrapper is not None:

    class SpedUpParamWrapper(SpedUp, ParamWrapper):  # type: ignore[misc]
        """peft's `lora.ParamWrapper` over a stack of experts, sped up: W + B A is not formed."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The experts' output, by our forward where the conditions hold, else by peft's."""
            wrappers = chain(self)
            reason = step_back_reason(wrappers, x, args, kwargs)
            if not compiler.is_compiling():
                for wrapper in wrappers[: 1 if reason else None]:
                    count(wrapper.fastlora_calls, reason)
            if reason:
                if reason not in EXPECTED and any(map(is_packed, wrappers)):
                    raise RuntimeError(
                        f"peft computes no adapters over a packed stack, and fastlora cannot here: {reason}"
                    )
                return super().forward(x, *args, **kwargs)
            base = wrappers[-1].base_layer
            routing = routing_of(base, x, args, kwargs)
            return experts.forward(base, self.num_experts, updates_of(wrappers), x, *(routing or ()))

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """As peft's, but refuses a packed stack, into which peft would merge without effect and without a word."""
            if is_packed(self):
                raise ValueError(
                    f"{self.parameter_name} is packed in 4 bits and cannot take an update: save the adapter, load the "
                    "model without quantization, and merge there"
                )
            super().merge(safe_merge, adapter_names)

        def unmerge(self) -> None:
            """As peft's, but refuses a stack packed since the merge: peft's subtraction would have no effect on it."""
            if self.merged and is_packed(self):
                raise ValueError(f"{self.parameter_name} was packed while adapters were merged: load the model again")
            super().unmerge()

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            result = super()._apply(fn, recurse)
            follow(self)
            return result

    SpedUpParamWrapper.__name__ = "ParamWrapper"  # peft recognizes it by this name when further adapters come
    SPED_UP[ParamWrapper] = SpedUpParamWrapper, lambda layer, _: parameter_reason(layer)
