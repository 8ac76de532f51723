"""LoRA and its relatives: QLoRA (`quantize`), rsLoRA, PiSSA, OLoRA, LoftQ and EVA are options of `replace_linear`."""

from pathlib import Path
from typing import Any

import fastlora.memory.adapters as counts
from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.memory.shape import ModelShape
from fastlora.methods.method import Method
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear


class LoRA(Method):
    """Low-rank adapters of linears.

    Args:
        options: of `fastlora.replace_linear`.
    Source: arXiv:2106.09685.
    """

    name = "lora"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def attach(self, model: Any) -> None:
        """As `fastlora.replace_linear`."""
        replace_linear(model, **self.options)

    def save(self, model: Any, folder: Path) -> None:
        """As `fastlora.save_adapter`."""
        save_adapter(model, folder)

    def load(self, model: Any, folder: Path) -> None:
        """As `fastlora.load_adapter`."""
        load_adapter(model, folder)

    def merge(self, model: Any) -> None:
        """As `fastlora.merge`."""
        merge(model)

    def memory(self, shape: ModelShape) -> int:
        """r (n + k) a linear [n, k]. `target_modules` that is an expression counts as all linears."""
        targets = self.options.get("target_modules", "all-linear")
        names = tuple(targets) if isinstance(targets, list | tuple) else "all-linear"
        return counts.lora(shape, int(self.options.get("r", 16)), names)
