"""peft's own LoRA layers, sped up in place by changing their class.

An object's class can be changed while it lives. `speed_up` gives each LoRA layer of peft's a subclass of its class with
a `forward` that takes the fused path where that computes the same, and steps back to peft's forward wherever a
condition does not hold (`fastlora.peft_conditions`). Parameters, names, checkpoints and all of peft's methods stay as
they are; `merge` keeps the weight, so that `unmerge` gives back every bit.

The conditions are read at each call, for a user may disable, merge, add or switch adapters at any time. Each layer
counts both kinds of call and keeps the reason of the last step back (`layer.fastlora_calls`, `fastlora.report(model)`);
a reason met for the first time is logged as a warning, unless the user asked for what it says.

Several active adapters run as one of the summed rank: A's rows one below the other, B's columns side by side, each
times its scaling; where they have masks of dropout or dtypes of their own, h is formed for each. DoRA rescales the
fused product's rows (`ops.dora`). Layers that peft adds to such a model later are sped up as they come. `restore`
takes it all back.

A caution about bitsandbytes: in eval mode, without gradients, on a CPU with AVX512_BF16, `Linear4bit.forward` repacks
its weight in place and loses precision. The fused path never calls it, but stepping back does, as with
`disable_adapter()`; afterwards the layer is peft's alone, and the reason says so.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, compiler, nn

from fastlora import experts, peft_conditions
from fastlora.conv1d import dense_weight, is_conv1d, is_dense
from fastlora.kept_weight import KeptWeight, changed
from fastlora.layer_report import Calls, Report, Row
from fastlora.linear import AdoptedWeight, compute_dtype, is_linear4bit, kernels_of, lora_linear_4bit
from fastlora.ops import dora
from fastlora.ops.backend import backend
from fastlora.ops.dora import KeptNorms
from fastlora.ops.linear import lora_linear
from fastlora.ops.mixed import Adapter, joined, mixed_linear, several_linear, total_bias
from fastlora.ops.nf4 import NF4Weight
from fastlora.peft_conditions import EXPECTED, active_names, sampled_names, step_back_reason

logger = logging.getLogger(__name__)

_warned: set[str] = set()


class _Marked:
    """What every layer of peft's with a fused forward has."""

    fastlora_calls: Calls
    fastlora_adopted: AdoptedWeight
    fastlora_norms: KeptNorms
    fastlora_kept: KeptWeight

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _watch_injections()  # an unpickled model may be the first in its process


class _Fused(_Marked):
    """The forward that a fused class puts before peft's."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, fused where the conditions hold, else by peft's forward."""
        reason = step_back_reason(self, x, args, kwargs)
        if not compiler.is_compiling():
            count(self.fastlora_calls, reason)
        if reason:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base, per_sample = self._modules["base_layer"], kwargs.get("adapter_names")
        active = active_names(self) if per_sample is None else sampled_names(self, per_sample)
        if per_sample is not None and (len(active) != 1 or any(name != active[0] for name in per_sample)):
            return self._mixed(x, base, active, per_sample)
        adapters = [_one(self, name) for name in active]
        if len(active) > 1 and not _are_as_one(adapters):
            return self._several(x, base, adapters)
        adapter = adapters[0] if len(active) == 1 else joined(adapters)
        if active[0] in self.lora_variant:
            return self._dora(x, base, adapter, active[0])
        lora_a, lora_b, scaling, _, p, training = adapter
        if is_dense(base):
            bias = total_bias(base._parameters["bias"], adapter)
            return lora_linear(x, dense_weight(base), lora_a, lora_b, scaling, bias, p, training)
        weight, bias = self.fastlora_adopted.of(base), total_bias(base.bias, adapter)
        return lora_linear_4bit(x, base, weight, lora_a, lora_b, scaling, p, training, bias)

    def _mixed(self: Any, x: Tensor, base: Any, names: Sequence[str], per_sample: Sequence[str]) -> Tensor:
        adapters = {name: _one(self, name) for name in names}
        if is_dense(base):
            return mixed_linear(x, dense_weight(base), base._parameters["bias"], adapters, per_sample)
        weight, dtype = self.fastlora_adopted.of(base), compute_dtype(base, x)
        return mixed_linear(x.to(dtype), weight, _bias_in(base, dtype), adapters, per_sample).to(x.dtype)

    def _several(self: Any, x: Tensor, base: Any, adapters: Sequence[Adapter]) -> Tensor:
        if is_dense(base):
            return several_linear(x, dense_weight(base), base._parameters["bias"], adapters)
        weight, dtype = self.fastlora_adopted.of(base), compute_dtype(base, x)
        return several_linear(x.to(dtype), weight, _bias_in(base, dtype), adapters).to(x.dtype)

    def _dora(self: Any, x: Tensor, base: Any, adapter: Adapter, name: str) -> Tensor:
        lora_a, lora_b, scaling, _, p, training = adapter
        given, bias = x.dtype, base._parameters["bias"]
        if is_dense(base):
            weight: Tensor | NF4Weight = dense_weight(base)
        else:
            weight, dtype = self.fastlora_adopted.of(base), compute_dtype(base, x)
            x, bias = x.to(dtype), _bias_in(base, dtype)
        magnitude = self.lora_magnitude_vector._modules[name].weight
        norms = self.fastlora_norms.of(weight, lora_a, lora_b, scaling)
        operands = x, weight, lora_a, lora_b, scaling, magnitude, norms, bias
        drops = training and p > 0
        y = dora.dora_linear_with_dropout(*operands, p) if drops else dora.dora_linear(*operands)
        return y if is_dense(base) else y.to(given)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        self.fastlora_adopted.forget()
        self.fastlora_norms.forget()
        kept, dtype = self.fastlora_kept.fits(self), self.get_base_layer().weight.dtype
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        if kept and self.get_base_layer().weight.dtype == dtype:
            self.fastlora_kept.settle(self)
        return result

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """peft's merge; the weight as it was is kept for `unmerge`."""
        self.fastlora_kept.keep(self)
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            self.fastlora_kept.settle(self)

    def unmerge(self: Any) -> None:
        """The weight as it was before the merge, to the bit; by peft's subtraction where it has been changed since."""
        if not (self.merged and self.fastlora_kept.put_back(self)):
            super().unmerge()  # type: ignore[misc]
            changed(self)


