"""The two files of a saved adapter, read and written with checks; and adapters of peft's own layers, by peft's code."""

import errno
import json
import math
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlora.files.atomic import moved_into
from fastlora.files.config import lora_config
from fastlora.layers.quoted import reason, shown
from fastlora.layers.sharded import is_sharded, whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LONGEST_KEY = 500


def read_adapter(directory: Path, weights: str = WEIGHTS_NAME) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a saved adapter. weights: the name of their file.

    Raises:
        ValueError: a file is missing or cannot be read, or a tensor holds NaN or inf.
    """
    config_path, weights_path = directory / CONFIG_NAME, directory / weights
    for path in (config_path, weights_path):
        if not path.is_file():
            pickled = path == weights_path and weights == WEIGHTS_NAME and (directory / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is a pickle, which is not read: convert it to safetensors" if pickled else ""
            raise ValueError(f"{path} does not exist{hint}")
    config, tensors = _read(config_path, weights_path)
    for key, tensor in tensors.items():
        if len(key) > _LONGEST_KEY or not key.isprintable():
            raise ValueError(f"{weights_path}: {shown(key)} is no name of a tensor: the file is damaged")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            raise ValueError(
                f"{weights_path}: {key} holds NaN or inf, so the run that wrote it had diverged: take an earlier "
                "checkpoint"
            )
    return config, tensors


def _read(config_path: Path, weights_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of both files.

    Raises:
        ValueError: one cannot be read.
    """
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_path} is not JSON ({reason(error)})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} is not a JSON object")
    try:
        with safe_open(weights_path, framework="pt") as file:
            return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights_path} is truncated or not a safetensors file ({reason(error)})") from error


def write_adapter(
    directory: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], weights: str = WEIGHTS_NAME
) -> None:
    """Write both files, read them again, and put them in place only if they hold what was to be written.

    Args:
        directory: created if missing. tensors: contiguous, on the CPU, each in memory of its own.
        weights: the name of the tensors' file.
    Raises:
        OSError: the files cannot be written, or hold something else. Those that were there are there still.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    with (
        moved_into(directory / CONFIG_NAME) as config_path,
        moved_into(directory / weights) as weights_path,
    ):
        config_path.write_text(text, encoding="utf-8")
        save_file(tensors, weights_path, metadata={"format": "pt"})
        try:
            config_again, tensors_again = _read(config_path, weights_path)
            same = config_again == json.loads(text) and tensors_again.keys() == tensors.keys()
            same = same and all(_same(tensors_again[key], tensor) for key, tensor in tensors.items())
        except ValueError as error:
            raise OSError(errno.EIO, f"what was written cannot be read ({error})", str(directory)) from error
        if not same:
            raise OSError(errno.EIO, "the disk gives back something else than was written", str(directory))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def peft_adapter(model: Any, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one of peft's adapters, as peft's `save_pretrained` writes them.

    What peft leaves out or forgets is put right: tensors of layers in whose name another adapter's name stands, and the
    ranks and scalings of an adapter that was swapped in place.
    """
    config, tensors = _by_peft(model, adapter_name)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = _lora_tensors(base, adapter_name) | tensors
    return _true_config(base, config, adapter_name), tensors


def _by_peft(model: Any, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict

    known = getattr(model, "peft_config", {})
    if adapter_name not in known:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(known) or 'none'}")
    if isinstance(model, PeftModel):
        state = _gathered(model, adapter_name) if is_sharded(model) else None
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, selected_adapters=[adapter_name], state_dict=state)
            written = Path(scratch) / ("" if adapter_name == "default" else adapter_name)
            return _read(written / CONFIG_NAME, written / WEIGHTS_NAME)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in tensors.items()}
    config = {**known[adapter_name].to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}, tensors


