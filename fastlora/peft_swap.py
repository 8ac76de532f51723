"""peft's own LoRA layers, sped up in place by changing their class.

An object's class can be changed while it lives. `speed_up` gives each LoRA layer of peft's a subclass of its class that
differs in `forward` alone: it takes the fused path where that computes the same, and steps back to peft's forward
wherever a condition does not hold. Parameters, names, checkpoints and all of peft's methods stay as they are.

The conditions are read at each call, for a user may disable, merge, add or switch adapters at any time. Each layer
counts both kinds of call and keeps the reason of the last step back (`layer.fastlora_calls`, `fastlora.report(model)`);
a reason met for the first time is logged as a warning, unless the user asked for what it says.

Several active adapters run as one of the summed rank: A's rows one below the other, B's columns side by side, each
times its scaling. DoRA rescales the fused product's rows (`fastlora.dora`). Layers that peft adds to such a model later
are sped up as they come. `restore` takes it all back.

A caution about bitsandbytes: in eval mode, without gradients, on a CPU with AVX512_BF16, `Linear4bit.forward` repacks
its weight in place and loses precision. The fused path never calls it, but stepping back does, as with
`disable_adapter()`; afterwards the layer is peft's alone, and the reason says so.
"""

import functools
import logging
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fastlora import dora, experts, functional
from fastlora.dora import KeptNorms
from fastlora.layer_report import Calls, Report, Row
from fastlora.linear import AdoptedWeight, compute_dtype, is_linear4bit, lora_linear_4bit
from fastlora.nf4 import FLOAT_DTYPES

logger = logging.getLogger(__name__)

# Reasons that the user asked for: not worth a warning.
_EXPECTED = ("adapters are disabled", "adapters are merged", "no adapter of this layer is active")
_warned: set[str] = set()
_PLAIN = (nn.Parameter, Tensor)


class _Fused:
    """The forward that a fused class puts before peft's."""

    fastlora_calls: Calls
    fastlora_adopted: AdoptedWeight
    fastlora_norms: KeptNorms

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, fused where the conditions hold, else by peft's forward."""
        reason = step_back_reason(self, x, args, kwargs)
        if not torch.compiler.is_compiling():
            count(self.fastlora_calls, reason)
        if reason:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        active, base = _active(self), self._modules["base_layer"]
        lora_a, lora_b, scaling, p, training = _one(self, active[0]) if len(active) == 1 else _joined(self, active)
        if active[0] in self.lora_variant:
            return self._dora(x, base, lora_a, lora_b, scaling, active[0])
        if type(base) is nn.Linear:
            weight: Any = base._parameters["weight"]
            return functional.lora_linear(x, weight, lora_a, lora_b, scaling, base._parameters["bias"], p, training)
        weight = self.fastlora_adopted.of(base)
        return lora_linear_4bit(x, base, weight, lora_a, lora_b, scaling, p, training)

    def _dora(self: Any, x: Tensor, base: Any, lora_a: Tensor, lora_b: Tensor, scaling: float, name: str) -> Tensor:
        plain = type(base) is nn.Linear
        weight = base._parameters["weight"] if plain else self.fastlora_adopted.of(base)
        y = functional.lora_linear(x if plain else x.to(compute_dtype(base, x)), weight, lora_a, lora_b, scaling)
        magnitude = self.lora_magnitude_vector._modules[name].weight
        y = dora.rescale(y, magnitude, self.fastlora_norms.of(weight, lora_a, lora_b, scaling), base.bias)
        return y if plain else y.to(x.dtype)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        self.fastlora_adopted.forget()
        self.fastlora_norms.forget()
        return super()._apply(fn, recurse)  # type: ignore[misc]


class FusedLinear(_Fused, peft_layer.Linear):
    """peft's `lora.Linear` with a fused forward."""


_FUSED: dict[type, type] = {peft_layer.Linear: FusedLinear}

try:
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError:  # an older peft, whose DoRA steps back
    DoraLinearVariant = None  # type: ignore[assignment, misc]

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb as peft_bnb

    class FusedLinear4bit(_Fused, peft_bnb.Linear4bit):
        """peft's `lora.Linear4bit` with a fused forward."""

    _FUSED[peft_bnb.Linear4bit] = FusedLinear4bit


