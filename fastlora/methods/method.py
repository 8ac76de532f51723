"""What every method of fine-tuning answers, so that a training loop need not know which one it runs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from fastlora.memory.shape import ModelShape


class Method(ABC):
    """A method with its options.

    Attributes:
        name: as in a recipe.
        files: what `save` writes; a folder without one of them is not whole.
        virtual_tokens: positions that a forward pass of the model has more than its input, in front.
    """

    name: str
    files: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors")
    virtual_tokens = 0

    @abstractmethod
    def attach(self, model: Any) -> None:
        """Add what is trained, and freeze the rest. Nothing is changed if it cannot be.

        Raises:
            ValueError: the model cannot take this method; the message says why.
        """

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained; the files of an earlier save are replaced whole or not at all.

        Raises:
            OSError: they cannot be written.
        """

    @abstractmethod
    def load(self, model: Any, folder: Path) -> None:
        """Set what is trained to what `save`, or peft where it has the method, has written.

        Raises:
            ValueError: a file is missing or damaged, or does not fit the model, which is unchanged.
        """

    @abstractmethod
    def memory(self, shape: ModelShape) -> int:
        """How many values are trained in a model of this shape."""

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in model.parameters() if p.requires_grad]

    def merge(self, model: Any) -> None:
        """Put what was trained into the model's own weights, so that nothing is added to its forward pass.

        Raises:
            ValueError: the method has no such form.
        """
        raise ValueError(f"{self.name}: what it trains is no change of a weight, so it cannot be merged")
