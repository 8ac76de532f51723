"""Tensors that have a size and no values, with an autograd of their own: a step runs, and what it holds is counted.

A `Sized` is alive as long as Python refers to it, exactly as a tensor is, so a module that is written down here as
transformers writes it holds what that module holds. `Book` counts bytes as storages come and go, and keeps what was
held at the peak, by term and by name. What an operator needs for its backward it names in `saves`.

    book = Book()
    x = Parameter(book, 100, 4)
    y = apply("the square", [x], 100, 4, saves=[x])
    backward(y)

Bytes are rounded up to 512 as torch's CUDA allocator does (kMinBlockSize of c10/cuda/CUDACachingAllocator.cpp). Memory
that fragments make useless is another term (`overhead`).
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

BLOCK = 512
FP32, HALF, INT64, BOOL = 4, 2, 8, 1
Key = tuple[str, str]


class Book:
    """Bytes held now and at the peak.

    Attributes:
        term: what new storages are counted as.
        doing: what is being done, in words.
        held: bytes now, by (term, name).
        peak: the most bytes held at once; `at_peak` is `held` at that moment, and `moment` what was being done.
        recording: False where nothing is saved for backward.
    """

    def __init__(self) -> None:
        self.term, self.doing, self.moment = "activations", "", ""
        self.held: Counter[Key] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[Key, int] = {}
        self.recording = True
        self._order = count()

    def add(self, key: Key, size: int) -> None:
        """Count `size` bytes more, or fewer."""
        self.held[key] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.moment = self.total, self.doing
            self.at_peak = dict(self.held)

    def hold(self, term: str, name: str, size: float) -> None:
        """Count bytes that stay."""
        self.add((term, name), round(size))

    def tensor(self, name: str, elements: float, width: float, term: str = "") -> "Sized":
        """A new tensor of `elements` values of `width` bytes."""
        return Sized(Storage(self, (term or self.term, name), elements * width), elements, width)

    @contextmanager
    def said(self, *, term: str = "", doing: str = "", recording: bool | None = None) -> Iterator[None]:
        """Inside, these attributes have these values."""
        outer = self.term, self.doing, self.recording
        self.term, self.doing = term or self.term, doing or self.doing
        self.recording = self.recording if recording is None else recording
        try:
            yield
        finally:
            self.term, self.doing, self.recording = outer


class Storage:
    """Bytes that count until nothing refers to them. users: how many `Sized` do."""

    __slots__ = ("book", "key", "size", "users")

    def __init__(self, book: Book, key: Key, size: float) -> None:
        self.book, self.key, self.users = book, key, 0
        self.size = -(-int(size) // BLOCK) * BLOCK
        book.add(key, self.size)

    def __del__(self) -> None:
        self.book.add(self.key, -self.size)


class Node:
    """A step of backward. run: takes the gradient of the result, returns one for each input."""

    __slots__ = ("grad", "inputs", "order", "run")

    def __init__(
        self, order: int, inputs: Sequence["Node | None"], run: Callable[["Sized"], list["Sized | None"]]
    ) -> None:
        self.order, self.inputs, self.run = order, inputs, run
        self.grad: Sized | None = None

    def __lt__(self, other: "Node") -> bool:
        return self.order > other.order  # the last operator first, as torch's engine does


class Sized:
    """A tensor: how many values, of how many bytes each. node: where its gradient goes; None: it needs none."""

    __slots__ = ("elements", "node", "storage", "width")

    def __init__(self, storage: Storage, elements: float, width: float, node: Node | None = None) -> None:
        self.storage, self.elements, self.width, self.node = storage, elements, width, node
        storage.users += 1

    def __del__(self) -> None:
        self.storage.users -= 1

    @property
    def book(self) -> Book:
        """Where its bytes are counted."""
        return self.storage.book

    def alias(self) -> "Sized":
        """The same bytes, without the graph behind them."""
        return Sized(self.storage, self.elements, self.width)


class Parameter(Sized):
    """A trained tensor and, after a backward, its gradient. Its own bytes are counted where weights are."""

    __slots__ = ("grad",)

    def __init__(self, book: Book, elements: float, width: float) -> None:
        super().__init__(Storage(book, ("", ""), 0), elements, width)
        self.grad: Sized | None = None
        self.node = Node(-1, (), self._take)

    def hold_gradient(self) -> None:
        """Have a gradient, as after a backward."""
        self.grad = self.book.tensor("of trained tensors", self.elements, self.width, "gradients")

    def _take(self, grad: Sized) -> list[Sized | None]:
        self.grad = self.grad or grad
        return []


def apply(
    name: str,
    inputs: Sequence[Sized],
    elements: float,
    width: float,
    *,
    saves: Iterable[Sized] = (),
    saves_result: bool = False,
    in_place: Sized | None = None,
    passes: bool = False,
    scratch: float = 0,
    scratch_back: float | None = None,
) -> Sized:
    """The result of an operator, with its backward.

    Args:
        name: of the result.
        elements: values of the result, of `width` bytes.
        saves: tensors that backward needs; saves_result: and the result.
        in_place: the tensor whose bytes the result takes over.
        passes: the gradient of the result is that of the inputs (a sum, a view); otherwise each gets a new one.
        scratch: bytes for the time of forward; scratch_back: of backward, as many by default.
    """
    book = inputs[0].book
    with _scratch(book, scratch):
        y = book.tensor(name, elements, width) if in_place is None else Sized(in_place.storage, elements, width)
    if not book.recording or all(x.node is None for x in inputs):
        return y
    held = [t.alias() for t in saves]
    if saves_result:
        held.append(y.alias())
    wanted = [None if x.node is None else (x.elements, x.width, isinstance(x, Parameter)) for x in inputs]
    back = scratch if scratch_back is None else scratch_back

    def gradient(elements: float, width: float, trained: bool) -> Sized:
        if trained:
            return book.tensor("of trained tensors", elements, width, "gradients")
        return book.tensor(f"d {name}", elements, width)

    def run(grad: Sized, held: list[Sized] = held) -> list[Sized | None]:
        if passes:
            return [grad.alias() for _ in wanted]
        with _scratch(book, back):
            return [None if want is None else gradient(*want) for want in wanted]

    y.node = Node(next(book._order), [x.node for x in inputs], run)
    return y


@contextmanager
def _scratch(book: Book, size: float) -> Iterator[None]:
    held = book.tensor("of an operator", size, 1, "scratch") if size else None
    yield
    del held


def checkpointed(
    name: str, run: Callable[..., Sized], x: Sized, *, kept: bool = True, after: Callable[[], object] = list
) -> Sized:
    """`run(x)`, of which only x is kept: it runs again in backward (torch.utils.checkpoint).

    kept: False if x waits elsewhere (in host memory) until then.
    after: called when backward is through.
    """
    book = x.book
    if not book.recording:
        return run(x)
    with book.said(recording=False):
        found = run(x.alias())
    held = x.alias() if kept else None
    elements, width = x.elements, x.width
    y = Sized(found.storage, found.elements, found.width)

    def again(grad: Sized) -> list[Sized | None]:
        nonlocal held
        inner = held if held is not None else book.tensor(name, elements, width)
        held = None
        inner = Sized(inner.storage, elements, width)
        got: list[Sized | None] = []

        def end(grad: Sized) -> list[Sized | None]:
            got.append(grad)
            return []

        inner.node = Node(-1, (), end)
        with book.said(term="recomputed"):
            result = run(inner)
            del inner
            backward(result, grad)
        after()
        return got

    y.node = Node(next(book._order), [x.node], again)
    return y


def backward(loss: Sized, grad: Sized | None = None) -> None:
    """Walk the graph behind `loss`. What a node saved is freed when it has run, and so is its gradient."""
    root = loss.node
    if root is None:
        return
    root.grad = loss.book.tensor("d loss", loss.elements, loss.width) if grad is None else grad
    del loss, grad
    uses = _uses(root)
    ready = [root]
    del root
    while ready:
        _step(heapq.heappop(ready), ready, uses)


def _step(node: Node, ready: list[Node], uses: Counter[int]) -> None:
    grad, node.grad = node.grad, None
    targets = list(node.inputs)
    grads: list[Sized | None] = [None] * len(targets)
    if grad is not None:
        grads = [*node.run(grad), *grads][: len(targets)]
    if node.order >= 0:
        node.run, node.inputs = _walked, ()
    del grad
    for target in targets:
        given = grads.pop(0)
        if target is None:
            continue
        if given is not None and target.order < 0:
            target.run(given)
        elif given is not None:
            target.grad = _sum(target.grad, given)
        del given
        uses[id(target)] -= 1
        if not uses[id(target)] and target.order >= 0:
            heapq.heappush(ready, target)


def _walked(grad: Sized) -> list[Sized | None]:
    raise RuntimeError("a graph was walked twice")


def _uses(root: Node) -> Counter[int]:
    """How often each node behind `root` is an input of another."""
    found: Counter[int] = Counter()
    todo = [root]
    while todo:
        for node in todo.pop().inputs:
            if node is not None:
                if not found[id(node)]:
                    todo.append(node)
                found[id(node)] += 1
    return found


def _sum(there: Sized | None, grad: Sized) -> Sized:
    """torch adds in place where nobody else holds the bytes."""
    if there is None:
        return grad
    return there if there.storage.users == 1 else there.book.tensor("sum of gradients", there.elements, there.width)