if experts.ParamWrapper is not None:

    class FusedParamWrapper(experts.ParamWrapper):  # type: ignore[misc]
        """peft's `lora.ParamWrapper` over a stack of experts, which does not form W + B A."""

        fastlora_calls: Calls

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The experts' output, fused where the conditions hold, else by peft's forward."""
            wrappers = experts.chain(self)
            reason = experts.step_back_reason(wrappers, x, args, kwargs)
            if not torch.compiler.is_compiling():
                for wrapper in wrappers[: 1 if reason else None]:
                    count(wrapper.fastlora_calls, reason)
            if reason:
                if reason not in _EXPECTED and any(map(experts.is_packed, wrappers)):
                    raise RuntimeError(
                        f"peft computes no adapters over a packed stack, nor does fastlora here: {reason}"
                    )
                return super().forward(x, *args, **kwargs)
            base = wrappers[-1].base_layer
            routing = experts.routing_of(base, x, args, kwargs)
            return experts.forward(base, self.num_experts, experts.updates_of(wrappers), x, *(routing or ()))

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """As peft's; a packed stack takes no sum, and peft would lose the update without a word."""
            if experts.is_packed(self):
                raise ValueError(
                    f"{self.parameter_name} is packed in 4 bits and cannot take an update: save the adapter, load the "
                    "model without quantization, and merge there"
                )
            super().merge(safe_merge, adapter_names)

    _FUSED[experts.ParamWrapper] = FusedParamWrapper


def speed_up(model: nn.Module) -> Report:
    """Give every LoRA layer of peft's in the model that can use it a fused forward; harmless when repeated.

    Layers that peft adds to the model later get it too, from `peft.tuners.lora.LoraModel.inject_adapter`.

    Returns:
        a report on every linear layer, with live counts for those sped up.
    Raises:
        ValueError: the model has layers of peft's, but none that can be sped up. Nothing is changed.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}
    reasons = {name: standing_reason(layer) for name, layer in found.items()}
    if all(reasons.values()):
        told = "; ".join(sorted(set(reasons.values()))) or "it has no LoRA layers"
        raise ValueError(f"nothing in this peft model can be sped up: {told}")
    for name, layer in found.items():
        if not reasons[name]:
            _fuse(layer)
    _watch_injections()
    return _report(model, found, reasons)


def restore(model: nn.Module) -> nn.Module:
    """Give peft's layers their own class back: the model is plain peft again.

    Returns:
        the same model.
    Raises:
        ValueError: no layer of the model is one of peft's sped up in place. Nothing is changed.
    """
    fused: list[Any] = [module for module in model.modules() if type(module) in _FUSED.values()]
    if not fused:
        raise ValueError(
            "no layer of this model is one of peft's with a fused forward: restore(model) undoes replace_linear(model)"
        )
    for layer in fused:
        layer.__class__ = next(plain for plain, kind in _FUSED.items() if kind is type(layer))
        del layer.fastlora_calls, layer.fastlora_adopted, layer.fastlora_norms
    if hasattr(model, "fastlora_report"):
        del model.fastlora_report
    return model


def report(model: nn.Module) -> Report:
    """A report on every linear layer of a model with peft's layers, as it stands now."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}
    return _report(model, found, {name: _report_reason(layer) for name, layer in found.items()})


def _report_reason(layer: Any) -> str:
    return standing_reason(layer) or (
        "" if type(layer) in _FUSED.values() else "peft's own: call replace_linear(model)"
    )


def _fuse(layer: Any) -> None:
    if type(layer) in _FUSED:
        layer.__class__ = _FUSED[type(layer)]
        layer.fastlora_calls, layer.fastlora_adopted, layer.fastlora_norms = Calls(), AdoptedWeight(), KeptNorms()


