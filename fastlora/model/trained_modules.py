"""Modules that are trained in full along with the adapters: peft's `modules_to_save`.

They are trained in place, without a copy, in fp32 (`layers.kept_fp32`), and saved whole with the adapter under the keys
that peft reads. Tied weights stay tied: every module that shares one is saved with it, because peft would otherwise
load the weight into one of them only. A file with two different weights unties them, as peft's own layers do.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers import kept_fp32, sharded
from fastlora.layers.bases import is_linear4bit
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.names import nearest, within


def find(model: nn.Module, wanted: Collection[str] | None) -> dict[str, nn.Module]:
    """The modules whose name ends with one of the entries; as in peft, "norm" means "input_layernorm" too.

    Raises:
        ValueError: an entry that matches nothing, or a module that cannot be trained.
    """
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for entry in wanted or ():
        meant = {name: module for name, module in modules.items() if name.endswith(entry)}
        if not meant:
            raise ValueError(f"modules_to_save: {entry!r} matches no module{nearest(entry, modules.keys() - {''})}")
        for name, module in meant.items():
            _check_trainable(name, module)
        found |= meant
    return found


def tied_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """The names and those of all modules that share a parameter with one of them."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    mine = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    others = {owner for key in mine for owner in owners[key] if not any(within(owner, name) for name in names)}
    return sorted({*names, *others})


def prepare(model: nn.Module, modules: Collection[nn.Module], trains: bool, dtype: torch.dtype | None) -> None:
    """Train these modules, or freeze them.

    Args:
        dtype: of what is trained; None and fp32 mean fp32, any other the model's own.
    """
    for module in modules:
        module.requires_grad_(trains)
    if dtype in (None, torch.float32):
        kept_fp32.keep(model, modules)


def tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Parameters and buffers of these modules by their full names; those that are tied share memory."""
    found: dict[str, Tensor] = {}
    for name in names:
        found |= {f"{name}.{key}": value for key, value in model.get_submodule(name).state_dict(keep_vars=True).items()}
    return found


def check_fit(model: nn.Module, found: Mapping[str, Tensor], prefix: str) -> None:
    """Raise ValueError if the model has no tensor of this name and shape, or one that cannot be filled."""
    own, sharers = dict(model.state_dict(keep_vars=True)), _sharers(model)
    for name, value in found.items():
        if name not in own:
            raise ValueError(f"{prefix}{name} is in the file, but not in the model")
        if own[name].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{prefix}{name} is {value.dtype} in the file, {own[name].dtype} in the model")
        if own[name].shape != value.shape:
            hint = ""
            if own[name].shape[1:] == value.shape[1:] and hasattr(model, "resize_token_embeddings"):
                hint = f": call model.resize_token_embeddings({value.shape[0]}) first, if this is its vocabulary"
            raise ValueError(
                f"{prefix}{name} has shape {list(value.shape)} in the file, {list(own[name].shape)} in the model{hint}"
            )
        if sharded.is_sharded(model) and not _stays_tied(name, found, sharers.get(id(own[name]), [])):
            raise ValueError(
                f"{prefix}{name} would no longer be tied, and the model is sharded: load it before sharding"
            )


@torch.no_grad()
def load(model: nn.Module, found: Mapping[str, Tensor], keep_tied: bool = False) -> None:
    """Put these values into the model.

    A parameter is untied from others that share it where these are not among the values, or have another value. Then
    the model's config says so, and if the file holds two values, a warning too.

    Args:
        keep_tied: a parameter stays shared with those that are not among the values (peft's `ensure_weight_tying`).
    """
    own, sharers = dict(model.state_dict(keep_vars=True)), _sharers(model)
    untied = False
    for name, value in found.items():
        target, names = own[name], sharers.get(id(own[name]), [])
        if _stays_tied(name, found, names) or (
            keep_tied and not any(other in found for other in names if other != name)
        ):
            sharded.fill(target, value)
            continue
        untied = True
        owner, _, attribute = name.rpartition(".")
        fresh = nn.Parameter(value.to(target.device, target.dtype, copy=True), target.requires_grad)
        setattr(model.get_submodule(owner), attribute, fresh)
        for other in names:
            if other not in found:  # a file without it does not train it
                target.requires_grad_(False)
                kept_fp32.release([model.get_submodule(other.rpartition(".")[0])])
            elif other > name:
                warnings.warn(
                    f"the file holds two weights, {name} and {other}, which the model shares: they are no longer tied",
                    stacklevel=2,
                )
    if untied:
        tell_config(model)


def tell_config(model: Any) -> None:
    """Let the model's config and transformers' tables of tied weights say what is tied still."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, table, None)
        if isinstance(known, dict):
            tied = {key: other for key, other in known.items() if by_name.get(key) is by_name.get(other)}
            setattr(model, table, tied)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return
    inputs, outputs = (
        getattr(module, "base_layer", module)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if outputs is not None and getattr(outputs, "weight", None) is not getattr(inputs, "weight", None):
        for each in (config, config.get_text_config()):
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False


def _stays_tied(name: str, found: Mapping[str, Tensor], names: Collection[str]) -> bool:
    """Whether all that share a parameter are among the values, and equal."""
    return all(other in found and torch.equal(found[other], found[name]) for other in names)


def _sharers(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _check_trainable(name: str, module: nn.Module) -> None:
    for inner in module.modules():
        if isinstance(inner, NF4Linear) or is_linear4bit(inner):
            raise ValueError(
                f"modules_to_save: {name!r} holds a weight in 4 bits, which cannot be trained: leave it out"
            )
    if next(module.parameters(), None) is None:
        raise ValueError(f"modules_to_save: {name!r} has no parameters")
