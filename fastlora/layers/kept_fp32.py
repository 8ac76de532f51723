"""Modules that are trained in full in a 16-bit model: the weights are kept in fp32, and the module computes in 16 bits.

bf16 keeps 8 bits, so that a step of less than 1/256 of a weight is rounded away. A step on the fp32 weight is not. For
each call the module's own forward sees the weights in their former dtype, and the gradients reach the fp32 ones.

The module keeps its place, its names and, for `isinstance`, its class: it becomes an instance of a subclass.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_SHORT = (torch.bfloat16, torch.float16)


def keep(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Turn the 16-bit parameters of these modules into fp32, in whatever module of the model shares them."""
    wanted = {id(parameter) for module in modules for parameter in module.parameters() if parameter.dtype in _SHORT}
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        mine = {name: p for name, p in module._parameters.items() if p is not None and id(p) in wanted}
        if not mine:
            continue
        for name, parameter in mine.items():
            if id(parameter) not in kept:
                kept[id(parameter)] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
            module._parameters[name] = kept[id(parameter)]
        dtypes = {name: parameter.dtype for name, parameter in mine.items()}
        _compute_in(module, getattr(module, "fastlora_computes_in", {}) | dtypes)


def follow(new: nn.Module, old: nn.Module) -> None:
    """Let a module that has taken the place of another, with its fp32 weights, compute as that one does."""
    if isinstance(old, _KeptInFp32) and new is not old:
        _compute_in(new, dict(old.fastlora_computes_in))


def release(modules: Iterable[nn.Module]) -> None:
    """Give modules their class and the dtype of their weights back; shared parameters stay shared."""
    released: dict[int, nn.Parameter] = {}
    for module in modules:
        if not isinstance(module, _KeptInFp32):
            continue
        for name, dtype in module.fastlora_computes_in.items():
            parameter: Any = module._parameters[name]
            if id(parameter) not in released:
                released[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            module._parameters[name] = released[id(parameter)]
        del module.fastlora_computes_in
        module.__class__ = type(module).__mro__[2]


def _compute_in(module: Any, dtypes: dict[str, torch.dtype]) -> None:
    module.fastlora_computes_in = dtypes
    kind: Any = type(module)
    if not issubclass(kind, _KeptInFp32):
        module.__class__ = _subclass(kind)


class _KeptInFp32(nn.Module):
    fastlora_computes_in: dict[str, torch.dtype]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = dict(self._parameters)
        try:
            for name, dtype in self.fastlora_computes_in.items():
                parameter: Any = kept[name]
                self._parameters[name] = parameter.to(dtype)
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        new, (_, *given), *state = reduced
        return _again, (new, type(self).__mro__[2], *given), *state


@functools.cache
def _subclass(kind: Any) -> type:
    return type(kind.__name__, (_KeptInFp32, kind), {"__module__": kind.__module__})


def _again(new: Any, kind: type, *given: Any) -> Any:
    return new(_subclass(kind), *given)
