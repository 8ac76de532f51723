"""Outputs of the linears kept under gradient checkpointing, so that recomputation does not multiply again.

`torch.utils.checkpoint` has `create_selective_checkpoint_contexts` for this: a dispatch mode, which sends every call of
every operator through Python. Here the linear itself asks whether its output is to be kept, which costs nothing else.

Source: arXiv:2205.05198, section 5 (what to recompute: that which holds much memory and costs little).
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_Found = tuple[Tensor, Tensor | None]


def keep_linears() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A `context_fn` of `torch.utils.checkpoint.checkpoint` that keeps what fastlora's linears return.

        checkpoint(block, x, use_reentrant=False, context_fn=fastlora.keep_linears)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_linears})

    Backward then recomputes norms, attention and activations of a block, and no base product. It costs the memory of
    the outputs: M x N values a linear, and M x R in fp32 where B is trained. Results are the same to the bit.

    Kept are linears with an adapter or over NF4, DoRA over NF4 included; mixed batches, stacks of experts, and DoRA
    over a dense weight are computed again. So is a linear whose output was changed in place, and all of them in a
    second backward through the same graph, or where recomputation does not take the way that forward took. Dropout
    needs the checkpoint's `preserve_rng_state`, which is the default.

    transformers' Trainer takes it in `gradient_checkpointing_kwargs`, except with a logger that writes its arguments as
    JSON: then call `gradient_checkpointing_enable` on the model and leave `gradient_checkpointing` off.

    Returns:
        (context of forward, context of recomputation).
    """
    if torch.compiler.is_compiling():  # which wants dispatch modes, while it traces only
        return create_selective_checkpoint_contexts([torch.ops.fastlora.lora_linear.default])
    taken = _Taken()
    return _Recorder(taken), _Giver(taken)


class _Kept(NamedTuple):
    """What a linear returned, and the version of y then: one that differs has been written to since."""

    key: tuple[Any, ...]
    y: Tensor
    h: Tensor | None
    version: int


class _Taken:
    """The calls of one forward of a checkpointed block, in order."""

    def __init__(self) -> None:
        self.calls: list[_Kept | None] = []


class _Keeper:
    """A context in which this thread's linears go through `call`."""

    def __init__(self, taken: _Taken) -> None:
        self.taken = taken
        self._outer: list[_Keeper | None] = []

    def __enter__(self) -> None:
        self._outer.append(_active.keeper)
        _active.keeper = self

    def __exit__(self, *_: object) -> None:
        _active.keeper = self._outer.pop()

    def call(self, key: tuple[Any, ...], compute: Callable[[], _Found]) -> _Found:
        raise NotImplementedError


class _Recorder(_Keeper):
    def call(self, key: tuple[Any, ...], compute: Callable[[], _Found]) -> _Found:
        y, h = compute()
        alias = y.detach()  # has y's version counter, and not the graph that y is about to get
        self.taken.calls.append(_Kept(key, alias, h, alias._version))
        return y, h


class _Giver(_Keeper):
    def __enter__(self) -> None:
        super().__enter__()
        self._next = 0

    def call(self, key: tuple[Any, ...], compute: Callable[[], _Found]) -> _Found:
        calls, place = self.taken.calls, self._next
        kept = calls[place] if place < len(calls) else None
        self._next += 1
        if kept is None:
            return compute()
        if kept.key != key:
            calls.clear()
            return compute()
        calls[place] = None
        return (kept.y, kept.h) if kept.y._version == kept.version else compute()


class _Active(threading.local):
    keeper: _Keeper | None = None


_active = _Active()


def keeper() -> _Keeper | None:
    """The context that this thread's linears are in, if any."""
    return _active.keeper
