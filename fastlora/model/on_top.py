"""A model with fastlora's adapters refuses peft's before peft changes anything.

Each of peft's tuners that puts something into layers looks for a dict `peft_config` on the model it is given, and
writes its config there before it touches a module. An adapted model, and each of its parts with an adapted layer,
carries one that refuses. transformers' `add_adapter` and `load_adapter` mark the model before they call peft, so they
refuse by themselves. Methods that only put virtual tokens before the input (prompt tuning, prefix tuning, p-tuning)
do not ask: they train their tokens over the adapted model, and freeze it.
"""

from typing import Any, NoReturn

from torch import nn

from fastlora.layers.lora_experts import LoRAExperts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.on_top import REFUSAL
from fastlora.model.trained_tokens import TrainedTokens

_METHODS = ("add_adapter", "load_adapter")


def refuse(*_: Any, **__: Any) -> NoReturn:
    """In place of what would put peft's adapters on an adapted model.

    Raises:
        ValueError: always, with the orders that work.
    """
    raise ValueError(REFUSAL)


class _Refusing(dict[str, Any]):
    """The `peft_config` of an adapted model: empty, and takes nothing."""

    __setitem__ = update = setdefault = __ior__ = refuse  # type: ignore[assignment]


def refuse_peft(model: nn.Module) -> None:
    """From now on the model, and each part of it that holds an adapted layer, refuses peft's adapters."""
    for part in model.modules():
        if any(isinstance(module, (LoRALinear, LoRAExperts, TrainedTokens)) for module in part.modules()):
            part.peft_config = _Refusing()  # type: ignore[assignment]
            for method in _METHODS:
                if callable(getattr(part, method, None)):
                    setattr(part, method, refuse)


def allow_peft(model: nn.Module) -> None:
    """Undo `refuse_peft`, once the adapters are gone."""
    for part in model.modules():
        if isinstance(vars(part).get("peft_config"), _Refusing):
            for name in ("peft_config", *_METHODS):
                vars(part).pop(name, None)
