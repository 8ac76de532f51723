"""The stacks of experts that a model has, those to be adapted, and their layers."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastlora.kernels.operands import FLOAT_DTYPES
from fastlora.layers.bases import is_plain
from fastlora.layers.experts import IMPLEMENTATIONS, INTERFACE, computes_in_fp32, projections
from fastlora.layers.lora_experts import LoRAExperts, stacked
from fastlora.model import trained_modules
from fastlora.model.names import means, nearest, within
from fastlora.model.settings import LayerOptions, LoRASettings

_STARTS = (True, False, "gaussian")


class Stack(NamedTuple):
    """A parameter to be adapted, the name of its module, r and lora_alpha."""

    owner: str
    parameter: str
    r: int
    lora_alpha: float


def find(model: nn.Module, settings: LoRASettings) -> list[Stack]:
    """The parameters that `target_parameters` means, by peft's rule: whole names, or ends of names after a dot.

    Raises:
        ValueError: an entry that matches nothing, `exclude_modules` and `layers_to_transform` that leave nothing, a
            parameter that cannot be adapted, or an option that stacks of experts do not support.
    """
    wanted = settings.target_parameters or ()
    if not wanted:
        return []
    known = {
        f"{name}.{key}".lstrip("."): (name, key, module) for name, module in model.named_modules()
        for key, parameter in module._parameters.items() if parameter is not None
    }  # fmt: skip
    for entry in wanted:
        if not any(means(entry, name) for name in known):
            names = [name for name, (_, key, module) in known.items() if not stack_obstacle(module, key)]
            raise ValueError(f"target_parameters: {entry!r} matches no parameter{nearest(entry, names)}")
    found = []
    for name, (owner, key, module) in known.items():
        if not settings.means_parameter(name):
            continue
        if obstacle := stack_obstacle(module, key):
            raise ValueError(f"target_parameters: {name} cannot be adapted: {obstacle}")
        if any(within(owner, trained) for trained in trained_modules.find(model, settings.modules_to_save)):
            raise ValueError(f"{name} is in target_parameters and in modules_to_save: leave it out of one of them")
        found.append(Stack(owner, key, *settings.rank_and_alpha(name)))
    if not found:
        raise ValueError(
            f"target_parameters={list(wanted)!r} with exclude_modules={settings.exclude_modules!r} and "
            f"layers_to_transform={settings.layers_to_transform!r} leaves no stack of experts to adapt"
        )
    if settings.lora_dropout:
        raise ValueError("lora_dropout does not go with target_parameters: leave it at 0, as with peft")
    if settings.init_lora_weights not in _STARTS:
        raise ValueError(
            f"init_lora_weights={settings.init_lora_weights!r} does not go with target_parameters: use one of "
            f"{', '.join(map(repr, _STARTS))}"
        )
    return found


def stack_obstacle(module: Any, name: str) -> str:
    """Why a parameter of a module cannot get fastlora's adapters; empty where it can."""
    if any(not hasattr(module, part) for part in INTERFACE):
        return f"{type(module).__name__} does not have transformers' interface of experts"
    if name not in projections(module):
        return f"{name} is not one of the projections {projections(module)}"
    if parametrize.is_parametrized(module):
        return "the experts are parametrized"
    if not is_plain(module):
        return "the experts have hooks or a forward of their own"
    weight = module._parameters[name]
    if type(weight) is not nn.Parameter or weight.ndim != 3 or weight.dtype not in FLOAT_DTYPES:
        return f"it is a {type(weight).__name__} {list(weight.shape)} in {weight.dtype}, not a stack of matrices"
    if getattr(module.config, "_experts_implementation", None) not in IMPLEMENTATIONS:
        return f"experts_implementation={module.config._experts_implementation} is asked for"
    if weight.dtype is not torch.float32 and computes_in_fp32(module):
        return f"its forward computes in fp32 on purpose, and the stack is in {weight.dtype}: load the model in fp32"
    return "the experts are spread over several devices" if getattr(module, "_is_expert_parallel", False) else ""


def check_options(model: nn.Module, stacks: Collection[Stack], options: LayerOptions) -> None:
    """Raise ValueError if a stack cannot be quantized, or its A and B cannot have the dtype asked for."""
    dtype, blocksize = options.adapter_dtype, options.blocksize
    for stack in stacks:
        module: Any = model.get_submodule(stack.owner)
        weight = stacked(module, stack.parameter)
        name = f"{stack.owner}.{stack.parameter}"
        if dtype not in (None, torch.float32, weight.dtype):
            allowed = " or ".join(map(str, dict.fromkeys((torch.float32, weight.dtype))))
            raise ValueError(f"adapter_dtype must be {allowed} for {name}; got {dtype}")
        if options.quantize and computes_in_fp32(module):
            raise ValueError(f"{name} cannot be packed, as its forward computes in fp32 on purpose: leave quantize off")
        for key in projections(module) if options.quantize else ():
            weight, name = stacked(module, key), f"{stack.owner}.{key}"
            if weight.device.type == "meta" or not weight.numel():
                raise ValueError(f"{name} is not loaded: load the weights before quantizing")
            if not torch.isfinite(weight).all():
                raise ValueError(f"{name} holds NaN or inf: repair the checkpoint, or leave quantize off")
            if weight[0].numel() % blocksize:
                raise ValueError(f"{name} cannot be packed: blocks of {blocksize} would cross from expert to expert")


def make(
    model: nn.Module, stacks: Collection[Stack], settings: LoRASettings, options: LayerOptions
) -> dict[str, LoRAExperts]:
    """The modules of experts with their adapters, by name; the model does not use them yet."""
    owners: dict[str, dict[str, tuple[int, float]]] = {}
    for stack in stacks:
        owners.setdefault(stack.owner, {})[stack.parameter] = stack.r, stack.lora_alpha
    given = settings.use_rslora, options.adapter_name, options.adapter_dtype, settings.init_lora_weights
    return {name: LoRAExperts(model.get_submodule(name), wanted, *given) for name, wanted in owners.items()}
