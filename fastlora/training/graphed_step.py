"""Forward and backward recorded as a CUDA graph and replayed, for steps whose launches take longer than their kernels.

A step of a small model, or of few tokens, is thousands of launches of a few microseconds each, and Python issues them
more slowly than the device runs them. A replayed graph is one launch.
"""

import functools
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


class GraphedStep:
    """Computes a loss and its gradients, as `loss(model, batch).backward()` does, from a recorded graph where it can.

        step = fastlora.GraphedStep(model)
        for batch in batches:                     # of few shapes: packed or padded to a length
            loss = step(**batch)
            optimizer.step(); optimizer.zero_grad()

    The first `warm_up` calls with a batch of new shapes run as usual; the next is recorded, and from then on replayed.
    Gradients are added to what is in `p.grad`, so that micro-batches accumulate; results are those of the usual step.
    Other shapes, and whatever cannot be recorded, run as usual: `reasons` says why, `replayed` and `usual` count.

    transformers' "sdpa" and flash attention can be recorded, "eager" cannot. Leave out a mask of ones. A loss of these
    parameters that a call of the model itself made, and that is still alive, keeps a step from being recorded.

    Recorded is what ran: call `reset` after changing adapters, frozen parameters, hooks or settings of the model.
    Training and evaluation mode, and parameters that have moved, are noticed. A graph holds the memory of a step.

    Args:
        model: on a CUDA device, in one process.
        loss: of the model and a batch; by default `model(**batch).loss`. It must not wait for the device.
        warm_up: at least 1.
        most: graphs to keep; batches of more kinds run as usual.
    Raises:
        ValueError: warm_up below 1; in a call, an argument whose kind cannot be told, such as a list.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, warm_up: int = 2, most: int = 8) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, not {warm_up}: kernels are compiled in a first step")
        self.model, self.loss, self.warm_up, self.most = model, loss or _own_loss, warm_up, most
        self.replayed = self.usual = 0
        self.reasons: dict[Any, str] = {}
        self.reset()

    def reset(self) -> None:
        """Forget every graph, and free its memory."""
        self._kinds: dict[Any, _Kind] = {}
        self._used: dict[nn.Parameter, None] = {}  # got a gradient; others keep none, which optimizers tell from zeros
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._pool: Any = None
        self.reasons.clear()

    def __call__(self, **batch: Any) -> Tensor:
        """The loss, detached; gradients are in `p.grad`. batch: tensors on the model's device, and other arguments."""
        key = self._key(batch)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= self.most:
                return self._usual(batch, "others", f"more than {self.most} kinds of batches")
            kind = self._kinds[key] = _Kind()
        if kind.graph is not None and kind.addresses != _addresses(kind.used):
            self.reset()
            return self(**batch)
        if kind.graph is None:
            kind.seen += 1
            if kind.seen <= self.warm_up or key in self.reasons:
                return self._usual(batch, key)
            if reason := obstacle(self.model) or self._record(kind, batch):
                return self._usual(batch, key, reason)
        return self._replay(kind, batch)

    def _key(self, batch: dict[str, Any]) -> Any:
        def of(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.shape, value.dtype
            if not isinstance(value, Hashable):
                raise ValueError(f"{name} is a {type(value).__name__}: give a tensor, a number, a string or a tuple")
            return value

        return self.model.training, *((name, of(name, value)) for name, value in sorted(batch.items()))

    def _usual(self, batch: dict[str, Any], key: Any, reason: str = "") -> Tensor:
        if reason:
            self.reasons[key] = reason
        self.usual += 1
        with _beside():
            loss = self.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        if key not in self.reasons:
            self._used.update((p, None) for p in self.model.parameters() if p.grad is not None)
        return loss.detach()

    def _record(self, kind: "_Kind", batch: dict[str, Any]) -> str:
        """Record a step of this kind, without running it; returns why it cannot be."""
        kind.used = [p for p in self._used if p.requires_grad]
        given = [p.grad for p in kind.used]
        self._into_buffers(kind.used)
        kind.batch = {name: v.clone() if isinstance(v, Tensor) else v for name, v in batch.items()}
        try:
            with _no_random_states(self.model), _no_autocast_cache(), _no_mask_without_padding("position_ids" in batch):
                kind.graph, kind.loss, self._pool = _recorded(lambda: self._step(kind.batch), self._pool)
        except Exception as error:
            kind.graph = None
            for p, gradient in zip(kind.used, given, strict=True):
                p.grad = gradient
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        kind.addresses = _addresses(kind.used)
        return ""

    def _step(self, batch: dict[str, Any]) -> Tensor:
        loss = self.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _replay(self, kind: "_Kind", batch: dict[str, Any]) -> Tensor:
        self._into_buffers(kind.used)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                kind.batch[name].copy_(value, non_blocking=True)
        kind.graph.replay()
        self.replayed += 1
        assert kind.loss is not None
        return kind.loss.clone()

    @torch.no_grad()
    def _into_buffers(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let every p.grad be the tensor that the graphs add to, with the values it has, or zeros for none."""
        fresh = []
        for p in parameters:
            buffer = self._buffers.get(p)
            if buffer is None:
                buffer = self._buffers[p] = torch.empty_like(p if p.grad is None else p.grad)
            if p.grad is None:
                fresh.append(buffer)
            elif p.grad is not buffer:
                buffer.copy_(p.grad)
            p.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)


@dataclass
class _Kind:
    """Batches of one kind: how many were seen, and once recorded the graph, what it reads and what it writes."""

    seen: int = 0
    graph: Any = None
    batch: dict[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None
    used: list[nn.Parameter] = field(default_factory=list)
    addresses: tuple[int, ...] = ()


def obstacle(model: nn.Module) -> str:
    """Why no step of this model can be recorded; "" where it can."""
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_cuda:
        return "the model is not on a CUDA device"
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "several processes"
    if any(map(_checkpoints, model.modules())) and any(map(_drops, model.modules())):
        return "dropout under gradient checkpointing: its random state cannot be read while recording"
    return ""


def _own_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _addresses(parameters: Sequence[nn.Parameter]) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in parameters)


def _checkpoints(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False)) and module.training


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


@contextmanager
def _no_random_states(model: nn.Module) -> Iterator[None]:
    """transformers' checkpoints do not read the random state, which recording forbids; `obstacle` has found no need."""
    changed = []
    module: Any
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial):
            changed.append((module, function))
            options = {**function.keywords, "preserve_rng_state": False}
            module._gradient_checkpointing_func = functools.partial(function.func, *function.args, **options)
    try:
        yield
    finally:
        for module, function in changed:
            module._gradient_checkpointing_func = function


@contextmanager
def _no_mask_without_padding(positions: bool) -> Iterator[None]:
    """Batches without a mask get none: older transformers make one while recording, and attention is slower with it.

    It asks whether it is recorded, and whether position ids begin again, which those that it makes itself never do.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    own = {name: getattr(masks, name, None) for name in ("is_tracing", "find_packed_sequence_indices")}
    if None in own.values():
        yield
        return
    tracing: Any = own["is_tracing"]
    masks.is_tracing = lambda tensor=None: tensor is not None and tracing(tensor)  # without a tensor nothing is read
    if not positions:
        masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(masks, name, function)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A cast that autocast remembers from recording would not be made again at a replay."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _beside() -> Iterator[None]:
    """On the stream on which steps are recorded: autograd remembers on which one a gradient is accumulated."""
    if not torch.cuda.is_available():
        yield
        return
    current = torch.cuda.current_stream()
    side = _stream(current.device_index)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def _recorded(step: Callable[[], Tensor], pool: Any) -> tuple[Any, Tensor, Any]:
    """(a graph of the step, the tensor that it returned, the pool of its memory)."""
    graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
            found = step()
    except Exception:
        generator.graphsafe_set_state(before)  # a capture that fails leaves it capturing, and dropout would raise
        raise
    return graph, found, graph.pool()
