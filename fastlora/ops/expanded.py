"""Expanded weights kept for their next use, as long as the adapters merged into them do not change.

Expanding an NF4 weight to 16 bits writes 2 bytes a weight. Between two updates of the adapters the result is the same,
so it can serve

    recomputation and backward   of one checkpointed layer (`keep_weights`): two expansions instead of three
    all micro-batches            of one optimizer step (`expand_once`): one expansion, 2 bytes a weight of memory

A kept weight is taken only while the tensors that it was made of are the same, unchanged.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_Parts = tuple[Tensor | None, ...]


class _Entry(NamedTuple):
    whole: Tensor
    parts: _Parts  # held, so that no other tensor gets their memory
    versions: tuple[int, ...]
    stream: int

    def made_of(self, parts: _Parts) -> bool:
        """Whether these are its parts as they were. A checkpoint gives backward other objects over the same memory."""
        return _places(parts) == _places(self.parts) and _versions(parts) == self.versions


class Store:
    """Expanded weights of at most `memory` bytes together; None: of any."""

    def __init__(self, memory: int | None, once: bool) -> None:
        self.memory, self.once, self.held = memory, once, 0
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: tuple[Any, ...], parts: _Parts, stream: int) -> Tensor | None:
        """The weight made of these parts on this stream, if it is here."""
        entry = self._entries.get(key)
        if entry is None or entry.stream != stream:
            return None
        same = entry.made_of(parts)
        if self.once or not same:
            del self._entries[key]
            self.held -= entry.whole.nbytes
        return entry.whole if same else None

    def put(self, key: tuple[Any, ...], parts: _Parts, stream: int, whole: Tensor) -> None:
        """Keep a weight, where there is room."""
        if key not in self._entries and (self.memory is None or self.held + whole.nbytes <= self.memory):
            self._entries[key] = _Entry(whole, parts, _versions(parts), stream)
            self.held += whole.nbytes

    def clear(self) -> None:
        """Give all of it back."""
        self._entries.clear()
        self.held = 0


class _Recording(threading.local):
    store: Store | None = None  # of the recomputation that this thread is in


_recording = _Recording()
_recomputed: "weakref.ref[_Recomputation] | None" = None  # the latest; backward may run in a thread of autograd's
_kept: Store | None = None


@contextlib.contextmanager
def expand_once(memory: int | None = None) -> Iterator[Store]:
    """Within this context an NF4 weight is expanded once, with its adapter merged in, and kept until the end.

        for micro_batches in steps:
            with fastlora.expand_once():
                for batch in micro_batches:
                    model(**batch).loss.backward()
            optimizer.step()

    Which weights are kept changes no bit. Within the context products over NF4 are of expanded weights, also for so few
    tokens that a kernel would otherwise expand tiles inside the product. It pays from two micro-batches on, where the
    linears expand their weights: on CUDA, and on CPUs without AVX512_BF16. It holds for all threads of the process.

    Args:
        memory: bytes at most, 2 for each weight in 16 bits (13.9 GB for Qwen3-8B); weights beyond are expanded at each
            use. None: no limit.
    Returns:
        The store, whose `held` are the bytes.
    Raises:
        ValueError: memory is negative.
        RuntimeError: such a context is open already.
    """
    global _kept
    if memory is not None and memory < 0:
        raise ValueError(f"memory must be 0 bytes or more, or None; got {memory}")
    if _kept is not None:
        raise RuntimeError("expand_once is open already: one context holds for the whole process")
    _kept = store = Store(memory, once=False)
    # fused and 8-bit optimizers change parameters unseen by their version counters
    hook = register_optimizer_step_post_hook(lambda *_: store.clear())
    try:
        yield store
    finally:
        hook.remove()
        _kept = None
        store.clear()


def keep_weights() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A `context_fn` of `torch.utils.checkpoint.checkpoint`: backward takes the weights that recomputation expanded.

        checkpoint(block, x, use_reentrant=False, context_fn=fastlora.keep_weights)

    A block's expanded weights are held from its recomputation to its backward: 2 bytes a weight, 386 MB for a layer of
    Qwen3-8B. Results are the same to the bit.

    Returns:
        (context of forward, context of recomputation).
    """
    if torch.compiler.is_compiling():  # which wants dispatch modes, and keeps nothing by these
        return create_selective_checkpoint_contexts([])
    return contextlib.nullcontext(), _Recomputation()


class _Recomputation:
    """Held by the checkpoint, and with it the weights that backward did not take."""

    def __init__(self) -> None:
        self.store = Store(None, once=True)
        self._outer: list[Store | None] = []

    def __enter__(self) -> None:
        global _recomputed
        _recomputed = weakref.ref(self)
        self.store.clear()
        self._outer.append(_recording.store)
        _recording.store = self.store

    def __exit__(self, *_: object) -> None:
        _recording.store = self._outer.pop()


def holds(device: torch.device) -> bool:
    """Whether weights are kept over several calls, so that a product should use an expanded one."""
    return _kept is not None and not _captures(device)


def expanded(key: tuple[Any, ...], frozen: _Parts, adapters: _Parts, expand: Callable[[bool], Tensor]) -> Tensor:
    """What `expand` gives, or what it gave before for this key and these parts.

    Args:
        key: of what is expanded, whatever its adapters are now; a pointer to the codes is in it.
        frozen: codes and scales. adapters: what is merged into them.
        expand: makes it; its argument tells whether the result is for use at once only.
    """
    latest = None if _recomputed is None else _recomputed()
    device = frozen[0].device  # type: ignore[union-attr]
    if (_kept is None and latest is None and _recording.store is None) or _captures(device):
        return expand(True)
    parts = *frozen, *adapters
    stream = torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
    keeps = _recording.store
    if _kept is not None and all(part is None or isinstance(part, torch.nn.Parameter) for part in adapters):
        keeps = _kept
    for store in (keeps, _kept, None if latest is None else latest.store):
        if store is not None and (found := store.take(key, parts, stream)) is not None:
            return found
    if keeps is None:
        return expand(True)
    whole = expand(False)
    keeps.put(key, parts, stream, whole)
    return whole


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _places(parts: _Parts) -> list[tuple[int, torch.Size] | None]:
    return [None if part is None else (part.data_ptr(), part.shape) for part in parts]


def _versions(parts: _Parts) -> tuple[int, ...]:
    return tuple(-1 if part is None or part.is_inference() else part._version for part in parts)
