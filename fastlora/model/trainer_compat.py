"""What transformers' Trainer checks before it takes a model, made true for models with fastlora's adapters.

Trainer refuses a quantized model unless it carries peft's adapters, or its quantizer says that the quantized model can
be trained. Trainer does not know the adapters that `replace_linear` puts into a model loaded by bitsandbytes, so the
model's quantizer is made to say so. It stays the same in everything else, pickled and copied too.
"""

import functools
from typing import Any

from torch import nn

from fastlora.layers.bases import is_linear4bit
from fastlora.layers.nf4_linear import NF4Linear


def admit_training(model: nn.Module) -> None:
    """Let transformers' Trainer take the adapted model."""
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
            kind: Any = type(quantizer)
            quantizer.__class__ = _trainable(kind)


def let_inputs_require_grad(model: Any) -> None:
    """Make inputs require grad under checkpointing: its reentrant kind cuts the graph after a frozen embedding."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    if checkpointing and hasattr(model, "enable_input_require_grads") and not hasattr(model, "_require_grads_hook"):
        model.enable_input_require_grads()


def forget_quantization(model: Any) -> None:
    """Remove the quantization from the config of a model without a quantized layer, so that it can be saved."""
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is None or any(isinstance(m, NF4Linear) or is_linear4bit(m) for m in module.modules()):
            continue
        quantizer.remove_quantization_config(module)
        if "is_loaded_in_4bit" in vars(module):
            module.is_loaded_in_4bit = False  # type: ignore[assignment]


@functools.cache
def _trainable(kind: Any) -> type:
    """A subclass of a quantizer's class that says that its models can be trained."""

    def reduce(self: Any, _protocol: object) -> tuple[Any, ...]:
        return _rebuild, (kind, vars(self))

    names = {"is_qat_trainable": True, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)


def _rebuild(kind: type, state: dict[str, Any]) -> Any:
    quantizer: Any = object.__new__(_trainable(kind))
    vars(quantizer).update(state)
    return quantizer
