"""peft's own LoRA layers in a model, sped up in place and restored.

`speed_up` changes the class of each LoRA layer that has a faster one (`peft_layers.linear`, `peft_layers.experts`).
Parameters, names, checkpoints and all of peft's methods stay as they are; `merge` keeps the weight, so that `unmerge`
gives back every bit. Layers that peft adds to such a model later are sped up too. `restore` undoes it all.

A caution about bitsandbytes: in eval mode, without gradients, on a CPU with AVX512_BF16, `Linear4bit.forward` repacks
its weight in place and loses precision. Our forward never calls it, but peft's does when a layer steps back, for
instance under `disable_adapter()`. From then on only peft can compute the layer, and the reason says so.
"""

from typing import Any

from peft.tuners.lora import layer as peft_layer
from torch import nn

from fastlora.layers.bases import computed_over, is_linear4bit
from fastlora.layers.dense import is_conv1d
from fastlora.layers.report import LayerRow, Report
from fastlora.ops.backend import backend
from fastlora.peft_layers import experts
from fastlora.peft_layers.linear import (
    SPED_UP,
    SpedUp,
    logger,
    plain_class,
    speed_up_layer,
    standing_reason,
    watch_injections,
)


def speed_up(model: nn.Module) -> Report:
    """Give our forward to every LoRA layer of peft's in the model that can be sped up; harmless when repeated.

    Layers that peft adds to the model later get it too, from `peft.tuners.lora.LoraModel.inject_adapter`.

    A model in which nothing can be sped up keeps running as it is: a warning and the report say why.

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
        said = "; ".join(sorted(set(reasons.values())))
        logger.warning("nothing in this peft model can be sped up, so it runs as it is: %s", said)
    for layer in found.values():
        if not standing_reason(layer, True):
            speed_up_layer(layer)
    watch_injections()
    return _report(model, found, reasons)


def sped_up(model: nn.Module) -> list[Any]:
    """The layers of peft's that were sped up in place."""
    return [module for module in model.modules() if isinstance(module, SpedUp)]


def restore(model: nn.Module) -> nn.Module:
    """Give peft's layers their own class back, so that the model is plain peft again.

    Returns:
        the same model.
    Raises:
        ValueError: no layer of the model is one of peft's that was sped up in place. Nothing is changed.
    """
    found = sped_up(model)
    if any(type(layer) is not SPED_UP[plain_class(layer)][0] for layer in found):
        raise ValueError("a LoRA layer has become an FSDP unit of its own: call restore before the model is sharded")
    if any(experts.is_wrapper(layer) and experts.is_packed(layer) for layer in found):
        raise ValueError("stacks of experts are packed, and peft computes no adapters over those: load the model again")
    if not found:
        raise ValueError(
            "no layer of this model is one of peft's that was sped up in place: restore(model) undoes "
            "replace_linear(model)"
        )
    for layer in found:
        layer.__class__ = plain_class(layer)
        del layer.fastlora_calls, layer.fastlora_adopted, layer.fastlora_norms, layer.fastlora_kept
    if hasattr(model, "fastlora_report"):
        del model.fastlora_report
    return model


def peft_report(model: nn.Module) -> Report:
    """A report on every linear layer of a model with peft's layers, in its present state."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.LoraLayer)}
    return _report(model, found, {name: _report_reason(layer) for name, layer in found.items()})


def _report_reason(layer: Any) -> str:
    if not isinstance(layer, SpedUp):
        return standing_reason(layer) or "peft's own: call replace_linear(model)"
    if _is_sharded(layer):  # by the time it is called it is usually gathered
        return layer.fastlora_calls.last_reason if layer.fastlora_calls.stepped_back else ""
    return standing_reason(layer)


def _is_sharded(layer: Any) -> bool:
    return any(type(parameter).__name__ == "DTensor" for parameter in layer.parameters())


def _report(model: nn.Module, found: dict[str, Any], reasons: dict[str, str]) -> Report:
    rows: list[LayerRow] = []
    inside = tuple(f"{name}." for name in found)
    backends = []
    for name, module in model.named_modules():
        if name in found and (isinstance(module.get_base_layer(), nn.Linear) or is_conv1d(module.get_base_layer())):
            base = module.get_base_layer()
            shape, rank = (module.out_features, module.in_features), next(iter(module.r.values()), 0)
            kind, reason = f"{plain_class(module).__name__}({type(base).__name__})", reasons[name]
            if reason:
                rows.append(LayerRow(name, type(module).__name__, shape, False, reason, r=rank))
                continue
            backends.append(backend(base.weight.device))
            said = f"peft's layer sped up in place, r={rank}"
            path, kernels = computed_over(base, shape, rank)
            packed, calls = is_linear4bit(base), module.fastlora_calls
            rows.append(LayerRow(name, kind, shape, True, said, path, rank, packed, calls, kernels))
        elif name in found and experts.is_wrapper(module):
            backends.append(backend(next(module.parameters()).device))
            rows.append(experts.row(name, module, reasons[name]))
        elif (isinstance(module, nn.Linear) or is_conv1d(module)) and not name.startswith(inside):
            k, n = module.weight.shape if is_conv1d(module) else (module.in_features, module.out_features)
            shape = (n, k)
            rows.append(LayerRow(name, type(module).__name__, shape, False, "peft has put no adapter on it"))
    if not backends:
        return Report(rows, "peft", "no layer can be sped up in its present state")
    return Report(rows, backends[0].name, backends[0].reason)
