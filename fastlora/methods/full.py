"""Full fine-tuning: every parameter is trained, and a whole model is saved, in Hugging Face's layout."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastlora.files import atomic
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.layers.quoted import reason
from fastlora.memory.shape import ModelShape
from fastlora.methods.method import Method

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


class Full(Method):
    """Training of every parameter, in the dtype that the model has."""

    name = "full"
    files = (CONFIG, WEIGHTS)

    def attach(self, model: Any) -> None:
        """Every floating-point parameter gets a gradient."""
        held = [name for name, p in model.named_parameters() if not p.is_floating_point()]
        held += [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
        if held:
            raise ValueError(
                f"full: {held[0]} is quantized, and what is quantized cannot be trained: load the model without"
            )
        model.requires_grad_(True)

    def save(self, model: Any, folder: Path) -> None:
        """Write config.json and model.safetensors, one file whatever its size, elsewhere, and move them into place."""
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".model-"))
        try:
            with atomic.named(folder / WEIGHTS):
                model.save_pretrained(scratch, max_shard_size="1000TB")
                for path in sorted(scratch.iterdir(), key=lambda path: path.name == CONFIG):  # config.json last
                    atomic.sync(path)
                    path.replace(folder / path.name)
                atomic.sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def load(self, model: Any, folder: Path) -> None:
        """Read model.safetensors into the model, tensor by tensor, once all names and shapes are found to fit."""
        from safetensors import safe_open

        path = folder / WEIGHTS
        own = model.state_dict(keep_vars=True)
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                there = {p.data_ptr() for name, p in own.items() if name in keys}
                missing = sorted(name for name, p in own.items() if name not in keys and p.data_ptr() not in there)
                if missing or keys - own.keys():
                    name = (missing or sorted(keys - own.keys()))[0]
                    raise ValueError(
                        f"{path}: {name} is only in {'the model' if missing else 'the file'}: another model's file"
                    )
                for name in keys:
                    if file.get_slice(name).get_shape() != list(own[name].shape):
                        raise ValueError(f"{path}: {name} has another shape than the model's")
                for name in keys:
                    own[name].data.copy_(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing, truncated or not a safetensors file ({reason(error)})") from error

    def merge(self, model: Any) -> None:
        """Nothing: what was trained are the model's own weights."""

    def memory(self, shape: ModelShape) -> int:
        """Every parameter."""
        return shape.parameters
