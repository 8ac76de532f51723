"""Linears that share their input are computed together: q, k and v of an attention, or gate and up of an MLP.

The module that holds them opens a `Call` around its own forward. The first of them that is called computes them all,
and the others, called with the same x, take what is theirs. So the code of attention and MLP stays the model's own, and
the members' hooks run. What nobody takes is dropped when the forward ends, and the group is not used again.

A member has `operands(x)`: what it would multiply now, or None where it must be called by itself.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.kernels.choice import DECODE_UP_TO_M
from fastlora.ops.autograd import seen_by_others
from fastlora.ops.backend import backend
from fastlora.ops.linear import prepared
from fastlora.ops.nf4 import NF4Weight

_PLAIN = (Tensor, nn.Parameter, type(None))
NOT_SHARED = "its linears are not all called with one x"


class Operands(NamedTuple):
    """What a layer multiplies: x [..., K], weight [N, K], (A, B, scaling), bias [N], and dropout's share."""

    x: Tensor
    weight: Tensor | NF4Weight
    adapter: tuple[Tensor, Tensor, float] | None
    bias: Tensor | None
    dropout_p: float
    training: bool
    given: torch.dtype | None  # the dtype of the result, None for that of the product


class Call:
    """One forward of a module that holds a group; a context manager."""

    def __init__(self, holder: nn.Module, names: Sequence[str]) -> None:
        modules = holder._modules
        self._members: list[Any] = [modules[name] for name in names if name in modules]
        self._holder, self._x, self._version = holder, None, -1
        self._found: list[Tensor | None] = []
        self._tried = "fastlora_group_off" in holder.__dict__

    def __enter__(self) -> None:
        self._outer, _open.call = _open.call, self

    def __exit__(self, kind: Any, *_: object) -> None:
        _open.call = self._outer
        if kind is None and any(y is not None for y in self._found):
            self._holder.__dict__["fastlora_group_off"] = NOT_SHARED
        self._found, self._x = [], None

    def take(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """This member's output for this x, if it has been computed."""
        place = next((place for place, each in enumerate(self._members) if each is member), None)
        if place is None:
            return None
        if not self._tried:
            self._tried = True
            self._found = self._compute(x)
            self._x, self._version = (x, x._version) if self._found else (None, -1)  # type: ignore[assignment]
        if x is not self._x or x._version != self._version:
            return None
        y, self._found[place] = self._found[place], None
        return y

    def _compute(self, x: Tensor) -> list[Tensor | None]:
        """What all members give for x; empty where they must be called one by one."""
        from fastlora.ops.group import Member, group_linears

        few = x.dim() == 0 or x.numel() <= DECODE_UP_TO_M * x.shape[-1]
        if few or x.is_inference() or seen_by_others(x, None) or backend(x.device).name != "triton":
            return []
        members: list[Member] = []
        dtypes, rows, casts = [], x, False
        for member in self._members:
            if member._forward_pre_hooks or "forward" in member.__dict__ or not hasattr(member, "operands"):
                return []
            operands: Operands | None = member.operands(x)
            if operands is None or not _fits(operands, x):
                return []
            own, given = operands.x, operands.given
            if members and ((own is not x) is not casts or (casts and own.dtype is not rows.dtype)):
                return []
            try:  # x is cast once, by the first of them or by autocast
                new, weight, lora, bias = prepared(rows if members else own, *operands[1:6])
            except ValueError:  # to be raised by the member's own call
                return []
            rows, casts = new, own is not x
            dtypes.append(given or new.dtype)
            members.append(Member(weight, lora, bias))
        ys = group_linears(rows, members)
        return [y if y.dtype is dtype else y.to(dtype) for y, dtype in zip(ys, dtypes, strict=True)]


def _fits(operands: Operands, x: Tensor) -> bool:
    """Whether weight and bias are frozen and, like the adapter, plain tensors that are here whole."""
    *pair, _ = operands.adapter or (None, None, 0.0)
    dense = operands.weight if isinstance(operands.weight, Tensor) else None
    fixed, tensors = (dense, operands.bias), (dense, operands.bias, *pair)
    if any(t is not None and t.requires_grad for t in fixed) or any(type(t) not in _PLAIN for t in tensors):
        return False
    return operands.weight.device == x.device and all(t is None or t.numel() for t in pair)


class _Open(threading.local):
    call: Call | None = None


_open = _Open()


def taken(member: nn.Module, x: Tensor) -> Tensor | None:
    """A member's output for x, where a group has it; else the member computes it."""
    call = _open.call
    return None if call is None else call.take(member, x)
