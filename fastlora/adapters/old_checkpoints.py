"""Whole models saved under the names of adapted layers, turned into adapters.

Before `save_pretrained` and Trainer wrote adapters for models from `replace_linear`, they wrote such files, which
`from_pretrained` cannot read: `<layer>.base_layer.weight`, `<layer>.lora_A.default.weight` and so on.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.files.config import lora_config, target_names
from fastlora.files.peft_files import PREFIX, write_adapter
from fastlora.layers import starts
from fastlora.model import trained_tokens
from fastlora.model.names import means
from fastlora.model.settings import LoRASettings, settings_from_config

_PART = re.compile(r"(?P<layer>.+)\.(lora_(?P<part>[AB])\.(?P<name>[^.]+)\.weight|taken_out\.[^.]+\.(?P<start>[AB]))")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def extract_adapter(
    checkpoint: str | os.PathLike[str], directory: str | os.PathLike[str], config: Any = None, **options: Any
) -> None:
    """Write an adapter in peft's format from a whole model that was saved with fastlora's layers in it.

    Args:
        checkpoint: a folder with `model.safetensors`, or its shards, as Trainer wrote it for a model from
            `replace_linear`.
        directory: where to write `adapter_config.json` and `adapter_model.safetensors`.
        config, options: those that `replace_linear` was given for the training: the file does not say what lora_alpha,
            use_rslora, alpha_pattern, modules_to_save and trainable_token_indices were. base_model_name_or_path is
            written into the config.
    Raises:
        ValueError: no such file, no adapters in it, an unknown option, or what the options name is not in it.
    """
    known = [option.name for option in fields(LoRASettings)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"extract_adapter has no option {unknown[0]!r}; it takes those of LoRA in replace_linear")
    settings = LoRASettings(**options) if config is None else settings_from_config(config)
    tensors = _whole(Path(checkpoint))
    pairs: dict[str, dict[str, Tensor]] = {}
    started: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _PART.fullmatch(key)
        if found and found["part"]:
            pairs.setdefault(found["layer"], {})[found["part"]] = tensor
        elif found:
            started.setdefault(found["layer"], {})[found["start"]] = tensor
    stacks = [key for key in tensors if ".lora_A." in key and not _PART.fullmatch(key)]
    if stacks:
        raise ValueError(f"{stacks[0]}: an adapter on a stack of experts, which extract_adapter does not read")
    broken = [name for name, pair in pairs.items() if len(pair) == 1]
    if not pairs or broken:
        what = f"only half an adapter on {broken[0]}" if broken else "no adapters of fastlora's"
        raise ValueError(f"{checkpoint} holds {what}")
    ranks, alphas = {}, {}
    saved: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        a, b, (_, alpha) = pair["A"], pair["B"], settings.rank_and_alpha(name)
        r, widen = a.shape[0], 2 if name in started else 1
        if name in started:
            scaling = alpha / r**0.5 if settings.use_rslora else alpha / r
            a, b = starts.standalone((a, b), (started[name]["A"], started[name]["B"]), scaling)
        ranks[name], alphas[name] = a.shape[0], alpha * (widen**0.5 if settings.use_rslora else widen)
        saved |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    trained, rows = _modules(tensors, settings), _rows(tensors, settings)
    saved |= trained | {f"{name}.{trained_tokens.KEY}": tensors[f"{name}.trained_rows"] for name in rows}
    modules = {key[:end] for key in tensors for end in range(len(key)) if key[end] == "."}
    written = lora_config(
        ranks,
        alphas,
        task_type=settings.task_type,
        base_model_name_or_path=settings.base_model_name_or_path,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=target_names(modules, pairs.keys()),
        modules_to_save=sorted({name.rpartition(".")[0] for name in trained}) or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=bool(trained) and _is_tied(Path(checkpoint)),
    )
    write_adapter(Path(directory), written, {f"{PREFIX}{key}": value.contiguous() for key, value in saved.items()})


def _whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved model.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    names = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / _INDEX} is not an index of shards: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def _modules(tensors: Mapping[str, Tensor], settings: LoRASettings) -> dict[str, Tensor]:
    """The tensors of the modules that were trained in full."""
    found: dict[str, Tensor] = {}
    for entry in settings.modules_to_save or ():
        mine = {
            key: value
            for key, value in tensors.items()
            if not _PART.fullmatch(key) and any(key[:end].endswith(entry) for end in range(len(key)) if key[end] == ".")
        }
        if not mine:
            raise ValueError(
                f"modules_to_save: {entry!r} is not in the file; if its weight was tied, name the other one"
            )
        found |= mine
    return found


def _is_tied(folder: Path) -> bool:
    """Whether the model ties its embedding and its output head, by its config."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return False


def _rows(tensors: Mapping[str, Tensor], settings: LoRASettings) -> dict[str, list[int]]:
    """{module: its trained tokens}."""
    names = [key.removesuffix(".trained_rows") for key in tensors if key.endswith(".trained_rows")]
    wanted = settings.trainable_token_indices
    if names and not wanted:
        raise ValueError(f"{names[0]} has trained tokens: say which in trainable_token_indices")
    if not isinstance(wanted, Mapping):
        wanted = dict.fromkeys(names[:1], wanted or ())
    found = {}
    for entry, indices in wanted.items():
        name = next((name for name in names if means(entry, name)), None)
        if name is None or len(indices) != len(tensors[f"{name}.trained_rows"]):
            raise ValueError(f"trainable_token_indices: the file has no {len(indices)} trained rows for {entry!r}")
        found[name] = list(indices)
    return found
