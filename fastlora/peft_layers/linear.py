"""peft's LoRA linear layers with our `forward`: the classes, and what gives a layer its class.

The class of an object can be changed while it lives. Each of these classes is a subclass of one of peft's, and
`SPED_UP` says which replaces which. Where the conditions hold (`peft_layers.conditions`), its `forward` computes what
peft's does; where they do not, it steps back to peft's. The conditions are checked at each call, because a user may
disable, merge, add or switch adapters at any time. Each layer counts both kinds of call and keeps the reason of the
last step back (`layer.fastlora_calls`, `fastlora.report(model)`). A new reason is logged as a warning, unless it is
something that the user asked for.

Several active adapters run as one of the summed rank: A's rows one below another, B's columns side by side, each
times its scaling. If they have their own dropout masks or dtypes, h is computed for each. DoRA rescales the outputs
of the product (`ops.dora`).

The classes have the names of peft's, so that a layer prints as peft prints it.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, compiler, nn

from fastlora.kernels.operands import Lora
from fastlora.layers.bases import AdoptedWeight, frozen
from fastlora.layers.grouping import Operands, taken
from fastlora.layers.report import Calls
from fastlora.ops.dora import dora_linear, dora_linear_with_dropout
from fastlora.ops.linear import lora_linear
from fastlora.ops.mixed import joined, mixed_linear, several_linear, total_bias
from fastlora.ops.nf4 import NF4Weight
from fastlora.peft_layers import conditions
from fastlora.peft_layers.conditions import EXPECTED, at_a_call
from fastlora.peft_layers.kept_norms import KeptNorms
from fastlora.peft_layers.kept_weight import KeptWeight, changed

logger = logging.getLogger(__name__)

_warned: set[str] = set()

# peft's class -> (the class that replaces it, why a layer cannot be sped up in its present state: "" where it can)
SPED_UP: dict[type, tuple[type, Callable[[Any, bool], str]]] = {}


class SpedUp:
    """What every sped-up layer of peft's has."""

    fastlora_calls: Calls
    fastlora_adopted: AdoptedWeight
    fastlora_norms: KeptNorms
    fastlora_kept: KeptWeight

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        watch_injections()  # an unpickled model may be the first one in its process


class _SpedUpLinear(SpedUp):
    """The forward that these classes put before peft's."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, by our forward where the conditions hold, else by peft's."""
        if not args and not kwargs and not compiler.is_compiling():
            if (shared := taken(self, x)) is not None:
                self.fastlora_calls.sped_up += 1
                return shared
            if (only := self.operands(x)) is not None:
                self.fastlora_calls.sped_up += 1
                x, weight, (a, b, scaling), bias, dropout_p, training, given = only
                y = lora_linear(x, weight, a, b, scaling, bias, dropout_p, training)
                return y if given is None or y.dtype is given else y.to(given)
        reason, active = at_a_call(self, x, args, kwargs)
        if not compiler.is_compiling():
            count(self.fastlora_calls, reason)
        if reason:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        per_sample = kwargs.get("adapter_names")
        adapters = [conditions.adapter(self, name) for name in active]
        x, weight, bias, given = frozen(self._modules["base_layer"], x, self.fastlora_adopted)
        if per_sample is not None and (len(active) != 1 or any(name != active[0] for name in per_sample)):
            y = mixed_linear(x, weight, bias, dict(zip(active, adapters, strict=True)), per_sample)
        elif len(active) > 1 and not _are_as_one(adapters):
            y = several_linear(x, weight, bias, adapters)
        else:
            lora = adapters[0] if len(active) == 1 else joined(adapters)
            if active[0] in self.lora_variant:
                y = self._dora(x, weight, bias, lora, active[0])
            else:
                bias = total_bias(bias, lora)
                y = lora_linear(x, weight, lora.a, lora.b, lora.scaling, bias, lora.dropout_p, True)
        return y if given is None or y.dtype is given else y.to(given)

    def operands(self: Any, x: Tensor) -> Operands | None:
        """What `forward` multiplies where one plain adapter is active, as it usually is; else None."""
        only = conditions.only_adapter(self, x)
        if only is None:
            return None
        x, weight, bias, given = frozen(self._modules["base_layer"], x, self.fastlora_adopted)
        return Operands(x, weight, (only.a, only.b, only.scaling), bias, only.dropout_p, True, given)

    def _dora(self: Any, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora: Lora, name: str) -> Tensor:
        magnitude = self.lora_magnitude_vector._modules[name]
        if cache := getattr(magnitude, "_dora_cache", None):  # of DoraCaching; peft's calls outside it do the same
            cache.clear()
        norms = self.fastlora_norms.of(weight, lora.a, lora.b, lora.scaling)
        operands = x, weight, lora.a, lora.b, lora.scaling, magnitude.weight, norms, bias
        return dora_linear_with_dropout(*operands, lora.dropout_p) if lora.dropout_p else dora_linear(*operands)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        self.fastlora_adopted.forget()
        self.fastlora_norms.forget()
        kept, dtype = self.fastlora_kept.fits(self), self.get_base_layer().weight.dtype
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        if kept and self.get_base_layer().weight.dtype == dtype:
            self.fastlora_kept.settle(self)
        return result

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """peft's merge; the old weight is kept for `unmerge`."""
        self.fastlora_kept.keep(self)
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            self.fastlora_kept.settle(self)

    def unmerge(self: Any) -> None:
        """Put back the weight from before the merge, bit for bit; if it has changed since, use peft's subtraction."""
        if not (self.merged and self.fastlora_kept.put_back(self)):
            super().unmerge()  # type: ignore[misc]
            changed(self)


