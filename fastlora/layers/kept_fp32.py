"""Modules that are trained in full in a 16-bit model: the weights are kept in fp32, and the module computes in 16 bits.

bf16 keeps 8 bits, so that a step of less than 1/256 of a weight is rounded away. A step on the fp32 weight is not. For
each call the module's own forward sees the weights in their former dtype, and the gradients reach the fp32 ones.

The module keeps its place, its names and, for `isinstance`, its class: it becomes an instance of a subclass.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_SHORT = (torch.bfloat16, torch.float16)
_MULTIPLIES = (nn.Linear, nn.modules.conv._ConvNd)  # they need an input in the dtype of their weight


def keep(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Turn the 16-bit parameters of these modules into fp32, in whatever module of the model shares them."""
    wanted = {id(parameter) for module in modules for parameter in module.parameters() if parameter.dtype in _SHORT}
    dtypes = {id(parameter): parameter.dtype for parameter in model.parameters() if id(parameter) in wanted}
    for parameter in model.parameters():
        if id(parameter) in wanted:
            parameter.data, parameter.grad = parameter.data.float(), None  # the same Parameter, for what is tied to it
    for module in model.modules():
        mine = {name: dtypes[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in wanted}
        if mine:
            _compute_in(module, getattr(module, "fastlora_computes_in", {}) | mine)


def follow(new: nn.Module, old: nn.Module) -> None:
    """Let a module that has taken the place of another, with its fp32 weights, compute as that one does."""
    if isinstance(old, _KeptInFp32) and new is not old:
        _compute_in(new, dict(old.fastlora_computes_in))


def release(modules: Iterable[nn.Module]) -> None:
    """Give modules their class and the dtype of their weights back; shared parameters stay shared."""
    for module in modules:
        if not isinstance(module, _KeptInFp32):
            continue
        for name, dtype in module.fastlora_computes_in.items():
            parameter: Any = module._parameters[name]
            parameter.data, parameter.grad = parameter.data.to(dtype), None
        del module.fastlora_computes_in
        module.__class__ = type(module).__mro__[2]


def not_finite(model: nn.Module) -> str:
    """The name of a kept parameter that the dtype in which it computes cannot hold; "" without any."""
    for name, module in model.named_modules():
        if isinstance(module, _KeptInFp32):
            for key, value in _cast(module).items():
                if not torch.isfinite(value).all():
                    return f"{name}.{key}"
    return ""


def _compute_in(module: Any, dtypes: dict[str, torch.dtype]) -> None:
    module.fastlora_computes_in = dtypes
    kind: Any = type(module)
    if not issubclass(kind, _KeptInFp32):
        module.__class__ = _subclass(kind)


class _KeptInFp32(nn.Module):
    fastlora_computes_in: dict[str, torch.dtype]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(self, _MULTIPLIES) and isinstance(args[0], Tensor) and args[0].dtype is torch.float32:
            # cast by code that asked the weight for its dtype
            args = (args[0].to(next(iter(self.fastlora_computes_in.values()))), *args[1:])
        if not torch.compiler.is_compiling():
            kind: Any = type(self).__mro__[2]
            return kind.forward(_in_16_bits(self), *args, **kwargs)
        kept = dict(self._parameters)
        try:
            self._parameters.update(_cast(self))
            return super().forward(*args, **kwargs)
        finally:
            self._parameters.update(kept)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, dtype in self.fastlora_computes_in.items():  # `.float()` and `.half()` are for what is computed too
            self.fastlora_computes_in[name] = fn(torch.empty(0, dtype=dtype)).dtype
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        new, (_, *given), *state = reduced
        return _again, (new, type(self).__mro__[2], *given), *state


def _cast(module: Any) -> dict[str, Any]:
    """The parameters of a module that are kept in fp32, in the dtypes in which it computes."""
    return {name: module._parameters[name].to(dtype) for name, dtype in module.fastlora_computes_in.items()}


def _in_16_bits(module: Any) -> Any:
    """A stand-in for a module whose weights are in 16 bits, its own and those of the modules in it.

    It shares all else with the module, which stays as it is: other threads may be using it.
    """
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    vars(view)["_parameters"] = {**module._parameters, **_cast(module)}
    inner = {name: _in_16_bits(m) for name, m in module._modules.items() if isinstance(m, _KeptInFp32)}
    vars(view)["_modules"] = {**module._modules, **inner}
    return view


@functools.cache
def _subclass(kind: Any) -> type:
    return type(kind.__name__, (_KeptInFp32, kind), {"__module__": kind.__module__})


def _again(new: Any, kind: type, *given: Any) -> Any:
    return new(_subclass(kind), *given)
