"""Modules that are trained in full along with the adapters: peft's `modules_to_save`.

They are trained in place, without a copy, and saved whole with the adapter under the keys that peft reads. Tied weights
stay tied: every module that shares one is saved with it, because peft would otherwise load the weight into one of them
only.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fastlora.layers import sharded
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


def tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Parameters and buffers of these modules by their full names, copied: a file must not hold shared tensors."""
    found: dict[str, Tensor] = {}
    for name in names:
        for key, value in model.get_submodule(name).state_dict().items():
            found[f"{name}.{key}"] = value.detach().clone()
    return found


def check_fit(model: nn.Module, found: Mapping[str, Tensor], prefix: str) -> None:
    """Raise ValueError if the model has no tensor of this name and shape, or one that cannot be filled."""
    own, sharers = dict(model.state_dict(keep_vars=True)), _sharers(model)
    for name, value in found.items():
        if name not in own:
            raise ValueError(f"{prefix}{name} is in the file, but not in the model")
        if own[name].shape != value.shape:
            raise ValueError(
                f"{prefix}{name} has shape {list(value.shape)} in the file, {list(own[name].shape)} in the model"
            )
        if sharded.is_sharded(model) and not all(other in found for other in sharers.get(id(own[name]), ())):
            raise ValueError(
                f"{prefix}{name} would no longer be tied, and the model is sharded: load it before sharding"
            )


@torch.no_grad()
def load(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Put these values into the model. A parameter shared with one that is not among them is untied first."""
    own, sharers = dict(model.state_dict(keep_vars=True)), _sharers(model)
    for name, value in found.items():
        target = own[name]
        if all(other in found for other in sharers.get(id(target), ())):
            sharded.fill(target, value)
            continue
        owner, _, attribute = name.rpartition(".")
        fresh = nn.Parameter(value.to(target.device, target.dtype, copy=True), target.requires_grad)
        setattr(model.get_submodule(owner), attribute, fresh)


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
