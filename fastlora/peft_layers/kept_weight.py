"""The weight of one of peft's layers as it was before a merge, so that unmerging gives back every bit.

peft unmerges by subtracting what it added, which in 16 bits, and more so in 4, leaves a rounded weight behind. Here
the weight that was kept is put back: for a dense layer a copy in main memory, in 4 bits bitsandbytes' own parameter.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers.bases import is_linear4bit


class KeptWeight:
    """What the base weight and bias of a layer were before its adapters were merged.

    A copy or a pickle of it starts empty; a layer with an empty one unmerges by peft's subtraction.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Release the memory."""
        self._weight: Tensor | None = None
        self._attributes: dict[str, Any] = {}
        self._bias: Tensor | None = None
        self._merged: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptWeight":
        return KeptWeight()

    def __reduce__(self) -> tuple[type["KeptWeight"], tuple[()]]:
        return KeptWeight, ()

    def keep(self, layer: Any) -> None:
        """Keep the weight of a layer that has nothing merged; at a further merge, what is kept stays."""
        if layer.merged:
            return
        self.forget()
        base = layer.get_base_layer()
        if base.weight.is_inference():
            return  # torch does not count changes of such a tensor
        if not is_linear4bit(base) and type(base.weight) not in (nn.Parameter, Tensor):
            return  # sharded, or another library's kind: peft's subtraction is used
        # peft gives a Linear4bit a new parameter, but writes into the parameter of a dense layer
        self._weight = base.weight if is_linear4bit(base) else base.weight.detach().to("cpu", copy=True)
        bias = getattr(base, "bias", None)
        self._attributes = dict(base.weight.__dict__)
        self._bias = None
        if bias is not None and any(getattr(layer, "lora_bias", {}).values()):
            self._bias = bias.detach().to("cpu", copy=True)

    def settle(self, layer: Any) -> None:
        """Remember which weight is merged; if nothing has been merged, forget."""
        if not layer.merged:
            self.forget()
        elif self._weight is not None:
            changed(layer)
            self._merged = _identity(layer)

    def fits(self, layer: Any) -> bool:
        """Whether the layer's weight is still the one that the merge left."""
        return self._weight is not None and self._merged == _identity(layer)

    @torch.no_grad()
    def put_back(self, layer: Any) -> bool:
        """Undo all merges of the layer; if its weight has changed since, do nothing and return False."""
        if not self.fits(layer):
            self.forget()
            return False
        assert self._weight is not None
        base = layer.get_base_layer()
        if is_linear4bit(base):
            self._weight.__dict__.update(self._attributes)  # peft's merge overwrites them as for an unquantized weight
            base.weight = self._weight.to(base.weight.device)
        else:
            base.weight.data.copy_(self._weight)
            changed(layer)
        if self._bias is not None:
            base.bias.data.copy_(self._bias)
        layer.merged_adapters.clear()
        self.forget()
        return True


def changed(layer: Any) -> None:
    """Count a change made through `.data`, so that other layers that share the weight notice it."""
    weight = layer.get_base_layer().weight
    if not weight.is_inference() and type(weight) in (nn.Parameter, Tensor):
        torch.autograd.graph.increment_version(weight)


def _identity(layer: Any) -> tuple[Any, ...]:
    weight = layer.get_base_layer().weight
    return weight.data_ptr(), weight._version, weight.device, weight.dtype