class FusedLinear(_Fused, peft_layer.Linear):
    """peft's `lora.Linear` with a fused forward."""


_FUSED: dict[type, type] = {peft_layer.Linear: FusedLinear}

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb as peft_bnb

    class FusedLinear4bit(_Fused, peft_bnb.Linear4bit):
        """peft's `lora.Linear4bit` with a fused forward."""

    _FUSED[peft_bnb.Linear4bit] = FusedLinear4bit


if experts.ParamWrapper is not None:

    class FusedParamWrapper(_Marked, experts.ParamWrapper):  # type: ignore[misc]
        """peft's `lora.ParamWrapper` over a stack of experts, which does not form W + B A."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The experts' output, fused where the conditions hold, else by peft's forward."""
            wrappers = experts.chain(self)
            reason = experts.step_back_reason(wrappers, x, args, kwargs)
            if not compiler.is_compiling():
                for wrapper in wrappers[: 1 if reason else None]:
                    count(wrapper.fastlora_calls, reason)
            if reason:
                if reason not in EXPECTED and any(map(experts.is_packed, wrappers)):
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

        def unmerge(self) -> None:
            """As peft's; not from a stack packed since, from which peft would subtract without effect."""
            if self.merged and experts.is_packed(self):
                raise ValueError(f"{self.parameter_name} was packed while adapters were merged: load the model again")
            super().unmerge()

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            result = super()._apply(fn, recurse)
            experts.follow(self)
            return result

    FusedParamWrapper.__name__ = "ParamWrapper"  # by which peft knows it when further adapters come
    _FUSED[experts.ParamWrapper] = FusedParamWrapper


def speed_up(model: nn.Module) -> Report:
    """Give every LoRA layer of peft's in the model that can use it a fused forward; harmless when repeated.

    Layers that peft adds to the model later get it too, from `peft.tuners.lora.LoraModel.inject_adapter`.

    A model in which nothing can be sped up runs on as it is: a warning and the report say why.

    Returns:
        a report on every linear layer, with live counts for those sped up.
    Raises:
        ValueError: the model has no LoRA layers of peft's. Nothing is changed.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}
    if not found:
        raise ValueError("nothing in this peft model can be sped up: it has no LoRA layers")
    reasons = {name: standing_reason(layer) for name, layer in found.items()}
    if all(reasons.values()):
        told = "; ".join(sorted(set(reasons.values())))
        logger.warning("nothing in this peft model can be sped up, it runs on as it is: %s", told)
    for layer in found.values():
        if not standing_reason(layer, True):
            fuse(layer)
    _watch_injections()
    return _report(model, found, reasons)


def restore(model: nn.Module) -> nn.Module:
    """Give peft's layers their own class back: the model is plain peft again.

    Returns:
        the same model.
    Raises:
        ValueError: no layer of the model is one of peft's sped up in place. Nothing is changed.
    """
    fused: list[Any] = [module for module in model.modules() if isinstance(module, _Marked)]
    if any(type(layer) not in _FUSED.values() for layer in fused):
        raise ValueError("a fused layer has become a unit of FSDP of its own: call restore before the model is sharded")
    if any(experts.is_wrapper(layer) and experts.is_packed(layer) for layer in fused):
        raise ValueError("stacks of experts are packed, and peft computes no adapters over those: load the model again")
    if not fused:
        raise ValueError(
            "no layer of this model is one of peft's with a fused forward: restore(model) undoes replace_linear(model)"
        )
    for layer in fused:
        layer.__class__ = next(plain for plain, kind in _FUSED.items() if kind is type(layer))
        del layer.fastlora_calls, layer.fastlora_adopted, layer.fastlora_norms, layer.fastlora_kept
    if hasattr(model, "fastlora_report"):
        del model.fastlora_report
    return model


def report(model: nn.Module) -> Report:
    """A report on every linear layer of a model with peft's layers, as it stands now."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}
    return _report(model, found, {name: _report_reason(layer) for name, layer in found.items()})


