"""Outputs of linears and attention kept under gradient checkpointing: recomputation neither multiplies nor attends.

`torch.utils.checkpoint` has `create_selective_checkpoint_contexts` for this: a dispatch mode, which sends every call of
every operator through Python. Here the linear itself asks whether its output is to be kept, which costs nothing else,
and a dispatch mode is on only inside the attention functions of transformers.

Source: arXiv:2205.05198, section 5 (what to recompute: that which holds much memory and costs little).
"""

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_Found = tuple[Any, ...]


def keep_linears() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A `context_fn` of `torch.utils.checkpoint.checkpoint` that keeps what fastlora's linears return.

        checkpoint(block, x, use_reentrant=False, context_fn=fastlora.keep_linears)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_linears})

    Backward then recomputes norms, rotary embedding and activations of a block, no base product and no attention. It
    costs the memory of the outputs: M x N values a linear, M x R in fp32 where B is trained, and what a kernel of
    attention returns, M x heads x head_dim values and M x heads in fp32. Results are the same to the bit.

    Kept are linears with an adapter or over NF4, DoRA over NF4 included; mixed batches, stacks of experts, and DoRA
    over a dense weight are computed again. Of attention, the kernels of torch ("sdpa") and flash-attn in models of
    transformers, without dropout; "eager" attention is computed again. So is what was changed in place, and all in a
    second backward through the same graph, or where recomputation does not take the way that forward took. Dropout
    needs the checkpoint's `preserve_rng_state`, which is the default.

    transformers' Trainer takes it in `gradient_checkpointing_kwargs`, except with a logger that writes its arguments as
    JSON: then call `gradient_checkpointing_enable` on the model and leave `gradient_checkpointing` off.

    Returns:
        (context of forward, context of recomputation).
    """
    if torch.compiler.is_compiling():  # which wants dispatch modes, while it traces only
        return create_selective_checkpoint_contexts([torch.ops.fastlora.lora_linear.default])
    _watch_attention()
    taken = _Taken()
    return _Recorder(taken), _Giver(taken)


class _Kept(NamedTuple):
    """What a linear or a kernel of attention returned, output first, and that one's version then."""

    key: tuple[Any, ...]
    found: tuple[Any, ...]
    version: int  # one that differs has been written to since


class _Taken:
    """The calls of one forward of a checkpointed block, in order."""

    def __init__(self) -> None:
        self.calls: list[_Kept | None] = []

    @property
    def nbytes(self) -> int:
        """Of what is kept, but each storage once."""
        kept = [t for call in self.calls if call is not None for t in call.found if isinstance(t, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


class _Keeper:
    """A context in which this thread's linears and attention go through `call`."""

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
        found = compute()
        # aliases have the version counters, and not the graph that the output is about to get
        aliases = tuple(value.detach() if isinstance(value, Tensor) else value for value in found)
        self.taken.calls.append(_Kept(key, aliases, aliases[0]._version))
        return found


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
        return kept.found if kept.found[0]._version == kept.version else compute()


class _Active(threading.local):
    keeper: _Keeper | None = None


_active = _Active()


def keeper() -> _Keeper | None:
    """The context that this thread's linears are in, if any."""
    return _active.keeper


_KERNELS = (  # of attention, by their operators' names
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn", "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward",
)  # fmt: skip
_FUNCTIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "fastlora_packed")  # of transformers


class _Attention(TorchDispatchMode):
    """In it a keeper is asked for what the kernels of attention return."""

    def __init__(self, keeper: _Keeper) -> None:
        super().__init__()
        self._keeper = keeper

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator.name().partition(".")[0] not in _KERNELS or _drops(operator, args, kwargs):
            return operator(*args, **kwargs)
        shapes = tuple((arg.shape, arg.dtype) for arg in args if isinstance(arg, Tensor))
        return self._keeper.call((operator, *shapes), lambda: operator(*args, **kwargs))


def _drops(operator: Any, args: Any, kwargs: Any) -> bool:
    """Whether a kernel drops some of its weights: were it not called again, what draws after it would draw others."""
    for place, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            return bool(kwargs.get("dropout_p", args[place] if place < len(args) else 0.0))
    return False


def _watch_attention() -> None:
    """Let the attention functions that transformers has by name ask the keeper, once it has been imported."""
    functions: Any = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    for name in _FUNCTIONS if functions is not None else ():
        function = functions.get(name)
        if function is not None and not hasattr(function, "fastlora_keeps"):
            functions.register(name, _keeping(function))


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attention(*args: Any, **kwargs: Any) -> Any:
        keeper = _active.keeper
        if keeper is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with _Attention(keeper):
            return function(*args, **kwargs)

    attention.fastlora_keeps = True  # type: ignore[attr-defined]
    return attention
