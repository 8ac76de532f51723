"""Adapters on disk, in peft's format.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The tensors' keys are
`base_model.model.<module>.lora_A.weight` [R, K] and `.lora_B.weight` [N, R], without the adapter's name. peft opens
what is saved here, and the other way round.

Loading reads safetensors only, never pickle, and checks every key and shape before it changes anything.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import by_peft, contents, stacks
from fastlora.adapters.config import (
    adapted_layers,
    adapter_config,
    base_name,
    resized_vocabulary,
    settings_of,
    trained_names,
)
from fastlora.adapters.contents import Contents, Pairs
from fastlora.files.peft_files import PREFIX, load_with_peft, peft_adapter, read_adapter, write_adapter
from fastlora.layers import sharded, starts
from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.sharded import unwrapped
from fastlora.model import replace, trained_modules, trained_tokens
from fastlora.model.settings import LayerOptions, LoRASettings, settings_from_config
from fastlora.model.sites import find_sites

# Starts that leave the base weight as it is: a trained adapter no longer needs them.
_HARMLESS_INITS = ("eva", "orthogonal")
# Options that say which layers get adapters. The file's tensors say that too, and peft does not apply all of these to
# stacks of experts.
_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying")


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a model's adapter in peft's format.

    Where the start changed the base ("pissa", "olora"), what training added to the start is saved, at twice the rank,
    so that the adapter fits the original base; if the base was quantized later, up to the error of quantization. Where
    the vocabulary was resized, its weights are saved too.

    Each of the two files is written under another name, read back and compared, and then moved into place: a crash
    leaves the old file. The adapter of a model that carries peft's own layers is formed by peft's code and written in
    the same way. Names are those of the model without torch.compile.

    Where FSDP2 has spread the model over processes (`fully_shard`), every process calls this. Process 0 writes the same
    files as a single process would, with the full tensors, and the others wait for it.

    Args:
        model: a model from `replace_linear`, or one that carries peft's adapters.
        directory: created if missing.
        adapter_name: which adapter.
    Raises:
        ValueError: the model has no such adapter.
        OSError: the files cannot be written; those of an earlier adapter are still there.
    """
    model = unwrapped(model)
    sharded.settle(model)
    config, tensors = adapter_of(model, adapter_name, sharded.whole)
    sharded.by_first(lambda: write_adapter(Path(directory), config, tensors), sharded.is_sharded(model))


