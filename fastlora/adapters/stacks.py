"""Adapters on stacks of experts, between a model and peft's files.

peft wraps the module of experts once for each adapted parameter. In its files the module's last adapted parameter is
therefore outermost, and each parameter before it is one `.base_layer` further in.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.files.peft_files import PREFIX
from fastlora.layers import sharded
from fastlora.layers.lora_experts import LoRAExperts, adapted_experts, stacked
from fastlora.model.settings import LoRASettings
from fastlora.model.stacks import find


def take(
    model: nn.Module, settings: LoRASettings, pairs: dict[str, dict[str, Tensor]], adapted: bool
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Remove from a file's pairs those that belong to stacks, and return them: {(module, parameter): pair}.

    Args:
        adapted: whether the model has fastlora's adapters already.
    Raises:
        ValueError: a pair is missing, its shape is not the model's, or the model has no adapters there.
    """
    own = adapted_experts(model)
    ranks = {name: dict(layer.r) for name, layer in own.items()}
    if not adapted:
        for stack in find(model, settings):
            ranks.setdefault(stack.owner, {})[stack.parameter] = stack.r
    elif settings.target_parameters and not own:
        raise ValueError(f"the file has adapters on {', '.join(settings.target_parameters)}, the model has none there")
    found = {}
    for name, wanted in ranks.items():
        base: Any = own[name] if name in own else model.get_submodule(name)
        for parameter, wrapper in _wrapper_names(name, wanted).items():
            if wrapper not in pairs:
                raise ValueError(f"{PREFIX}{wrapper}.lora_A.weight is missing from the file")
            if name in own:
                shapes = [list(part.shape) for part in base.adapter(parameter)[:2]]
            else:
                (count, n, k), r = stacked(base, parameter).shape, wanted[parameter]
                shapes = [[count * r, k], [n, r * count]]
            for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
                given = list(pairs[wrapper][part].shape)
                if given != shape:
                    raise ValueError(
                        f"{PREFIX}{wrapper}.{part}.weight has shape {given} in the file, {shape} in the model"
                    )
            found[name, parameter] = pairs.pop(wrapper)
    return found


def _wrapper_names(name: str, parameters: Collection[str]) -> dict[str, str]:
    """Parameter -> the name of peft's wrapper around it, under which its A and B are saved."""
    return {key: name + ".base_layer" * depth for depth, key in enumerate(reversed(list(parameters)))}


def saved(layer: LoRAExperts, name: str) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of A and B as peft names them, without its prefix; name: of the layer."""
    for parameter, wrapper in _wrapper_names(name, layer.r).items():
        for part, value in zip(("lora_A", "lora_B"), layer.adapter(parameter)[:2], strict=True):
            yield f"{wrapper}.{part}.weight", value


@torch.no_grad()
def load(layer: LoRAExperts, parameter: str, pair: Mapping[str, Tensor], lora_alpha: float, use_rslora: bool) -> None:
    """Fill A and B of one parameter from a pair that fits, and set their scaling."""
    layer.set_scaling(parameter, lora_alpha, use_rslora)
    for part, target in zip(("lora_A", "lora_B"), layer.adapter(parameter)[:2], strict=True):
        sharded.fill(target, pair[part])
