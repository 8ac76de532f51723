"""Houlsby adapters: x + up(gelu(down(x))) after attention and after the MLP of every block. Source: arXiv:1902.00751.

Files are AdapterHub's: `adapters` 1.3.0 (transformers 4.57) gave a Llama with a file of ours bit for bit the same
logits, and the other way round.

`up` starts at zero, so that a new adapter changes nothing; the source starts near zero. Each adapter is inside the
residual branch: it changes what the branch adds.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora.memory.adapters as counts
from fastlora.adapters.config import base_name
from fastlora.files.peft_files import read_adapter, write_adapter
from fastlora.memory.shape import ModelShape
from fastlora.methods.method import Method
from fastlora.model.sites import blocks

NAME, WEIGHTS = "default", "adapter.safetensors"  # of an adapter; AdapterHub's file
_LAYERS = {"down": "adapter_down.0", "up": "adapter_up"}  # AdapterHub's names of the two linears
_BOTTLENECK = {  # AdapterHub's `DoubleSeqBnConfig`; what is left out has its default
    "adapter_residual_before_ln": False,
    "dropout": 0.0,
    "is_parallel": False,
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "non_linearity": "gelu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "residual_before_ln": True,
    "scaling": 1.0,
}
_BRANCHES = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "output": ("mlp", "feed_forward", "block_sparse_moe"),
}


class Adapter(nn.Module):
    """x [..., hidden] -> x + up(gelu(down(x))), computed in fp32 or under autocast, in the dtype of x."""

    def __init__(self, hidden: int, bottleneck: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck, device=device)
        self.up = nn.Linear(bottleneck, hidden, device=device)
        nn.init.normal_(self.down.weight, std=1e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden]."""
        inner = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        return x + self.up(F.gelu(self.down(inner))).to(x.dtype)


class Houlsby(Method):
    """Bottlenecks after attention and after the MLP.

    Args:
        bottleneck: features inside.
    """

    name = "houlsby"
    files = ("adapter_config.json", WEIGHTS)

    def __init__(self, bottleneck: int = 64) -> None:
        if bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, not {bottleneck}")
        self.bottleneck = bottleneck

    def attach(self, model: Any) -> None:
        """Freeze the model and add two adapters to each block."""
        found = blocks(model)
        if not found:
            raise ValueError(f"houlsby: a {type(model).__name__} has no list of blocks that is known")
        if hasattr(found[0], "houlsby"):
            raise ValueError("houlsby: the model has such adapters already")
        places = [self._places(block) for block in found]
        hidden = model.config.get_text_config().hidden_size
        model.requires_grad_(False)
        for block, branches in zip(found, places, strict=True):
            device = next(block.parameters()).device
            block.houlsby = nn.ModuleDict({name: Adapter(hidden, self.bottleneck, device) for name in branches})
            for name, branch in branches.items():
                branch.register_forward_hook(_after(block.houlsby[name]))

    def _places(self, block: nn.Module) -> dict[str, nn.Module]:
        found = {}
        for name, known in _BRANCHES.items():
            branch = next(
                (getattr(block, each) for each in known if isinstance(getattr(block, each, None), nn.Module)), None
            )
            if branch is None:
                raise ValueError(f"houlsby: a {type(block).__name__} has no part named {' or '.join(known)}")
            found[name] = branch
        return found

    def _tensors(self, model: Any) -> dict[str, Tensor]:
        """What is trained, by AdapterHub's names."""
        found = {}
        for name, p in model.named_parameters():
            block, inside, rest = name.partition(".houlsby.")
            if inside:
                branch, layer, kind = rest.split(".")
                found[f"{block}.{branch}_adapters.adapters.{NAME}.{_LAYERS[layer]}.{kind}"] = p
        return found

    def config(self, model: Any) -> dict[str, Any]:
        """adapter_config.json, as AdapterHub's `adapters` has it for its `DoubleSeqBnConfig`."""
        text = model.config.get_text_config()
        inside = _BOTTLENECK | {"reduction_factor": text.hidden_size / self.bottleneck}
        return {
            "config": inside,
            "hidden_size": text.hidden_size,
            "model_class": (model.config.architectures or [type(model).__name__])[0],
            "model_name": base_name(model),
            "model_type": model.config.model_type,
            "name": NAME,
            "version": "adapters.1.3.0",
        }

    def save(self, model: Any, folder: Path) -> None:
        """In AdapterHub's format, which `adapters` reads into models of the Llama shape."""
        own = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self._tensors(model).items()}
        write_adapter(folder, self.config(model), own, WEIGHTS)

    def load(self, model: Any, folder: Path) -> None:
        """From AdapterHub's format."""
        config, tensors = read_adapter(folder, WEIGHTS)
        held = config.get("config")
        if not isinstance(held, dict) or not held.get("mh_adapter") or not held.get("output_adapter"):
            raise ValueError(f"{folder}: it holds no adapters after attention and after the MLP")
        if held.get("non_linearity") != "gelu":
            raise ValueError(f"{folder}: its adapters have {held.get('non_linearity')} inside, and these have gelu")
        given = f".adapters.{config.get('name', NAME)}."
        tensors = {name.replace(given, f".adapters.{NAME}."): t for name, t in tensors.items()}
        own = self._tensors(model)
        for name in sorted(own.keys() | tensors.keys()):
            if name not in own or name not in tensors:
                raise ValueError(f"{folder}: {name} is only in the {'file' if name in tensors else 'model'}")
            if own[name].shape != tensors[name].shape:
                shapes = list(tensors[name].shape), list(own[name].shape)
                raise ValueError(f"{folder}: {name} is {shapes[0]}, and the model needs {shapes[1]}")
        for name, p in own.items():
            p.data.copy_(tensors[name])

    def memory(self, shape: ModelShape) -> int:
        """Two adapters of 2 hidden b + b + hidden a layer."""
        return counts.houlsby(shape, self.bottleneck)


def _after(adapter: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (adapter(output[0]), *output[1:])
        return adapter(output)

    return hook
