"""What a file of an adapter holds, sorted by what it is for in a model, and checked against it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.config import adapted_layers
from fastlora.files.peft_files import PREFIX
from fastlora.layers.lora_experts import adapted_experts
from fastlora.model import trained_modules, trained_tokens
from fastlora.model.names import means
from fastlora.model.settings import LoRASettings

Pairs = dict[str, dict[str, Tensor]]
_BASE = ".base_layer.weight"
_BASE_OF_TOKENS = ".token_adapter.base_layer.weight"


@dataclass
class Contents:
    """The tensors of a file by their names in the model, without peft's prefix.

    Args:
        pairs: {layer: {"lora_A": [R, K], "lora_B": [N, R]}}.
        trained: of modules trained in full, by the tensor's name. rows: of single tokens, by the module's name.
        base: weights of the base that came with the adapter, by the module's name.
        formers: names in the file that transformers has changed since, by those in the model.
    """

    pairs: Pairs
    trained: dict[str, Tensor]
    rows: dict[str, Tensor]
    base: dict[str, Tensor]
    formers: dict[str, str] = field(default_factory=dict)

    @property
    def trained_owners(self) -> list[str] | None:
        """The modules that hold what is trained in full."""
        return sorted({name.rpartition(".")[0] for name in self.trained}) or None

    def former(self, name: str) -> str:
        """A module's name in the file, which its config's patterns are for."""
        return self.formers.get(name, name)

    def base_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of the base by the names that they have once their modules are adapted."""
        found = {}
        for name, value in self.base.items():
            inner = any(key.startswith("base_layer.") for key in model.get_submodule(name).state_dict())
            found[f"{name}{_BASE}" if inner else f"{name}.weight"] = value
        return found


def sort(model: nn.Module, settings: LoRASettings, tensors: Mapping[str, Tensor], keeps_tied: bool = False) -> Contents:
    """The contents of a file; keeps_tied: what the model ties to a module in the file need not be there.

    Raises:
        ValueError: a tensor that is not of an adapter, that the model has no place for, or of another shape.
    """
    tensors, formers = renamed(model, tensors)
    trained = _of_trained_modules(model, settings, tensors, keeps_tied)
    rows = _of_trained_tokens(model, settings, tensors)
    taken = {PREFIX + name for name in trained} | {f"{PREFIX}{name}.{trained_tokens.KEY}" for name in rows}
    base = _of_base(model, {key: value for key, value in tensors.items() if key not in taken}, tensors)
    rest = {key: value for key, value in tensors.items() if key not in taken and key not in base}
    by_module = {_owner(key): value for key, value in base.items()}
    return Contents(_pairs(rest), trained, rows, by_module, formers)


def renamed(model: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the model's present names, and {present: former} name of each module that has another.

    transformers renames modules from time to time, and has a table of the former names for each architecture.
    """
    modules = {name for name, _ in model.named_modules()}
    missing = {_owner(key) for key in tensors} - modules
    if not missing or not hasattr(model, "config"):
        return dict(tensors), {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    except (ImportError, AttributeError, TypeError):  # another transformers, or a model that is not its own
        return dict(tensors), {}
    formers = {}
    for old in missing:
        key = f"{old}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        new = key.removesuffix(".weight")
        if new in modules and new not in formers:
            formers[new] = old
    present = {old: new for new, old in formers.items()}
    found = {}
    for key, value in tensors.items():
        owner = _owner(key)
        new = present.get(owner, owner)
        found[f"{PREFIX}{new}{key.removeprefix(PREFIX).removeprefix(owner)}"] = value
    return found, formers


def _owner(key: str) -> str:
    """The module that a tensor of a file belongs to."""
    name = key.removeprefix(PREFIX)
    for end in (".lora_A.weight", ".lora_B.weight", _BASE_OF_TOKENS, _BASE, f".{trained_tokens.KEY}"):
        if name.endswith(end):
            return name.removesuffix(end)
    return name.rpartition(".")[0]


def _of_trained_modules(
    model: nn.Module, settings: LoRASettings, tensors: Mapping[str, Tensor], keeps_tied: bool
) -> dict[str, Tensor]:
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
    _check_complete(model, entries, found, keeps_tied)
    return found


def _check_complete(model: nn.Module, entries: Collection[str], found: Mapping[str, Tensor], keeps_tied: bool) -> None:
    """Raise ValueError where a file lacks a module of its `modules_to_save`, or a part of one."""
    own = model.state_dict(keep_vars=True)
    there = {id(own[name]) for name in found} if keeps_tied else set()
    for name, module in model.named_modules():
        if not name or not any(name.endswith(entry) for entry in entries):
            continue
        for key in module.state_dict():
            whole = f"{name}.{key}"
            if "lora_" not in key and whole not in found and id(own.get(whole)) not in there:
                raise ValueError(f"{PREFIX}{whole} is missing from the file, which saves {name} (modules_to_save)")


def _of_trained_tokens(model: nn.Module, settings: LoRASettings, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        for name in list(in_file):  # tied to one that is there, with the same rows
            if name not in own and in_file[name] in [in_file[other] for other in own if other in in_file]:
                del in_file[name]
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
        shape = [len(indices), getattr(module, "base_layer", module).weight.shape[1]]
        if list(tensors[key].shape) != shape:
            raise ValueError(f"{key} has shape {list(tensors[key].shape)} in the file, {shape} in the model")
        found[name] = tensors[key]
    return found


def _of_base(model: Any, tensors: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the base by their keys in the file: of adapted modules, and of the embedding and the output head.

    peft saves them where an embedding or a head is adapted, or the vocabulary was resized. every: the whole file.

    Raises:
        ValueError: the model has no such weight, or one of another shape.
    """
    ends = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, get)() if callable(getattr(model, get, None)) else None
        ends += [name for name, each in model.named_modules() if each is module and name]
    found = {}
    for key, value in tensors.items():
        owner = _owner(key)
        of_adapted = key.endswith(_BASE) and f"{PREFIX}{owner}.lora_A.weight" in tensors
        of_tokens = key.endswith(_BASE_OF_TOKENS) and f"{PREFIX}{owner}.{trained_tokens.KEY}" in every
        if of_adapted or of_tokens or (owner in ends and key.endswith((_BASE, f"{owner}.weight"))):
            found[key] = value
    for key, value in found.items():
        owner = _owner(key)
        module = dict(model.named_modules()).get(owner)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None:
            raise ValueError(f"{key} is in the file, but the model has no module {owner}")
        if tuple(weight.shape) != tuple(value.shape):
            hint = ""
            if owner in ends and tuple(weight.shape[1:]) == tuple(value.shape[1:]):
                hint = f": call model.resize_token_embeddings({value.shape[0]}) first"
            raise ValueError(
                f"{key} has shape {list(value.shape)} in the file, {list(weight.shape)} in the model{hint}"
            )
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(f"{key} is in the file, but the weight of {owner} is quantized in the model")
    return found


def _pairs(tensors: Mapping[str, Tensor]) -> Pairs:
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