def adapter_of(
    model: nn.Module, adapter_name: str, read: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter, as they are to be saved: on the CPU, in memory of their own.

    Args:
        read: gives the whole of a parameter or buffer.
    Raises:
        ValueError: the model has no such adapter, or a tensor is empty.
    """
    with sharded.clean_names(model):
        if replace.carries_peft(model):
            config, tensors = peft_adapter(model, adapter_name)
            config["base_model_name_or_path"] = config["base_model_name_or_path"] or base_name(model)
        else:
            config, tensors = _own_adapter(model, adapter_name, read)
        tensors = {key: read(value).detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    for key, value in tensors.items():
        if value.numel() == 0:
            raise ValueError(
                f"{key} is empty: its values are elsewhere, as with DeepSpeed's ZeRO-3; gather them first "
                "(deepspeed.zero.GatheredParameters), or pass save_pretrained a whole state_dict"
            )
    return config, tensors


def _own_adapter(
    model: nn.Module, adapter_name: str, read: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers, experts = adapted_layers(model), adapted_experts(model)
    names = {name for layer in layers.values() for name in layer.lora_A}
    names |= {layer.active_adapter for layer in experts.values()}
    if names != {adapter_name}:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(names) or 'none'}")
    config = adapter_config(model, layers, adapter_name)
    tensors = {key: value for name, layer in experts.items() for key, value in stacks.saved(layer, name)}
    for name, layer in layers.items():
        pair: Any = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if adapter_name in layer.taken_out:  # A and B that give the same model over the original base
            pair = starts.standalone(
                (read(pair[0]).detach(), read(pair[1]).detach()),
                layer.taken_out[adapter_name],
                layer.scaling[adapter_name],
            )
        tensors |= {f"{name}.lora_A.weight": pair[0], f"{name}.lora_B.weight": pair[1]}
    tensors |= trained_modules.tensors(model, config["modules_to_save"] or ()) | trained_tokens.tensors(model)
    tensors = resized_vocabulary(model, config["base_model_name_or_path"]) | tensors
    return config, {f"{PREFIX}{name}": value for name, value in tensors.items()}


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default", **replace_options: Any
) -> nn.Module:
    """Load an adapter that fastlora or peft has saved.

    A model that has fastlora's adapters takes the file's A, B and scaling; its dropout stays as it is. A model without
    adapters first gets fastlora's layers for exactly the modules in the file, as `replace_linear` would make them; they
    can be trained further. A model that carries peft's adapters is loaded by peft's own code. So is a model without
    adapters whose file needs what only peft's layers have, such as DoRA; its layers are then sped up in place.

    Weights of the base that peft saves with an adapter (of an adapted head, of a resized vocabulary) replace the
    model's. Names of an older transformers release are translated as transformers does.

    Where FSDP2 has spread a model with fastlora's adapters over processes, every process calls this and takes its part
    of what process 0 has read. Any other model must be loaded before it is sharded.

    Args:
        model: the same base model as the adapter's.
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: the name it has in the model.
        replace_options: `quantize`, `blocksize`, `double_quant`, `adapter_dtype` for a model without adapters.
    Returns:
        The same model.
    Raises:
        ValueError: a file is missing, truncated or not an adapter, holds NaN or inf, or a key or shape does not fit the
            model; the message names it. The model is unchanged.
    """
    bare, directory = unwrapped(model), Path(directory)
    config, tensors = read_adapter(directory)
    with sharded.clean_names(bare):
        _load(bare, directory, config, tensors, adapter_name, replace_options)
    return model


def _load(
    model: nn.Module,
    directory: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    adapter_name: str,
    replace_options: dict[str, Any],
) -> None:
    _check_sharding(model)
    if replace.carries_peft(model):
        if replace_options:
            raise ValueError(f"{next(iter(replace_options))} is for a model without adapters; this one carries peft's")
        tensors, _ = contents.renamed(by_peft.base_of(model), tensors)
        load_with_peft(model, directory, config, tensors, adapter_name)
        return
    layers, experts = adapted_layers(model), adapted_experts(model)
    adapted, keep_tied = bool(layers or experts), bool(config.get("ensure_weight_tying"))
    config = {**config, **dict.fromkeys(_SELECTING)}
    if not adapted and by_peft.needs_peft(config, tensors):
        by_peft.load(model, directory, tensors, adapter_name, replace_options)
        return
    if config.get("init_lora_weights") in _HARMLESS_INITS:
        config = {**config, "init_lora_weights": True, "eva_config": None}
    settings = settings_from_config(config, strict=False)
    found = contents.sort(model, settings, tensors, keep_tied)
    settings = dataclasses.replace(settings, modules_to_save=found.trained_owners)
    odd = [layer.active_adapter for layer in experts.values() if layer.active_adapter != adapter_name]
    if odd:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(set(odd))}")
    of_stacks = _of_stacks(model, settings, found.pairs, adapted)
    _check_start(settings, layers, adapter_name, replace_options)
    if not adapted:
        _replace_and_load(model, settings, found, adapter_name, replace_options)
    else:
        if replace_options:
            raise ValueError(f"{next(iter(replace_options))} is for a model without adapters; this one has them")
        pairs = _over_own_starts(layers, found.pairs, adapter_name)
        _check_shapes(pairs, {name: _shapes(layer, adapter_name) for name, layer in layers.items()})
        trained = trained_names(model, settings_of(model)) or []
        keys = {f"{name}.{key}" for name in trained for key in model.get_submodule(name).state_dict()}
        if keys != found.trained.keys():
            raise ValueError(
                f"modules_to_save: the file holds {found.trained_owners or 'none'}, "
                f"the model trains {trained or 'none'}"
            )
        sharded.settle(model)
        for name, layer in layers.items():
            alpha = settings.rank_and_alpha(found.former(name))[1]
            if adapter_name in layer.taken_out:  # the file's is for twice the rank
                alpha /= 2**0.5 if settings.use_rslora else 2
            layer.set_scaling(alpha, settings.use_rslora)
        _copy(pairs, layers, adapter_name)
    for (name, parameter), pair in of_stacks.items():
        alpha = settings.rank_and_alpha(f"{found.former(name)}.{parameter}")[1]
        stacks.load(adapted_experts(model)[name], parameter, pair, alpha, settings.use_rslora)
    trained_modules.load(model, found.trained, keep_tied)
    trained_modules.load(model, found.base_weights(model), keep_tied=True)
    trained_tokens.load(model, found.rows)


def _of_stacks(model: nn.Module, settings: LoRASettings, pairs: Pairs, adapted: bool) -> dict[tuple[str, str], Any]:
    """The pairs of a file that belong to stacks of experts, removed from `pairs`."""
    if not settings.target_parameters and not adapted_experts(model):
        return {}
    return stacks.take(model, settings, pairs, adapted)


def _check_sharding(model: nn.Module) -> None:
    """Raise ValueError if FSDP2 has sharded a model that can only be loaded before it is sharded."""
    peft = replace.carries_peft(model)
    if sharded.is_sharded(model) and (peft or not (adapted_layers(model) or adapted_experts(model))):
        kind = "with peft's adapters" if peft else "without adapters"
        raise ValueError(f"the model is sharded, and {kind}: call load_adapter before fully_shard")


def _check_start(
    settings: LoRASettings, layers: dict[str, LoRALinear], adapter_name: str, replace_options: dict[str, Any]
) -> None:
    """Raise ValueError if the file's A and B are meant for another base than the model's."""
    init = settings.init_lora_weights
    problem = f"the file's init_lora_weights={init!r} means a changed base, which the file does not hold"
    if starts.changes_base(init, settings.loftq_iter) and layers:
        raise ValueError(f"{problem}: load it into a model without adapters, whose base then changes the same way")
    if isinstance(init, str) and "_niter_" in init:
        raise ValueError(f"{problem}, and the change was random: merge the adapter into its base where it was trained")
    if init == "loftq" and not layers and replace_options.get("quantize") != "nf4":
        raise ValueError(f"{problem}: load it with quantize='nf4'")


def _shapes(layer: Any, adapter_name: str) -> tuple[torch.Size, torch.Size]:
    if adapter_name not in layer.lora_A:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(layer.lora_A)}")
    return layer.lora_A[adapter_name].weight.shape, layer.lora_B[adapter_name].weight.shape


def _check_shapes(pairs: Pairs, wanted: dict[str, tuple[torch.Size, torch.Size]]) -> None:
    """Raise ValueError if the file and the model differ in modules or shapes."""
    for name in sorted(pairs.keys() - wanted.keys()):
        raise ValueError(f"{PREFIX}{name}.lora_A.weight is in the file, but the model has no adapter on {name}")
    for name in sorted(wanted.keys() - pairs.keys()):
        raise ValueError(f"{PREFIX}{name}.lora_A.weight is missing from the file")
    for name, shapes in wanted.items():
        for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            found = pairs[name][part].shape
            if found != shape:
                raise ValueError(
                    f"{PREFIX}{name}.{part}.weight has shape {list(found)} in the file, {list(shape)} in the model"
                )


def _copy(pairs: Pairs, layers: dict[str, LoRALinear], adapter_name: str) -> None:
    with torch.no_grad():
        for name, layer in layers.items():
            for part, tensor in pairs[name].items():
                sharded.fill(getattr(layer, part)[adapter_name].weight, tensor)


def _over_own_starts(layers: dict[str, LoRALinear], pairs: Pairs, adapter_name: str) -> Pairs:
    """The pairs as layers take them whose base was changed by their start: without the part that undoes the change.

    Raises:
        ValueError: a file for the original base, from another start than the layer's.
    """
    found = dict(pairs)
    for name, layer in layers.items():
        if adapter_name not in layer.taken_out or name not in pairs:
            continue
        (a, b), r = (pairs[name]["lora_A"], pairs[name]["lora_B"]), layer.r[adapter_name]
        whole = a[:r], b[:, :r]
        same = a.shape == (2 * r, layer.in_features) and b.shape == (layer.out_features, 2 * r)
        if same:
            expected = starts.standalone(whole, layer.taken_out[adapter_name], layer.scaling[adapter_name])
            same = all(map(torch.allclose, (a.float(), b.float()), expected))
        if not same:
            raise ValueError(
                f"the base of {name} was changed by its start, and the file is for the original base, or for a base "
                "that another start has changed: load it into a model without adapters, or make the same start again "
                "(the same seed before replace_linear)"
            )
        found[name] = {"lora_A": whole[0], "lora_B": whole[1]}
    return found


def _replace_and_load(
    model: nn.Module, settings: LoRASettings, found: Contents, adapter_name: str, options: dict[str, Any]
) -> None:
    """Replace exactly the modules in the file, with the ranks of its tensors, and fill the new layers."""
    pairs = found.pairs
    layer_options, sites = LayerOptions(adapter_name=adapter_name, **options), find_sites(model)
    for name, pair in pairs.items():
        if name not in sites:
            raise ValueError(f"{PREFIX}{name}.lora_A.weight is in the file, but the model has no linear layer {name}")
        if sites[name].obstacle:
            raise ValueError(f"{PREFIX}{name}.lora_A.weight is in the file, but {name}: {sites[name].obstacle}")
        (n, k), rank = sites[name].shape, pair["lora_A"].shape[0]
        _check_shapes({name: pair}, {name: (torch.Size((rank, k)), torch.Size((n, rank)))})
        meant = settings.rank_and_alpha(found.former(name))[0]
        if meant != rank:
            raise ValueError(
                f"{PREFIX}{name}.lora_A.weight has rank {rank}, and the config means {meant} (r, rank_pattern): the "
                "scaling is not known"
            )
        sites[name].adapt, sites[name].r = True, rank
        sites[name].lora_alpha = settings.rank_and_alpha(found.former(name))[1]
    settings = dataclasses.replace(settings, inference_mode=False)
    replace.replace_marked(model, sites, settings, layer_options)
    _copy(pairs, adapted_layers(model), adapter_name)