def _watch_injections() -> None:
    """From now on, adapters that peft injects into a model with fused layers are fused where they can be."""
    inject = LoraModel.inject_adapter
    if hasattr(inject, "fastlora_watches"):
        return

    @functools.wraps(inject)
    def watched(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(type(module) in _FUSED.values() for module in model.modules()):
            for module in list(model.modules()):
                if isinstance(module, peft_layer.LoraLayer) and not standing_reason(module):
                    _fuse(module)
        return result

    watched.fastlora_watches = True  # type: ignore[attr-defined]
    LoraModel.inject_adapter = watched  # type: ignore[method-assign]


def standing_reason(layer: Any) -> str:
    """Why a LoRA layer of peft's is not sped up as it now stands; empty where it can be."""
    if type(layer) not in _FUSED and type(layer) not in _FUSED.values():
        return f"peft's {type(layer).__name__} has no fused form"
    if "forward" in layer.__dict__:
        return "its forward has been replaced on the instance"
    if experts.is_wrapper(layer):
        return experts.standing_reason(layer)
    base = layer.base_layer
    reason = _base_reason(base)
    if reason:
        return reason
    if getattr(layer, "fan_in_fan_out", False):
        return "fan_in_fan_out: the weight is transposed"
    names = _active(layer) or list(layer.lora_A)
    told = [_adapter_reason(layer, name) for name in names]
    return told[0] if told and all(told) else ""


def step_back_reason(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why this call must go to peft's forward; empty where the fused path computes the same."""
    if args or any(value is not None for value in kwargs.values()):
        return "called with more than the input"
    if layer.disable_adapters:
        return _EXPECTED[0]
    if layer.merged:
        return _EXPECTED[1]
    active = _active(layer)
    if not active:
        return _EXPECTED[2]
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the weight is transposed"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks for all modules are registered"
    base = layer._modules["base_layer"]
    reason = _base_reason(base) or next(filter(None, (_adapter_reason(layer, name) for name in active)), "")
    if not reason and len(active) > 1:
        reason = _together_reason(layer, active)
    by_rows = type(base) is nn.Linear and active[0] in layer.lora_variant
    return reason or _dtype_reason(x, base, layer._modules["lora_A"]._modules[active[0]]._parameters["weight"], by_rows)


def count(calls: Calls, reason: str) -> None:
    """Count one call; log a reason for stepping back the first time it is met."""
    if not reason:
        calls.fused += 1
        return
    calls.stepped_back += 1
    calls.last_reason = reason
    if reason not in _EXPECTED and reason not in _warned:
        _warned.add(reason)
        logger.warning("a LoRA layer steps back to peft's slower forward: %s (said once per reason)", reason)


def _active(layer: Any) -> list[str]:
    known = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in known]


def _one(layer: Any, name: str) -> tuple[Tensor, Tensor, float, float, bool]:
    """A, B, scaling, dropout's p and whether it drops, of one adapter."""
    children = layer._modules
    lora_a, lora_b = (children[part]._modules[name]._parameters["weight"] for part in ("lora_A", "lora_B"))
    dropout = children["lora_dropout"]._modules[name]
    return lora_a, lora_b, layer.scaling[name], getattr(dropout, "p", 0.0), dropout.training


def _joined(layer: Any, names: list[str]) -> tuple[Tensor, Tensor, float, float, bool]:
    """The same of several adapters as if they were one."""
    parts = [_one(layer, name) for name in names]
    lora_a = torch.cat([part[0] for part in parts])
    lora_b = torch.cat([part[1] * part[2] for part in parts], dim=1)
    return lora_a, lora_b, 1.0, 0.0, False


def _together_reason(layer: Any, names: list[str]) -> str:
    """Why several adapters cannot run as one; empty where they can."""
    if any(name in layer.lora_variant for name in names):
        return f"{len(names)} adapters are active, one of them DoRA"
    parts = [_one(layer, name) for name in names]
    if any(p > 0 and training for *_, p, training in parts):
        return f"{len(names)} adapters are active, with dropout masks of their own"
    if len({lora_a.dtype for lora_a, *_ in parts}) > 1:
        return f"{len(names)} adapters are active, of different dtypes"
    return ""


def _base_reason(base: Any) -> str:
    if not _is_plain(base):
        return "the base layer has hooks or a forward of its own"
    if type(base) is nn.Linear:
        weight: Any = base._parameters["weight"]
        if type(weight) not in _PLAIN:
            return f"the base weight is a {type(weight).__name__}"
        return "" if weight.dtype in FLOAT_DTYPES else f"the base weight is {weight.dtype}"
    if parametrize.is_parametrized(base):
        return "the base layer is parametrized"
    if not is_linear4bit(base):
        return f"the base layer is a {type(base).__name__}"
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "bitsandbytes has not quantized the base weight yet"
    if state.quant_type != "nf4":
        return f"the base weight is {state.quant_type}"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the base weight for CPU inference"
    return ""


def _adapter_reason(layer: Any, name: str) -> str:
    if name in layer.lora_variant and (reason := _variant_reason(layer, name)):
        return reason
    children = layer._modules
    lora_a, lora_b, dropout = (children[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "A or B is parametrized or no plain nn.Linear"
    if not (_is_plain(lora_a) and _is_plain(lora_b)):
        return "A or B has hooks or a forward of its own"
    if lora_a._parameters["bias"] is not None or lora_b._parameters["bias"] is not None:
        return "lora_bias"
    a: Any = lora_a._parameters["weight"]
    b: Any = lora_b._parameters["weight"]
    if type(a) not in _PLAIN or type(b) not in _PLAIN:
        return f"A is a {type(a).__name__}, B a {type(b).__name__}"
    if type(dropout) not in (nn.Dropout, nn.Identity) or not _is_plain(dropout):
        return "the dropout layer is not nn.Dropout or has hooks"
    if not isinstance(layer.scaling[name], (int, float)):
        return "scaling is not a number"
    if a.dtype != b.dtype:
        return "A and B differ in dtype"
    return "" if layer.cast_input_dtype_enabled else "casting of the input is disabled"


def _variant_reason(layer: Any, name: str) -> str:
    """DoRA is computed; every other variant is peft's."""
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"the adapter is a variant, {type(layer.lora_variant[name]).__name__}"
    magnitude, dropout = layer.lora_magnitude_vector._modules[name], layer.lora_dropout._modules[name]
    if type(magnitude.weight) not in _PLAIN or not _is_plain(magnitude):
        return "DoRA's magnitude has hooks, a forward of its own, or is no plain tensor"
    if layer.ephemeral_gpu_offload:
        return "DoRA with ephemeral_gpu_offload"
    return "DoRA drops the base's input too" if dropout.training and getattr(dropout, "p", 0.0) > 0 else ""


def _dtype_reason(x: Tensor, base: Any, lora_a: Tensor, by_rows: bool) -> str:
    """Whether the dtypes are those of the fused path: x as the weight, or autocast; adapters fp32 or as x."""
    given, four_bit, device = x.dtype, type(base) is not nn.Linear, x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # over 4 bits peft adds the update, in autocast's dtype, to a result in the input's: the sum may be in neither
        good = dtype in FLOAT_DTYPES and (not four_bit or given in (torch.float32, dtype))
    else:
        dtype = compute_dtype(base, x) if four_bit else base._parameters["weight"].dtype
        good = four_bit or given == dtype
    if good and given in FLOAT_DTYPES and lora_a.dtype in (torch.float32, dtype):
        # peft scales the gradient of a dense layer's rows in fp32, the fused path in the product's dtype
        return f"DoRA with {lora_a.dtype} adapters over a {dtype} weight" if by_rows and lora_a.dtype != dtype else ""
    return f"dtypes: input {given}, adapters {lora_a.dtype}, computed in {dtype}"


def _is_plain(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def _report(model: nn.Module, found: dict[str, Any], reasons: dict[str, str]) -> Report:
    rows: list[Row] = []
    inside = tuple(f"{name}." for name in found)
    backends = []
    for name, module in model.named_modules():
        if name in found and isinstance(module.get_base_layer(), nn.Linear):
            base = module.get_base_layer()
            shape, rank = (base.out_features, base.in_features), next(iter(module.r.values()), 0)
            kind, reason = f"{type(module).__bases__[-1].__name__}({type(base).__name__})", reasons[name]
            if reason:
                rows.append(Row(name, type(module).__name__, shape, False, reason, r=rank))
                continue
            backends.append(functional.backend(base.weight.device))
            said = f"peft's layer sped up in place, r={rank}"
            rows.append(
                Row(name, kind, shape, True, said, backends[-1].name, rank, is_linear4bit(base), module.fastlora_calls)
            )
        elif name in found and experts.is_wrapper(module):
            backends.append(functional.backend(next(module.parameters()).device))
            rows.append(experts.row(name, module, reasons[name], backends[-1].name))
        elif isinstance(module, nn.Linear) and not name.startswith(inside):
            shape = (module.out_features, module.in_features)
            rows.append(Row(name, type(module).__name__, shape, False, "peft has put no adapter on it"))
    return Report(rows, backends[0].name, backends[0].reason)
