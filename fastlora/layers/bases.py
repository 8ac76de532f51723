"""What is under a LoRA layer: a dense layer, an `NF4Linear`, or bitsandbytes' `Linear4bit`.

On the way of x, `frozen` is the only place that distinguishes them: for any base it returns the x to multiply, a weight
(a dense tensor or an `NF4Weight`), a bias, and the dtype of the result.

A `Linear4bit` is adopted: its memory is read in place, in the dtype in which that layer computes.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.kernels.operands import FLOAT_DTYPES
from fastlora.layers.dense import dense_weight, is_conv1d, is_dense, parameter
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.ops.linear import computed_by
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
        weight: Any = parameter(linear4bit, "weight")
        if torch.compiler.is_compiling():  # keeping it would add a guard that fails at the second call
            return NF4Weight.from_bnb(weight)
        if (view := self.known(weight)) is not None:
            return view
        with torch.inference_mode(False):  # training may need it later
            self._weight, self._view = weight, NF4Weight.from_bnb(weight)
        return self._view

    def known(self, weight: Any) -> NF4Weight | None:
        """The view, if it is of this weight in its present state."""
        view = self._view
        if view is None or self._weight is not weight:
            return None
        state = getattr(weight, "quant_state", None)
        if state is None or view.absmax is not state.absmax or getattr(state, "packing_format_for_cpu", False):
            return None
        return view

    def forget(self) -> None:
        """Release the memory, for instance when the layer moves to another device."""
        self._weight = self._view = None


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' `Linear4bit` itself, `LinearNF4` or `LinearFP4`."""
    return type(module) in _linear4bit_types()


def _linear4bit_types() -> tuple[type, ...]:
    global _known_types
    if not _known_types and (bnb := sys.modules.get("bitsandbytes")) is not None:
        _known_types = bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4
    return _known_types


_known_types: tuple[type, ...] = ()  # of bitsandbytes, once it has been imported


def compute_dtype(linear4bit: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a `Linear4bit` computes for this input: its `compute_dtype`, or x's before that is set."""
    if not linear4bit.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype
    return linear4bit.compute_dtype or x.dtype


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but the class's own forward runs when the module is called."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def frozen(
    base: Any, x: Tensor, adopted: AdoptedWeight
) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None, torch.dtype | None]:
    """(x to multiply, weight [N, K], bias [N], dtype of the result or None for that of the product).

    Args:
        base: a layer of one of the three kinds. adopted: the view kept of a `Linear4bit`'s weight.
    """
    if is_dense(base):
        return x, dense_weight(base), parameter(base, "bias"), None
    if type(base) is NF4Linear:
        return x, base.weight, base.bias_for(x), None
    weight, dtype, bias = adopted.of(base), compute_dtype(base, x), parameter(base, "bias")
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    return x if x.dtype is dtype else x.to(dtype), weight, bias, x.dtype


def base_weight(base: Any, adopted: AdoptedWeight | None = None) -> Tensor | NF4Weight:
    """The weight [N, K] of a base of any of the three kinds.

    Raises:
        ValueError: a layer of another kind, or a `Linear4bit` whose weight cannot be read.
    """
    if is_dense(base):
        return dense_weight(base)
    if isinstance(base, NF4Linear):
        return base.weight
    if is_linear4bit(base):
        return (adopted or AdoptedWeight()).of(base)
    raise ValueError(
        f"a LoRALinear wraps nn.Linear, Conv1D, NF4Linear or bitsandbytes' Linear4bit, not {type(base).__name__}"
    )


def computed_over(base: Any, shape: tuple[int, int], r: int, quantize: bool = False) -> tuple[str, str]:
    """The paths that compute a linear over this base, and how, by the number of tokens; "" for how over a `Conv1D`.

    shape: (N, K). quantize: whether the base is about to become NF4.
    """
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    dtype = weight.dtype if weight.dtype in FLOAT_DTYPES else getattr(base, "compute_dtype", None) or torch.bfloat16
    blocksize = weight.blocksize if isinstance(weight, NF4Weight) else state.blocksize if state is not None else 0
    if blocksize == 0 and not quantize and is_conv1d(base):  # a transposed view, which linear_cpu_bf16 does not take
        return computed_by(*shape, r, 0, torch.float32, weight.device)[0], ""
    return computed_by(*shape, r, blocksize or (64 if quantize else 0), dtype, weight.device)


def check_adapter_dtype(dtype: torch.dtype | None, weight: Tensor | NF4Weight) -> None:
    """Raise ValueError where adapters of this dtype cannot go with this base weight."""
    if dtype is None or dtype == torch.float32:
        return
    allowed = FLOAT_DTYPES if isinstance(weight, NF4Weight) else dict.fromkeys((torch.float32, weight.dtype))
    if dtype not in allowed:
        raise ValueError(f"adapter_dtype must be {' or '.join(map(str, allowed))} with this base; got {dtype}")
