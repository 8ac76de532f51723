"""Adapters on disk, in peft's format, and folded into the weights for good.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; the tensors' keys are
`base_model.model.<module>.lora_A.weight` [R, K] and `.lora_B.weight` [N, R], without the adapter's name. What is
saved here opens in peft, and the other way round.

Files are written under another name and moved into place, so that a crash leaves the old ones. Loading reads
safetensors only, never pickle, and checks every key and shape before it changes anything.
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlora import replace
from fastlora.linear import LoRALinear, NF4Linear
from fastlora.survey import find_sites
from fastlora.targets import LoRASettings, settings_from_config
from fastlora.trainer_compat import forget_quantization

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("ForConditionalGeneration", "SEQ_2_SEQ_LM"))
# Ways to start that leave the base weight as it is: a trained adapter needs them no more.
_HARMLESS_INITS = ("eva", "orthogonal")

Pairs = dict[str, dict[str, Tensor]]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a model's adapter in peft's format.

    Each of the two files is written whole and then moved into place: a crash leaves the old file. A model that carries
    peft's own layers is saved by peft's code, to a directory beside, and moved likewise.

    Args:
        model: a model from `replace_linear`, or one that carries peft's adapters.
        directory: created where missing.
        adapter_name: which adapter.
    Raises:
        ValueError: the model has no such adapter.
    """
    directory, model = Path(directory), _unwrapped(model)
    if replace.carries_peft(model):
        config, tensors = _peft_adapter(model, adapter_name)
    else:
        layers = adapted_layers(model)
        odd = [name for name, layer in layers.items() if adapter_name not in layer.lora_A]
        if not layers or odd:
            names = sorted({name for layer in layers.values() for name in layer.lora_A})
            raise ValueError(f"the model has no adapter {adapter_name!r}; it has {names or 'none'}")
        config = adapter_config(model, layers, adapter_name)
        tensors = {}
        for name, layer in layers.items():
            for part in ("lora_A", "lora_B"):
                tensors[f"{_PREFIX}{name}.{part}.weight"] = getattr(layer, part)[adapter_name].weight.detach()
    tensors = {key: tensor.to("cpu").contiguous() for key, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    with (
        _moved_into(directory / CONFIG_NAME) as config_path,
        _moved_into(directory / WEIGHTS_NAME) as weights_path,
    ):
        config_path.write_text(text)
        save_file(tensors, weights_path, metadata={"format": "pt"})


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default", **replace_options: Any
) -> nn.Module:
    """Load an adapter that fastlora or peft has saved.

    A model that has fastlora's adapters takes the file's A, B and scaling; its dropout stays as it is. A model without
    adapters gets fastlora layers first, for exactly the modules in the file, as `replace_linear` would make them;
    they can be trained on. A model that carries peft's adapters loads with peft's own code.

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
    bare, directory = _unwrapped(model), Path(directory)
    config, tensors = read_adapter(directory)
    if replace.carries_peft(bare):
        if replace_options:
            raise ValueError(f"{next(iter(replace_options))} is for a model without adapters; this one carries peft's")
        _load_with_peft(bare, directory, config, tensors, adapter_name)
        return model
    if config.get("init_lora_weights") in _HARMLESS_INITS:
        config = {**config, "init_lora_weights": True, "eva_config": None}
    settings, pairs, layers = settings_from_config(config), _pairs(tensors), adapted_layers(bare)
    if not layers:
        _replace_and_load(bare, settings, pairs, adapter_name, replace_options)
        return model
    if replace_options:
        raise ValueError(f"{next(iter(replace_options))} is for a model without adapters; this one has them")
    _check_fit(pairs, {name: _shapes(layer, adapter_name) for name, layer in layers.items()})
    for name, layer in layers.items():
        layer.set_scaling(settings.rank_and_alpha(name)[1], settings.use_rslora)
    _copy(pairs, layers, adapter_name)
    return model


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold the adapters into the weights: every fastlora layer becomes a plain `nn.Linear`.

    W + scaling · B A is summed in fp32 and rounded once. An NF4 base becomes a full-precision weight, in the dtype it
    had before quantization, and is not quantized again: the update is mostly smaller than NF4's steps, so a second
    quantization would round much of it away and add its own error to the rest. A model in NF4 thus grows fourfold.

    Args:
        model: a model from `replace_linear`; or one that carries peft's adapters, which peft merges by its own rules
            (there a `Linear4bit` is quantized again).
        dtype: dtype of merged weights; default that of the base.
    Returns:
        The model, changed in place, without wrappers; for a `PeftModel`, the base model inside it.
    Raises:
        ValueError: nothing to merge.
    """
    model = _unwrapped(model)
    if replace.carries_peft(model):
        if not hasattr(model, "merge_and_unload"):
            raise ValueError("peft merges a PeftModel; this model had adapters injected: wrap it with get_peft_model")
        return model.merge_and_unload()  # type: ignore[operator]
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, (LoRALinear, NF4Linear))]
    outer = {name: module for name, module in found if not name.endswith(".base_layer")}
    if not outer:
        raise ValueError("the model has no fastlora layers to merge")
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name in list(outer):
        module: Any = outer.pop(name)
        base = getattr(module, "base_layer", module)
        if isinstance(base.weight, nn.Parameter) and shared[id(base.weight)] > 1:
            warnings.warn(
                f"{name} shared its weight with another module; merged, it has a weight of its own: set "
                "tie_word_embeddings=False in the model's config before saving",
                stacklevel=2,
            )
        plain = module.to_linear(dtype)
        for parent, attribute in places.pop(id(module)):
            setattr(parent, attribute, plain)
    for attribute in ("fastlora_report", "fastlora_settings"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    forget_quantization(model)
    return model


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's `LoRALinear` layers by name, without torch.compile's part in the names."""
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def adapter_config(model: nn.Module, layers: dict[str, LoRALinear], adapter_name: str) -> dict[str, Any]:
    """What peft needs to put the same adapters on the same modules: the contents of `adapter_config.json`."""
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    settings = getattr(model, "fastlora_settings", None) or LoRASettings()
    task = next((task for end, task in _TASKS if type(model).__name__.endswith(end)), None)
    base = settings.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": settings.task_type or task,
        "base_model_name_or_path": base or None,
        "revision": settings.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": getattr(first.lora_dropout[adapter_name], "p", 0.0),
        "use_rslora": first.use_rslora[adapter_name],
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": _target_names(model, layers),
        "exclude_modules": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
        "lora_bias": False,
    }


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a saved adapter.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            pickled = path == weights_path and (directory / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is a pickle, which is not read: convert it to safetensors" if pickled else ""
            raise ValueError(f"{path} does not exist{hint}")
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise ValueError(f"{config_path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds no JSON object")
    try:
        with safe_open(weights_path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights_path} is truncated or not a safetensors file: {error}") from error
    return config, tensors


def _pairs(tensors: dict[str, Tensor]) -> Pairs:
    """{module: {"lora_A": [R, K], "lora_B": [N, R]}} of a file's tensors.

    Raises:
        ValueError: a key that is no part of a LoRA pair, or half a pair.
    """
    pairs: Pairs = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if not (key.startswith(_PREFIX) and key.endswith(".weight") and name and part in ("lora_A", "lora_B")):
            raise ValueError(
                f"{key!r}: not a LoRA tensor; keys must be {_PREFIX}<module>.lora_A.weight or .lora_B.weight"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{key!r}: must be a matrix of floats, not {tensor.dtype} {list(tensor.shape)}")
        pairs.setdefault(name, {})[part] = tensor
    for name, pair in pairs.items():
        if len(pair) == 1:
            raise ValueError(f"{_PREFIX}{name} has {next(iter(pair))} only: the file is incomplete")
    if not pairs:
        raise ValueError("the file holds no tensors")
    return pairs


def _shapes(layer: Any, adapter_name: str) -> tuple[torch.Size, torch.Size]:
    if adapter_name not in layer.lora_A:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(layer.lora_A)}")
    return layer.lora_A[adapter_name].weight.shape, layer.lora_B[adapter_name].weight.shape


def _check_fit(pairs: Pairs, wanted: dict[str, tuple[torch.Size, torch.Size]]) -> None:
    """Raise ValueError where the file and the model differ in modules or shapes."""
    for name in sorted(pairs.keys() - wanted.keys()):
        raise ValueError(f"{_PREFIX}{name}.lora_A.weight is in the file, but the model has no adapter on {name}")
    for name in sorted(wanted.keys() - pairs.keys()):
        raise ValueError(f"{_PREFIX}{name}.lora_A.weight is missing from the file")
    for name, shapes in wanted.items():
        for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            found = pairs[name][part].shape
            if found != shape:
                raise ValueError(
                    f"{_PREFIX}{name}.{part}.weight has shape {list(found)} in the file, {list(shape)} in the model"
                )


def _copy(pairs: Pairs, layers: dict[str, LoRALinear], adapter_name: str) -> None:
    with torch.no_grad():
        for name, layer in layers.items():
            for part, tensor in pairs[name].items():
                getattr(layer, part)[adapter_name].weight.copy_(tensor)


def _replace_and_load(
    model: nn.Module, settings: LoRASettings, pairs: Pairs, adapter_name: str, options: dict[str, Any]
) -> None:
    """Put layers on exactly the modules in the file, with the ranks of its tensors, and fill them."""
    sites = find_sites(model)
    for name, pair in pairs.items():
        if name not in sites:
            raise ValueError(f"{_PREFIX}{name}.lora_A.weight is in the file, but the model has no linear layer {name}")
        if sites[name].obstacle:
            raise ValueError(f"{_PREFIX}{name}.lora_A.weight is in the file, but {name}: {sites[name].obstacle}")
        (n, k), rank = sites[name].shape, pair["lora_A"].shape[0]
        _check_fit({name: pair}, {name: (torch.Size((rank, k)), torch.Size((n, rank)))})
        sites[name].adapt, sites[name].r = True, rank
        sites[name].lora_alpha = settings.rank_and_alpha(name)[1]
    settings = dataclasses.replace(settings, inference_mode=False)
    replace.carry_out(model, sites, settings, adapter_name=adapter_name, **options)
    _copy(pairs, adapted_layers(model), adapter_name)


def _target_names(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str] | str:
    """`target_modules` that by peft's rule means these layers and no others: ends of names, names, or a pattern."""
    names = [name.replace("_orig_mod.", "") for name, _ in model.named_modules()]
    # what lies inside a fastlora layer is not there when peft looks at the bare model
    outside = [name for name in names if not any(name.startswith(f"{layer}.") for layer in layers)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for targets in (ends, sorted(layers)):
        meant = {name for name in outside if any(name == end or name.endswith(f".{end}") for end in targets)}
        if meant == layers.keys():
            return targets
    return "|".join(re.escape(name) for name in layers)


def _peft_adapter(model: Any, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one of peft's adapters, as peft's `save_pretrained` writes them."""
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict

    known = getattr(model, "peft_config", {})
    if adapter_name not in known:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(known) or 'none'}")
    if isinstance(model, PeftModel):
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, selected_adapters=[adapter_name])
            return read_adapter(Path(scratch) / ("" if adapter_name == "default" else adapter_name))
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key if key.startswith(_PREFIX) else _PREFIX + key: tensor for key, tensor in tensors.items()}
    config = {**known[adapter_name].to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}, tensors


def _load_with_peft(
    model: Any, directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapter_name: str
) -> None:
    """Fill one of peft's adapters from a file; a `PeftModel` that has no adapter of this name gets it."""
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict

    known = getattr(model, "peft_config", {})
    if adapter_name not in known:
        if not isinstance(model, PeftModel):
            raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(known) or 'none'}")
        try:
            model.load_adapter(str(directory), adapter_name, is_trainable=True)
        except Exception as error:
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            raise ValueError(f"{directory} does not fit the model: {error}") from error
        return
    _, expected = _peft_adapter(model, adapter_name)
    for key in sorted(tensors.keys() ^ expected.keys()):
        where = "is in the file, but not in the model" if key in tensors else "is missing from the file"
        raise ValueError(f"{key} {where}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} has shape {list(tensor.shape)} in the file, {list(expected[key].shape)} in the model"
            )
    mine = known[adapter_name].to_dict()
    for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if (config.get(option) or 0) != (mine.get(option) or 0):
            raise ValueError(
                f"{option} is {config.get(option)!r} in the file, {mine.get(option)!r} in the model: load it under "
                "another adapter_name"
            )
    given = (
        tensors
        if isinstance(model, PeftModel)
        else {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    )
    set_peft_model_state_dict(model, given, adapter_name=adapter_name)


@contextlib.contextmanager
def _moved_into(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place when all went well, and vanishes otherwise."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(scratch)
        with open(scratch, "rb") as file:  # noqa: PTH123
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)  # noqa: PTH101
        os.replace(scratch, path)  # noqa: PTH105
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)  # noqa: PTH108
