"""The memory of tensors, counted storage by storage as operators allocate and free them, without a device.

A dispatch mode sees what every operator returns, of real tensors and of fake ones. A storage counts once, from the
first operator that returns it until nothing holds it, rounded up to 512 bytes as torch's CUDA allocator does. What an
operator allocates and frees inside itself is not seen.

torch's own `torch.distributed._tools.mem_tracker.MemTracker` counts the same way, but takes one call of a model: a
second micro-batch is refused, and what autograd Functions allocate in backward is not told apart.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef

BLOCK = 512  # bytes: kMinBlockSize of c10/cuda/CUDACachingAllocator.cpp


class Tracker(TorchDispatchMode):
    """Counts storages while it is active; those made outside count once `hold` has named them.

    Attributes:
        label: what the storages that operators make now are counted as.
        held: bytes held now, by label.
        peak: the most bytes held at once since `reset_peak`.
        at_peak: `held` at that moment.
    """

    def __init__(self, label: str = "") -> None:
        super().__init__()
        self.label = label
        self.held: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.total = self.peak = 0
        self._known: dict[WeakIdRef, list[Any]] = {}  # storage -> [label, bytes]; a label of None is not counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return found

    def hold(self, tensors: Iterable[Tensor], label: str | None) -> None:
        """Count the storages of these tensors as `label` from now on; None: not at all."""
        for tensor in tensors:
            entry = self._see(tensor, label)
            if entry[0] != label:
                self.add(entry[0], -entry[1])
                entry[0] = label
                self.add(label, entry[1])

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Inside, new storages are counted as `label`."""
        outer, self.label = self.label, label
        try:
            yield
        finally:
            self.label = outer

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.total, dict(self.held)

    def _see(self, tensor: Tensor, label: str | None = "") -> list[Any]:
        storage = tensor.untyped_storage()
        entry = self._known.get(WeakIdRef(storage))
        if entry is None:
            entry = [self.label if label == "" else label, rounded(storage.nbytes())]
            self._known[WeakIdRef(storage, self._forget(entry))] = entry
            self.add(entry[0], entry[1])
        return entry

    def _forget(self, entry: list[Any]) -> Callable[[Any], None]:
        def gone(reference: Any) -> None:
            self._known.pop(reference, None)
            self.add(entry[0], -entry[1])

        return gone

    def add(self, label: str | None, size: int) -> None:
        """Count bytes that no tensor has."""
        if label is None:
            return
        self.held[label] += size
        self.total += size
        if self.total > self.peak:
            self.reset_peak()


@contextmanager
def unseen() -> Iterator[None]:
    """Inside, fastlora's operators run as they do where no dispatch mode is active, which would have them called by
    name, so that a tracker counts what they allocate."""
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("fastlora.")]
    changed = [names for names in modules if "seen_by_others" in names]
    real = [names["seen_by_others"] for names in changed]
    for names in changed:
        names["seen_by_others"] = lambda *_: False
    try:
        yield
    finally:
        for names, function in zip(changed, real, strict=True):
            names["seen_by_others"] = function


def rounded(size: int) -> int:
    """Bytes that the allocator gives for `size` bytes."""
    return -(-size // BLOCK) * BLOCK
