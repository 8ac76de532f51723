"""Adapters on disk, in peft's format.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The tensors' keys are
`base_model.model.<module>.lora_A.weight` [R, K] and `.lora_B.weight` [N, R], without the adapter's name. peft opens
what is saved here, and the other way round.

Loading reads safetensors only, never pickle, and checks every key and shape before it changes anything.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlora.adapters import stacks
from fastlora.adapters.config import adapted_layers, adapter_config, trained_names
from fastlora.files.atomic import moved_into
from fastlora.files.peft_files import CONFIG_NAME, PREFIX, WEIGHTS_NAME, load_with_peft, peft_adapter, read_adapter
from fastlora.layers import sharded, starts
from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.sharded import unwrapped
from fastlora.model import replace, trained_modules, trained_tokens
from fastlora.model.names import means
from fastlora.model.settings import LayerOptions, LoRASettings, settings_from_config
from fastlora.model.sites import find_sites

# Starts that leave the base weight as it is: a trained adapter no longer needs them.
_HARMLESS_INITS = ("eva", "orthogonal")
# Options that exclude layers. The file's tensors say which remain, and peft does not apply these to stacks of experts.
_EXCLUDING = ("exclude_modules", "layers_to_transform", "layers_pattern")

Pairs = dict[str, dict[str, Tensor]]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a model's adapter in peft's format.

    Where the start changed the base ("pissa", "olora"), what training added to the start is saved, at twice the rank,
    so that the adapter fits the original base; if the base was quantized later, up to the error of quantization.

    Each of the two files is written under another name and then moved into place: a crash leaves the old file. The
    adapter of a model that carries peft's own layers is formed by peft's code and written in the same way.

    Where FSDP2 has spread the model over processes (`fully_shard`), every process calls this. Process 0 writes the same
    files as a single process would, with the full tensors, and the others wait for it.

    Args:
        model: a model from `replace_linear`, or one that carries peft's adapters.
        directory: created if missing.
        adapter_name: which adapter.
    Raises:
        ValueError: the model has no such adapter.
    """
    directory, model = Path(directory), unwrapped(model)
    sharded.settle(model)
    if replace.carries_peft(model):
        config, tensors = peft_adapter(model, adapter_name)
    else:
        layers, experts = adapted_layers(model), adapted_experts(model)
        names = {name for layer in layers.values() for name in layer.lora_A}
        names |= {layer.active_adapter for layer in experts.values()}
        if names != {adapter_name}:
            raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(names) or 'none'}")
        config = adapter_config(model, layers, adapter_name)
        tensors = {
            f"{PREFIX}{key}": value for name, layer in experts.items() for key, value in stacks.saved(layer, name)
        }
        for name, layer in layers.items():
            for part, value in zip(("lora_A", "lora_B"), _saved_pair(layer, adapter_name), strict=True):
                tensors[f"{PREFIX}{name}.{part}.weight"] = value
        extra = trained_modules.tensors(model, config["modules_to_save"] or ())
        tensors |= {f"{PREFIX}{name}": value for name, value in (extra | trained_tokens.tensors(model)).items()}
    tensors = {key: sharded.whole(tensor).to("cpu").contiguous() for key, tensor in tensors.items()}
    sharded.by_first(lambda: _write(directory, config, tensors), sharded.is_sharded(model))


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    with (
        moved_into(directory / CONFIG_NAME) as config_path,
        moved_into(directory / WEIGHTS_NAME) as weights_path,
    ):
        config_path.write_text(text)
        save_file(tensors, weights_path, metadata={"format": "pt"})


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default", **replace_options: Any
) -> nn.Module:
    """Load an adapter that fastlora or peft has saved.

    A model that has fastlora's adapters takes the file's A, B and scaling; its dropout stays as it is. A model without
    adapters first gets fastlora's layers for exactly the modules in the file, as `replace_linear` would make them; they
    can be trained further. A model that carries peft's adapters is loaded by peft's own code.

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
        ValueError: a file is missing, truncated or not an adapter, or a key or shape does not fit the model; the
            message names it. The model is unchanged.
    """
    bare, directory = unwrapped(model), Path(directory)
    config, tensors = read_adapter(directory)
    _check_sharding(bare)
    if replace.carries_peft(bare):
        if replace_options:
            raise ValueError(f"{next(iter(replace_options))} is for a model without adapters; this one carries peft's")
        load_with_peft(bare, directory, config, tensors, adapter_name)
        return model
    config = {**config, **dict.fromkeys(_EXCLUDING)}
    if config.get("init_lora_weights") in _HARMLESS_INITS:
        config = {**config, "init_lora_weights": True, "eva_config": None}
    settings, layers = settings_from_config(config), adapted_layers(bare)
    extra = _of_trained_modules(bare, settings, tensors)
    rows = _of_trained_tokens(bare, settings, tensors)
    others = {PREFIX + name for name in extra} | {f"{PREFIX}{name}.{trained_tokens.KEY}" for name in rows}
    pairs = _pairs({key: tensor for key, tensor in tensors.items() if key not in others})
    settings = dataclasses.replace(settings, modules_to_save=_owners(extra))
    experts = adapted_experts(bare)
    odd = [layer.active_adapter for layer in experts.values() if layer.active_adapter != adapter_name]
    if odd:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(set(odd))}")
    of_stacks = _of_stacks(bare, settings, pairs, bool(layers or experts))
    _check_start(settings, layers, adapter_name, replace_options)
    if not layers and not experts:
        _replace_and_load(bare, settings, pairs, adapter_name, replace_options)
        _load_rest(bare, settings, of_stacks, extra, rows)
        return model
    if replace_options:
        raise ValueError(f"{next(iter(replace_options))} is for a model without adapters; this one has them")
    _check_shapes(pairs, {name: _shapes(layer, adapter_name) for name, layer in layers.items()})
    trained = trained_names(bare, getattr(bare, "fastlora_settings", None) or LoRASettings()) or []
    if sorted(_owners(extra) or []) != sorted(trained):
        raise ValueError(
            f"modules_to_save: the file holds {_owners(extra) or 'none'}, the model trains {trained or 'none'}"
        )
    sharded.settle(bare)
    for name, layer in layers.items():
        layer.set_scaling(settings.rank_and_alpha(name)[1], settings.use_rslora)
    _copy(pairs, layers, adapter_name)
    _load_rest(bare, settings, of_stacks, extra, rows)
    return model


