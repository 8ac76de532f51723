"""What a LoRA layer goes over: `nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' `Linear4bit`.

`Conv1D` is y = x W + b with W [K, N], the transpose of what others store: its weight is read as a view [N, K]. A
`Linear4bit` is adopted: its memory is read in place, in the dtype in which that layer computes. Nothing is copied, and
every layer keeps its parameters and their names.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.ops.nf4 import NF4Weight


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' `Conv1D` itself."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and type(module) is utils.Conv1D


def is_dense(module: Any) -> bool:
    """Whether a module is a linear layer with an unquantized weight: `nn.Linear` itself or `Conv1D` itself."""
    return type(module) is nn.Linear or is_conv1d(module)


def dense_weight(module: Any) -> Tensor:
    """The weight [N, K] of a layer that `is_dense`; of a `Conv1D` a transposed view."""
    weight: Tensor = module._parameters["weight"]
    return weight if type(module) is nn.Linear else weight.t()


def as_linear(conv: Any) -> nn.Linear:
    """An `nn.Linear` with a copy of a `Conv1D`'s weight, [N, K] contiguous, and its bias, shared."""
    k, n = conv.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear.train(conv.training)


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """A `Conv1D` with an `nn.Linear`'s weight, transposed, and its bias or zeros."""
    from transformers.pytorch_utils import Conv1D

    n, k = linear.weight.shape
    with torch.device("meta"):
        conv = Conv1D(n, k)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    conv.bias = linear.bias if linear.bias is not None else nn.Parameter(linear.weight.new_zeros(n), False)
    return conv.train(linear.training)


def plain_layer(weight: Tensor, bias: Tensor | None, training: bool, transposed: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D`, over these tensors; a bias in another dtype is cast to the weight's."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(bias, nn.Parameter) and bias.dtype == weight.dtype:
        linear.bias = bias
    elif bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    linear.train(training)
    return as_conv1d(linear) if transposed else linear


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
