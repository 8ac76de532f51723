"""A base that is bitsandbytes' `Linear4bit`: read where it lies, in the dtype in which that layer computes."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.ops.nf4 import NF4Weight


class AdoptedWeight:
    """The NF4 view of a `Linear4bit`'s weight, made once and kept for as long as the weight is the same.

    A copy or a pickle of it starts empty: the copied layer has its own memory.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._view: NF4Weight | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdoptedWeight":
        return AdoptedWeight()

    def __reduce__(self) -> tuple[type["AdoptedWeight"], tuple[()]]:
        return AdoptedWeight, ()

    def of(self, linear4bit: nn.Module) -> NF4Weight:
        """The view of this layer's weight.

        Raises:
            ValueError: not quantized yet, fp4, or repacked by bitsandbytes for CPU inference.
        """
        weight: Any = linear4bit.weight
        if torch.compiler.is_compiling():  # kept, it would be a guard that fails at the second call
            return NF4Weight.from_bnb(weight)
        state = getattr(weight, "quant_state", None)
        view = self._view
        if (
            view is not None
            and self._weight is weight
            and state is not None
            and view.absmax is state.absmax
            and not getattr(state, "packing_format_for_cpu", False)
        ):
            return view
        with torch.inference_mode(False):  # training may need it later
            self._weight, self._view = weight, NF4Weight.from_bnb(weight)
        return self._view

    def forget(self) -> None:
        """Let go of the memory, as when the layer moves to another device."""
        self._weight = self._view = None


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' `Linear4bit` itself or one of its two named forms."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and type(module) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)


def compute_dtype(linear4bit: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a `Linear4bit` computes for this input: its `compute_dtype`, else, at first, that of x."""
    if not linear4bit.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype
    return linear4bit.compute_dtype or x.dtype