def _of_stacks(model: nn.Module, settings: LoRASettings, pairs: Pairs, adapted: bool) -> dict[tuple[str, str], Any]:
    """The pairs of a file that belong to stacks of experts, removed from `pairs`."""
    if not settings.target_parameters and not adapted_experts(model):
        return {}
    return stacks.take(model, settings, pairs, adapted)


def _load_rest(
    model: nn.Module,
    settings: LoRASettings,
    of_stacks: dict[tuple[str, str], Any],
    extra: dict[str, Tensor],
    rows: dict[str, Tensor],
) -> None:
    """Load what a file holds besides the pairs of linear layers: for stacks of experts, modules and tokens."""
    for (name, parameter), pair in of_stacks.items():
        alpha = settings.rank_and_alpha(f"{name}.{parameter}")[1]
        stacks.load(adapted_experts(model)[name], parameter, pair, alpha, settings.use_rslora)
    trained_modules.load(model, extra)
    _load_rows(model, rows)


def _saved_pair(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """A and B that give the same model over the original base."""
    pair = (
        sharded.whole(layer.lora_A[adapter_name].weight.detach()),
        sharded.whole(layer.lora_B[adapter_name].weight.detach()),
    )
    taken_out = layer.taken_out.get(adapter_name)
    return pair if taken_out is None else starts.standalone(pair, taken_out, layer.scaling[adapter_name])


def _of_trained_modules(model: nn.Module, settings: LoRASettings, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that belong to its `modules_to_save`, by their names in the model.

    Raises:
        ValueError: the model has no such tensor, or its shape is another.
    """
    entries = tuple(settings.modules_to_save or ())
    found = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        owners = [name[:end] for end in range(len(name)) if name[end] == "."]
        if any(owner.endswith(entry) for owner in owners for entry in entries):
            found[name] = tensor
    trained_modules.check_fit(model, found, PREFIX)
    return found


def _of_trained_tokens(model: nn.Module, settings: LoRASettings, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained rows of a file, by the name of their module.

    Raises:
        ValueError: the model has no such module, rows of another size, or trains other tokens.
    """
    own = trained_tokens.layers(model)
    in_model = {name: layer.indices.tolist() for name, layer in own.items()}
    wanted = settings.trainable_token_indices
    if own and isinstance(wanted, Mapping):
        in_file = {
            next((name for name in own if means(entry, name)), entry): list(indices)
            for entry, indices in wanted.items()
        }
    elif own and wanted:
        in_file = {name: list(wanted) for name in list(own)[:1]}
    else:
        in_file = trained_tokens.resolve(model, wanted)
    if (adapted_layers(model) or adapted_experts(model)) and in_file != in_model:
        raise ValueError(
            f"trainable_token_indices: the file trains {in_file or 'none'}, the model {in_model or 'none'}"
        )
    found = {}
    for name, indices in in_file.items():
        key = f"{PREFIX}{name}.{trained_tokens.KEY}"
        if key not in tensors:
            raise ValueError(f"{key} is missing from the file")
        module: Any = model.get_submodule(name)
        shape = [len(indices), module.weight.shape[1]]
        if list(tensors[key].shape) != shape:
            raise ValueError(f"{key} has shape {list(tensors[key].shape)} in the file, {shape} in the model")
        found[name] = tensors[key]
    return found


@torch.no_grad()
def _load_rows(model: nn.Module, rows: dict[str, Tensor]) -> None:
    for name, values in rows.items():
        layer: Any = model.get_submodule(name)
        sharded.fill(layer.trained_rows, values)


def _owners(extra: dict[str, Tensor]) -> list[str] | None:
    return sorted({name.rpartition(".")[0] for name in extra}) or None


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
    taken_out = [name for name, layer in layers.items() if adapter_name in layer.taken_out]
    if taken_out:
        raise ValueError(
            f"the base of {taken_out[0]} was changed by its start, and the file is for the original base: load it "
            "into a model without adapters"
        )
    problem = f"the file's init_lora_weights={init!r} means a changed base, which the file does not hold"
    if starts.changes_base(init, settings.loftq_iter) and layers:
        raise ValueError(f"{problem}: load it into a model without adapters, whose base then changes the same way")
    if isinstance(init, str) and "_niter_" in init:
        raise ValueError(f"{problem}, and the change was random: merge the adapter into its base where it was trained")
    if init == "loftq" and not layers and replace_options.get("quantize") != "nf4":
        raise ValueError(f"{problem}: load it with quantize='nf4'")


def _pairs(tensors: dict[str, Tensor]) -> Pairs:
    """{module: {"lora_A": [R, K], "lora_B": [N, R]}} of a file's tensors.

    Raises:
        ValueError: a key that does not belong to a LoRA pair, or half a pair.
    """
    pairs: Pairs = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not (key.startswith(PREFIX) and key.endswith(".weight") and name and part in ("lora_A", "lora_B")):
            raise ValueError(
                f"{key!r}: not a LoRA tensor; keys must be {PREFIX}<module>.lora_A.weight or .lora_B.weight"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{key!r}: must be a matrix of floats, not {tensor.dtype} {list(tensor.shape)}")
        pairs.setdefault(name, {})[part] = tensor
    for name, pair in pairs.items():
        if len(pair) == 1:
            raise ValueError(f"{PREFIX}{name} has only {next(iter(pair))}: the file is incomplete")
    if not pairs:
        raise ValueError("the file holds no tensors")
    return pairs


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


def _replace_and_load(
    model: nn.Module, settings: LoRASettings, pairs: Pairs, adapter_name: str, options: dict[str, Any]
) -> None:
    """Replace exactly the modules in the file, with the ranks of its tensors, and fill the new layers."""
    layer_options, sites = LayerOptions(adapter_name=adapter_name, **options), find_sites(model)
    for name, pair in pairs.items():
        if name not in sites:
            raise ValueError(f"{PREFIX}{name}.lora_A.weight is in the file, but the model has no linear layer {name}")
        if sites[name].obstacle:
            raise ValueError(f"{PREFIX}{name}.lora_A.weight is in the file, but {name}: {sites[name].obstacle}")
        (n, k), rank = sites[name].shape, pair["lora_A"].shape[0]
        _check_shapes({name: pair}, {name: (torch.Size((rank, k)), torch.Size((n, rank)))})
        sites[name].adapt, sites[name].r = True, rank
        sites[name].lora_alpha = settings.rank_and_alpha(name)[1]
    settings = dataclasses.replace(settings, inference_mode=False)
    replace.replace_marked(model, sites, settings, layer_options)
    _copy(pairs, adapted_layers(model), adapter_name)