def _lora_layers(base: Any, adapter_name: str) -> dict[str, Any]:
    """The layers of peft's on which this adapter is, by name; of nested ones, which share a module, none."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and adapter_name in module.scaling
    }


def _lora_tensors(base: Any, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, from its layers."""
    found = {}
    for name, layer in _lora_layers(base, adapter_name).items():
        for part in layer.adapter_layer_names:
            for key, value in getattr(layer, part).state_dict().items():
                if key == adapter_name or key.startswith(f"{adapter_name}."):
                    end = "" if part == "lora_magnitude_vector" else key.removeprefix(adapter_name)
                    found[f"{PREFIX}{name}.{part}{end}"] = value
    return found


def _true_config(base: Any, config: dict[str, Any], adapter_name: str) -> dict[str, Any]:
    """The config, with the ranks and scalings that the layers have now if these are not those that it means."""
    ranks, alphas, rslora = {}, {}, bool(config.get("use_rslora"))
    for name, layer in _lora_layers(base, adapter_name).items():
        if adapter_name not in layer.lora_A:
            return config  # adapters on embeddings only
        rank = layer.lora_A[adapter_name].weight.shape[0]
        ranks[name], alphas[name] = rank, float(layer.scaling[adapter_name]) * (rank**0.5 if rslora else rank)
    if not ranks or config.get("peft_type") != "LORA":
        return config
    for name, rank in ranks.items():
        alpha = meant(config, "lora_alpha", name)
        if meant(config, "r", name) != rank or not math.isclose(alpha, alphas[name], rel_tol=1e-5):
            break
    else:
        return config
    true = lora_config(ranks, {name: round(alpha, 9) for name, alpha in alphas.items()})
    return config | {key: true[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}


def meant(config: Mapping[str, Any], option: str, name: str) -> Any:
    """r or lora_alpha of one layer by peft's rule: the first pattern that fits the name or its end, else the option."""
    patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[option]) or {}
    fits = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    return next(fits, config[option])


def _gathered(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """What peft saves of a sharded model's state dict, gathered: the adapter, and the biases and embeddings it adds."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `save_pretrained` gives the same warnings
        saved = {id(value) for value in get_peft_model_state_dict(model, state, adapter_name).values()}
    return {key: whole(value) for key, value in state.items() if id(value) in saved or f".{adapter_name}" in key}


def load_with_peft(
    model: Any, directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], adapter_name: str
) -> None:
    """Fill one of peft's adapters from a file; a `PeftModel` without an adapter of this name gets one.

    Raises:
        ValueError: the file does not fit the model, or means other settings than the model's. Nothing is changed.
    """
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
            raise ValueError(f"{directory} does not fit the model ({reason(error)})") from error
        return
    if problems := differences(model, tensors, adapter_name):
        raise ValueError(problems[0])
    mine = known[adapter_name].to_dict()
    for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if (config.get(option) or 0) != (mine.get(option) or 0):
            raise ValueError(
                f"{option} is {shown(config.get(option))} in the file, {shown(mine.get(option))} in the model: load it "
                "under another adapter_name"
            )
    given = (
        tensors
        if isinstance(model, PeftModel)
        else {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    )
    set_peft_model_state_dict(model, given, adapter_name=adapter_name)


def differences(model: Any, tensors: Mapping[str, Tensor], adapter_name: str) -> list[str]:
    """In which keys and shapes a file differs from what would be saved of an adapter of peft's; empty where in none.

    Weights of the base, which peft saves with some adapters, may be there or not.
    """
    _, expected = peft_adapter(model, adapter_name)
    layers = set(_lora_layers(model.get_base_model() if hasattr(model, "get_base_model") else model, adapter_name))
    optional = {f"{PREFIX}{name}.base_layer.weight" for name in layers}
    found = []
    for key in sorted(tensors.keys() ^ expected.keys()):
        if key not in optional:
            where = "is in the file, but not in the model" if key in tensors else "is missing from the file"
            found.append(f"{key} {where}")
    for key, tensor in tensors.items():
        if key in expected and tensor.shape != expected[key].shape:
            found.append(f"{key} has shape {list(tensor.shape)} in the file, {list(expected[key].shape)} in the model")
    return found