def _report_reason(layer: Any) -> str:
    if not isinstance(layer, _Marked):
        return standing_reason(layer) or "peft's own: call replace_linear(model)"
    if _is_sharded(layer):  # gathered, as a rule, by the time that it is called
        return layer.fastlora_calls.last_reason if layer.fastlora_calls.stepped_back else ""
    return standing_reason(layer)


def _is_sharded(layer: Any) -> bool:
    return any(type(parameter).__name__ == "DTensor" for parameter in layer.parameters())


def fuse(layer: Any) -> None:
    """Give one layer of peft's the fused forward of its class, where there is one."""
    if type(layer) in _FUSED:
        layer.__class__ = _FUSED[type(layer)]
        layer.fastlora_calls, layer.fastlora_adopted = Calls(), AdoptedWeight()
        layer.fastlora_norms, layer.fastlora_kept = KeptNorms(), KeptWeight()


def _watch_injections() -> None:
    """From now on, adapters that peft injects into a model with fused layers are fused where they can be."""
    inject = LoraModel.inject_adapter
    if hasattr(inject, "fastlora_watches"):
        return

    @functools.wraps(inject)
    def watched(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, _Marked) for module in model.modules()):
            for module in list(model.modules()):
                if isinstance(module, peft_layer.LoraLayer) and not standing_reason(module, True):
                    fuse(module)
        return result

    watched.fastlora_watches = True  # type: ignore[attr-defined]
    LoraModel.inject_adapter = watched  # type: ignore[method-assign]


def standing_reason(layer: Any, whichever_is_active: bool = False) -> str:
    """Why a LoRA layer of peft's is not sped up as it now stands; empty where it can be.

    whichever_is_active: only what no other choice of active adapters would change.
    """
    if type(layer) not in _FUSED and not isinstance(layer, _Marked):
        return f"peft's {type(layer).__name__} has no fused form"
    if experts.is_wrapper(layer):
        return experts.standing_reason(layer)
    return peft_conditions.standing_reason(layer, whichever_is_active)


def _bias_in(base: Any, dtype: torch.dtype) -> Tensor | None:
    """The bias of a `Linear4bit`, in the dtype that it computes in or in fp32."""
    bias: Tensor | None = base.bias
    return bias if bias is None or bias.dtype == torch.float32 else bias.to(dtype)


def _one(layer: Any, name: str) -> Adapter:
    return peft_conditions.adapter(layer, name)


def _are_as_one(adapters: Sequence[Adapter]) -> bool:
    """Whether active adapters make one of the summed rank: none drops anything, and all have one dtype."""
    same = len({adapter.lora_a.dtype for adapter in adapters}) == 1
    return same and not any(adapter.dropout_p > 0 and adapter.training for adapter in adapters)


def count(calls: Calls, reason: str) -> None:
    """Count one call; log a reason for stepping back the first time it is met."""
    if not reason:
        calls.fused += 1
        return
    calls.stepped_back += 1
    calls.last_reason = reason
    if reason not in EXPECTED and reason not in _warned:
        _warned.add(reason)
        logger.warning("a LoRA layer steps back to peft's slower forward: %s (said once per reason)", reason)


def _report(model: nn.Module, found: dict[str, Any], reasons: dict[str, str]) -> Report:
    rows: list[Row] = []
    inside = tuple(f"{name}." for name in found)
    backends = []
    for name, module in model.named_modules():
        if name in found and (isinstance(module.get_base_layer(), nn.Linear) or is_conv1d(module.get_base_layer())):
            base = module.get_base_layer()
            shape, rank = (module.out_features, module.in_features), next(iter(module.r.values()), 0)
            plain = next((cls for cls in type(module).__mro__ if cls in _FUSED), type(module))
            kind, reason = f"{plain.__name__}({type(base).__name__})", reasons[name]
            if reason:
                rows.append(Row(name, type(module).__name__, shape, False, reason, r=rank))
                continue
            backends.append(backend(base.weight.device))
            said = f"peft's layer sped up in place, r={rank}"
            packed, path, kernels = is_linear4bit(base), backends[-1].name, kernels_of(base, shape, rank)
            rows.append(Row(name, kind, shape, True, said, path, rank, packed, module.fastlora_calls, kernels))
        elif name in found and experts.is_wrapper(module):
            backends.append(backend(next(module.parameters()).device))
            rows.append(experts.row(name, module, reasons[name], backends[-1].name))
        elif (isinstance(module, nn.Linear) or is_conv1d(module)) and not name.startswith(inside):
            k, n = module.weight.shape if is_conv1d(module) else (module.in_features, module.out_features)
            shape = (n, k)
            rows.append(Row(name, type(module).__name__, shape, False, "peft has put no adapter on it"))
    if not backends:
        return Report(rows, "peft", "no layer can be sped up as it now stands")
    return Report(rows, backends[0].name, backends[0].reason)
