"""Logits that are computed when something reads them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_FREE = {  # what a tensor says of itself without its values
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse")),
    *(getattr(Tensor, name).__get__ for name in ("is_quantized", "is_nested", "is_mkldnn", "is_meta")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
}  # fmt: skip


class LazyLogits(Tensor):
    """A tensor in the place of one that may never be read; the first operator that reads it computes it, once.

    It is then what it would have been at first, as long as the head's parameters are. A cast to another dtype waits
    too: accelerate casts all outputs of a model.
    """

    _compute: Callable[[], Tensor] | None
    _differentiable: bool
    _modes: tuple[bool, Callable[[], Any]]
    _value: Tensor

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
        differentiable: bool,
    ) -> "LazyLogits":  # fmt: skip
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._compute, made._differentiable, made._modes = compute, differentiable, _modes(device)
        return made  # type: ignore[no-any-return]

    def value(self) -> Tensor:
        """The logits, with their graph if there is one."""
        if self._compute is not None:
            grad, autocast = self._modes
            with torch.set_grad_enabled(grad), autocast():
                self._value = self._compute()
            self._compute = None
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _REQUIRES_GRAD:
            return args[0]._differentiable
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(args[0] if args else None, LazyLogits) and (dtype := _cast_of(func, args[1:], kwargs)):
            logits = args[0]
            return LazyLogits(
                lambda: logits.value().to(dtype), logits.shape, dtype, logits.device, logits._differentiable
            )
        return func(*tree_map(_read, args), **tree_map(_read, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For callers below `__torch_function__`: they see a tensor without a graph."""
        with torch.no_grad():
            return func(*tree_map(_detached, args), **tree_map(_detached, kwargs or {}))


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _modes(device: torch.device) -> tuple[bool, Callable[[], Any]]:
    """Whether gradients are recorded, and a maker of the present autocast."""
    kind, grad = device.type, torch.is_grad_enabled()
    if not torch.is_autocast_enabled(kind):
        return grad, nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return grad, lambda: torch.autocast(kind, dtype)


def _cast_of(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    if func is Tensor.float and not kwargs:
        return torch.float32
    if func is Tensor.to and len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
        return args[0]
    return None


def _read(found: Any) -> Any:
    return found.value() if isinstance(found, LazyLogits) else found


def _detached(found: Any) -> Any:
    return found.value().detach() if isinstance(found, LazyLogits) else found
