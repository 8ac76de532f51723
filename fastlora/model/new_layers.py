"""New adapters over a model's layers, with the start of A and B; the model does not use them yet."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers import starts
from fastlora.layers.bases import base_weight
from fastlora.layers.dense import dense_weight
from fastlora.layers.lora_linear import LoRALinear
from fastlora.model import eva
from fastlora.model.settings import LayerOptions, LoRASettings
from fastlora.model.sites import Site


def check_start(init: bool | str, adapted: dict[str, Site]) -> None:
    """Raise ValueError if a layer cannot start as `init_lora_weights` says."""
    for name, site in adapted.items():
        starts.check_layer(init, name, base_weight(site.module), site.r, site.shared_with, site.quantize)


def make(
    adapted: dict[str, Site], settings: LoRASettings, options: LayerOptions
) -> tuple[dict[str, LoRALinear], dict[str, starts.Pair]]:
    """The adapters by name, and what to take out of which weight before it is quantized.

    A start that changes the base changes it once the starts of all layers are found.

    Raises:
        ValueError: a start cannot be computed. No weight is changed.
    """
    dropout, rslora, init = settings.lora_dropout, settings.use_rslora, settings.init_lora_weights
    adapter_name, dtype = options.adapter_name, options.adapter_dtype
    first = True if init in ("loftq", "eva") else init
    first = False if starts.changes_base(first) else first  # draws no more random numbers than peft does
    layers, taken_out, changed = {}, {}, []
    for name, site in adapted.items():
        layer = LoRALinear(site.module, site.r, site.lora_alpha, dropout, rslora, adapter_name, dtype, first)
        layers[name] = layer
        if not starts.reads_weight(init):
            continue
        lora_a, lora_b, scaling = layer.adapter()
        weight, before = dense_weight(site.module).detach(), None
        try:
            if init == "loftq":
                blocks = options.blocksize, options.double_quant
                pair, before = starts.loftq(weight, site.r, scaling, *blocks, settings.loftq_iter)
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
    """For "eva": A by name. Sites get the ranks that the data decide; those with rank 0 are no longer adapted.

    Raises:
        ValueError: no data, data for another start, or data that `eva.components` refuses. No site is changed.
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
            site.adapt, site.r, site.no_adapter = False, 0, "EVA gave it no rank"
            del adapted[name], started[name]
            continue
        if config.adjust_scaling_factors:
            site.lora_alpha *= rank / site.r
        site.r = rank
    return started
