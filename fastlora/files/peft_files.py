"""The two files of a saved adapter, read with checks; and adapters of peft's own layers, by peft's code."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.layers.sharded import is_sharded, whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


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
        raise ValueError(f"{config_path} is not a JSON object")
    try:
        with safe_open(weights_path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights_path} is truncated or not a safetensors file: {error}") from error
    return config, tensors


def peft_adapter(model: Any, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one of peft's adapters, as peft's `save_pretrained` writes them."""
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict

    known = getattr(model, "peft_config", {})
    if adapter_name not in known:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {sorted(known) or 'none'}")
    if isinstance(model, PeftModel):
        state = _gathered(model, adapter_name) if is_sharded(model) else None
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, selected_adapters=[adapter_name], state_dict=state)
            return read_adapter(Path(scratch) / ("" if adapter_name == "default" else adapter_name))
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in tensors.items()}
    config = {**known[adapter_name].to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}, tensors


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
            raise ValueError(f"{directory} does not fit the model: {error}") from error
        return
    _, expected = peft_adapter(model, adapter_name)
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
        else {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    )
    set_peft_model_state_dict(model, given, adapter_name=adapter_name)