class SpedUpLinear(_SpedUpLinear, peft_layer.Linear):
    """peft's `lora.Linear`, sped up."""


SpedUpLinear.__name__ = "Linear"
SPED_UP[peft_layer.Linear] = SpedUpLinear, conditions.linear_reason

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb as peft_bnb

    class SpedUpLinear4bit(_SpedUpLinear, peft_bnb.Linear4bit):
        """peft's `lora.Linear4bit`, sped up."""

    SpedUpLinear4bit.__name__ = "Linear4bit"
    SPED_UP[peft_bnb.Linear4bit] = SpedUpLinear4bit, conditions.linear_reason


def plain_class(layer: Any) -> type:
    """peft's class of a layer, sped up or not; a user's own subclass of one of peft's is a class of its own."""
    kind: type = type(layer)
    return next(kind for kind in kind.__mro__ if kind in SPED_UP) if isinstance(layer, SpedUp) else kind


def speed_up_layer(layer: Any) -> None:
    """Give one of peft's layers the class that speeds it up, if there is one."""
    if type(layer) in SPED_UP:
        layer.__class__ = SPED_UP[type(layer)][0]
        layer.fastlora_calls, layer.fastlora_adopted = Calls(), AdoptedWeight()
        layer.fastlora_norms, layer.fastlora_kept = KeptNorms(), KeptWeight()


def watch_injections() -> None:
    """From now on, speed up adapters that peft injects into a model with sped-up layers, where that is possible."""
    inject = LoraModel.inject_adapter
    if hasattr(inject, "fastlora_watches"):
        return

    @functools.wraps(inject)
    def watched(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, SpedUp) for module in model.modules()):
            for module in list(model.modules()):
                if isinstance(module, peft_layer.LoraLayer) and not standing_reason(module, True):
                    speed_up_layer(module)
        return result

    watched.fastlora_watches = True  # type: ignore[attr-defined]
    LoraModel.inject_adapter = watched  # type: ignore[method-assign]


def standing_reason(layer: Any, whichever_is_active: bool = False) -> str:
    """Why one of peft's LoRA layers cannot be sped up in its present state; empty where it can.

    whichever_is_active: only a reason that holds whichever adapters are active.
    """
    kind = plain_class(layer)
    if kind not in SPED_UP:
        return f"fastlora has no faster form of peft's {kind.__name__}"
    return SPED_UP[kind][1](layer, whichever_is_active)


def _are_as_one(adapters: Sequence[Lora]) -> bool:
    """Whether active adapters can run as one of the summed rank: none has dropout, and all have one dtype."""
    return len({adapter.a.dtype for adapter in adapters}) == 1 and not any(adapter.dropout_p for adapter in adapters)


def count(calls: Calls, reason: str) -> None:
    """Count one call; log a reason for stepping back the first time it occurs."""
    if not reason:
        calls.sped_up += 1
        return
    calls.stepped_back += 1
    calls.last_reason = reason
    if reason not in EXPECTED and reason not in _warned:
        _warned.add(reason)
        logger.warning("a LoRA layer steps back to peft's slower forward: %s (said once per reason)", reason)
