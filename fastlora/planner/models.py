"""A model's shape from what a user has: a folder, a name, or a number of parameters."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from fastlora.memory.known import CONFIGS, known_config
from fastlora.memory.shape import ModelShape, shape_of


class Named(NamedTuple):
    """A shape and where it is from, in words."""

    name: str
    shape: ModelShape
    source: str


def resolve(model: str, params: str | None = None) -> Named:
    """The shape of a model.

    Looked for in this order: a folder with config.json, a config that Hugging Face's cache holds, the table of known
    models, the hub.

    Args:
        params: instead of a model: a number such as 7B, for a shape in Llama's proportions.

    Raises:
        ValueError: there is no config, or it describes a model whose shape is not known.
    """
    if params:
        return _of_size(params)
    folder = Path(model)
    if folder.is_dir():
        return _read(model, folder / "config.json", "its config.json")
    if cached := _cached(model):
        return _read(model, cached, "its config.json in Hugging Face's cache")
    if config := known_config(model):
        known = next(name for name, each in CONFIGS.items() if each is config)
        return Named(model, shape_of(config), f"the table of known models, {known}")
    return _read(model, _downloaded(model), "its config.json from the hub")


def _read(model: str, path: Path, source: str) -> Named:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}. A folder of a model has a config.json") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object")
    return Named(model, shape_of(config), source)


def _cached(model: str) -> Path | None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else None


def _downloaded(model: str) -> Path:
    known = ", ".join(CONFIGS)
    missing = f"{model}: no folder, not in Hugging Face's cache, and no known model ({known})"
    if "/" not in model:
        raise ValueError(missing)
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json", etag_timeout=5))
    except Exception as error:  # the hub's many errors: offline, gated, no such repository
        said = str(error).strip().splitlines()
        raise ValueError(f"{missing}; the hub: {said[0] if said else type(error).__name__}") from error


def _of_size(params: str) -> Named:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bm])", params.strip().lower())
    if not found or float(found[1]) == 0:
        raise ValueError(f"params: expected a number such as 7B or 350M, not {params!r}")
    wanted = float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]]
    shapes = [_proportioned(layers, hidden) for layers in range(8, 132, 2) for hidden in range(512, 20481, 128)
              if 64 <= hidden / layers <= 160]  # fmt: skip
    nearest = min(shapes, key=lambda shape: abs(shape.parameters / wanted - 1))
    return Named(
        params, nearest, f"a shape in Llama's proportions with {nearest.parameters / 1e9:.2f} billion parameters"
    )


def _proportioned(layers: int, hidden: int) -> ModelShape:
    inner = -(-8 * hidden // 3 // 256) * 256
    return shape_of(
        {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128, "vocab_size": 32000, "head_dim": 128,
        }
    )  # fmt: skip
