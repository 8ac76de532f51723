"""The adapters that are about to be hung into a model, made over its layers as they are, with A and B as they start."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers import starts
from fastlora.layers.bases import base_weight
from fastlora.layers.dense import dense_weight
from fastlora.layers.lora_linear import LoRALinear
from fastlora.model import eva
from fastlora.model.settings import LoRASettings
from fastlora.model.sites import Site


def check(init: bool | str, adapted: dict[str, Site]) -> None:
    """Raise ValueError where a layer cannot start by this name."""
    for name, site in adapted.items():
        starts.check_layer(init, name, base_weight(site.module), site.r, site.shared_with, site.quantize)


def make(
    adapted: dict[str, Site],
    settings: LoRASettings,
    adapter_name: str,
    adapter_dtype: torch.dtype | None,
    blocksize: int,
    double_quant: bool,
) -> tuple[dict[str, LoRALinear], dict[str, starts.Pair]]:
    """The adapters, over the layers as they are now, with A and B as they start; what to take out before quantizing.

    A start that changes the base does so once all of them have been found.

    Raises:
        ValueError: a start cannot be computed. No weight is changed.
    """
    dropout, rslora, init = settings.lora_dropout, settings.use_rslora, settings.init_lora_weights
    first = True if init in ("loftq", "eva") else init
    first = False if starts.changes_base(first) else first  # no further draw than A's and B's, as with peft
    layers, taken_out, changed = {}, {}, []
    for name, site in adapted.items():
        layer = LoRALinear(site.module, site.r, site.lora_alpha, dropout, rslora, adapter_name, adapter_dtype, first)
        layers[name] = layer
        if not starts.reads_weight(init):
            continue
        lora_a, lora_b, scaling = layer.adapter()
        weight, before = dense_weight(site.module).detach(), None
        try:
            if init == "loftq":
                pair, before = starts.loftq(weight, site.r, scaling, blocksize, double_quant, settings.loftq_iter)
            else:
                pair = starts.from_weight(str(init), weight, site.r, scaling)
                changed.append((weight, pair, scaling))
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"init_lora_weights={init!r} fails for {name}, exclude it: {error}") from error
        for parameter, value in zip((lora_a, lora_b), pair, strict=True):
            parameter.data.copy_(value)
        if init != "loftq" or before is not None:
            layer.taken_out[adapter_name] = pair[0].cpu(), (pair[1] * scaling).cpu()
        if before is not None:
            taken_out[name] = before[0], before[1] * scaling
    for weight, pair, scaling in changed:
        starts.take_out(weight, pair, scaling)
    return layers, taken_out


def from_data(model: nn.Module, adapted: dict[str, Site], settings: LoRASettings, dataloader: Any) -> dict[str, Tensor]:
    """For "eva": A by name, after giving the sites the ranks that the data deals them; those without lose their mark.

    Raises:
        ValueError: no data, data for another start, or such as `eva.components` refuses. No site is changed.
    """
    if settings.init_lora_weights != "eva":
        if dataloader is not None:
            raise ValueError(f"eva_dataloader is for init_lora_weights='eva', not {settings.init_lora_weights!r}")
        return {}
    config = eva.config_of(settings.eva_config)
    started = eva.components(model, adapted, dataloader, config)
    for name, a in list(started.items()):
        site, rank = adapted[name], a.shape[0]
        if not rank:
            site.adapt, site.r, site.without = False, 0, "EVA gave it no rank"
            del adapted[name], started[name]
            continue
        if config.adjust_scaling_factors:
            site.lora_alpha *= rank / site.r
        site.r = rank
    return started
