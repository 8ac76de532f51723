"""The loss of a causal model from the hidden states of its target tokens: logits whole are made for no one.

A causal model of transformers calls its backbone, its head, what its family does to logits (capped in Gemma 2, scaled
in Granite and Cohere), and its `loss_function`. All of this stays its own code. While it computes a loss, its head is a
stand-in that keeps the hidden states and returns no rows, and `loss_function` is `ops.loss`. What happens to logits is
found by trying the model's own forward on values from small to large.

Where the target tokens are is found on the device. Their number reaches the host while the backbone runs, so that the
device never waits; while a CUDA graph is captured, all tokens are taken.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.layers.lazy_logits import LazyLogits
from fastlora.layers.sharded import gathered_by
from fastlora.ops.autograd import seen_by_others
from fastlora.ops.loss import IGNORED, Logits, linear_cross_entropy

_LABELS = "labels"
_SIZES = (1e-3, 0.1, 1.0, 3.0, 30.0, 300.0)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.targets: Tensor | None = None
        self.smoothing = 0.0


_active = _Stack()


@contextmanager
def targets_known(places: Tensor) -> Iterator[None]:
    """For the calls of a model inside: where, in the rows of its batch one after the other, a next token is a target.

    Saves the search for them. places: [targets], int64, on the model's device.
    """
    outer, _active.targets = _active.targets, places
    try:
        yield
    finally:
        _active.targets = outer


@contextmanager
def smoothed(share: float) -> Iterator[None]:
    """For the calls of a model inside: a share of each target is spread over the vocabulary."""
    outer, _active.smoothing = _active.smoothing, share
    try:
        yield
    finally:
        _active.smoothing = outer


def looks_like(module: nn.Module) -> bool:
    """Whether a module may be a causal model with a head of its own."""
    return _head_of(module) != "" and _LABELS in inspect.signature(type(module).forward).parameters


def _head_of(module: Any) -> str:
    head = module.get_output_embeddings() if hasattr(type(module), "loss_function") else None
    return next((name for name, child in module._modules.items() if child is head is not None), "")


# What is tried


class _Output(tuple[Any, ...]):
    """What a backbone returns, of any class."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class Gives(nn.Module):
    """Returns what it was made with, whatever it is called with; it may have a weight for others to look at."""

    def __init__(self, found: Any, of: nn.Module | None = None) -> None:
        super().__init__()
        self.found = found
        if of is not None:
            self.weight = of.weight

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.found


def probe(module: Any) -> tuple[Any, ...] | str:
    """(name of the head, scale, cap, whether logits become fp32), or why it has no faster way."""
    if _loss_of(module) is not _own_loss():
        return "its loss is not transformers' cross-entropy of the next token"
    head, backbone = _head_of(module), getattr(module, "base_model_prefix", "")
    if backbone not in module._modules:
        return "its backbone is not where base_model_prefix says"
    width = module.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, len(_SIZES), width, generator=generator) * torch.tensor(_SIZES)[:, None]
    labels = torch.tensor([[IGNORED, 0, IGNORED, width - 1, 1 % width, 0]])
    given = module.get_output_embeddings()
    routes = "output_router_logits" in inspect.signature(type(module).forward).parameters
    quiet = {"output_router_logits": False} if routes else {}  # whose loss is added to that of the tokens

    def run(values: Tensor, members: dict[str, Any] | None = None, **options: Any) -> Any:
        kind = cast(Any, type(module))
        likeness = kind.__new__(kind)
        likeness.__dict__ = {**module.__dict__, **(members or {})}
        stand_ins = {backbone: Gives(_Output([torch.zeros(1, len(_SIZES), 1)])), head: Gives(values, given)}
        likeness.__dict__["_modules"] = {**module._modules, **stand_ins}
        return kind.forward(likeness, input_ids=torch.zeros(1, len(_SIZES), dtype=torch.int64), **quiet, **options)

    found = run(z, labels=labels)
    made, loss = found["logits"], found["loss"]
    for logits in _candidates(z, made):
        if made.shape == z.shape and torch.allclose(made, logits(z), rtol=1e-5, atol=1e-5):
            break
    else:
        return "what it does to its logits is neither a factor nor a cap"
    expected = F.cross_entropy(made[0, :-1], labels[0, 1:], ignore_index=IGNORED)
    if not torch.allclose(loss, expected, rtol=1e-5):
        return "its loss is something else than the cross-entropy of the next token"
    sentinel = torch.tensor(0.5)
    if run(z, {"_loss_function": lambda *_, **__: sentinel}, labels=labels)["loss"] is not sentinel:
        return "its loss does not come from its loss_function"
    wide = run(z.to(torch.bfloat16))["logits"].dtype
    if wide not in (torch.bfloat16, torch.float32):
        return f"its logits are in {wide}"
    return head, *logits, wide is torch.float32


def _candidates(z: Tensor, made: Tensor) -> Iterator[Logits]:
    yield Logits()
    if made.shape == z.shape:
        scale = (made[0, 0] / z[0, 0]).median().item()  # of values so small that no cap shows
        yield Logits(scale)
        yield Logits(scale, made.abs().max().item())


@functools.cache
def _own_loss() -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def _loss_of(module: Any) -> Any:
    return module.loss_function


def standing_reason(module: Any) -> str:
    """Why a sped-up model computes its loss by its own code where it is now; "" if it does not."""
    head = module.get_output_embeddings()
    return f"{owner} gathers its head by itself: its own code runs" if (owner := gathered_by(head)) else ""


# What takes its place


class _Targets(NamedTuple):
    """The rows before target tokens, and their labels."""

    labels: Tensor  # [tokens], of the next token
    order: Tensor | None  # the rows that count come first; None if all are taken
    number: Callable[[], int]  # of those that count

    def places(self) -> Tensor | None:
        return None if self.order is None else self.order[: self.number()]


class _UnforeseenError(Exception):
    """This call does with its head, its labels or its loss what the trial did not show."""


class _Call:
    """One call of a model that computes its loss."""

    def __init__(self, model: Any, head: nn.Module, logits: Logits, labels: Tensor, shifted: Tensor | None) -> None:
        self.model, self.head, self.logits, self.labels = model, head, logits, labels
        self.targets = _targets(labels, shifted)
        self.x: Tensor | None = None
        self.found: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """In the place of the head."""
        if self.x is not None:
            raise _UnforeseenError
        self.x = x
        return x.new_empty(*x.shape[:-2], 0, self.width)

    @property
    def width(self) -> int:
        return getattr(self.head, "out_features", None) or self.head.weight.shape[0]  # type: ignore[union-attr, index, return-value]

    def loss(
        self, logits: Any = None, labels: Any = None, vocab_size: int = 0, num_items_in_batch: Any = None,
        ignore_index: int = IGNORED, shift_labels: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of `ForCausalLMLoss`."""
        if self.x is None or self.found is not None or ignore_index != IGNORED:
            raise _UnforeseenError
        if labels is not self.labels:  # the model has changed them
            self.targets = _targets(labels, shift_labels)
        if self.targets.labels.numel() != self.x.shape[:-1].numel():
            raise _UnforeseenError
        x, places, targets = self.x.flatten(0, -2), self.targets.places(), self.targets.labels.to(self.x.device)
        places = None if places is None else places.to(x.device)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum() if places is None else len(places)
        options = {"places": places, "logits": self.logits, "divisor": num_items_in_batch}
        options["smoothing"] = _active.smoothing
        self.found = linear_cross_entropy(x, self.head, targets, **options)
        return self.found

    def lazy(self, to_float: bool) -> LazyLogits:
        """The logits, for whoever reads them."""
        x, head, logits = self.x, self.head, self.logits
        assert x is not None

        def compute() -> Tensor:
            return logits(head(x).float() if to_float else head(x))

        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        shape, differentiable = (*x.shape[:-1], self.width), torch.is_grad_enabled() and x.requires_grad
        return LazyLogits(compute, shape, torch.float32 if to_float else dtype, x.device, differentiable)


def body(plain: Any, head: str, scale: float, cap: float, to_float: bool) -> dict[str, Any]:
    """The members of the faster class."""
    parameters = list(inspect.signature(plain.forward).parameters)
    place = parameters.index(_LABELS) - 1  # without self
    logits = Logits(scale, cap)

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        labels = options.get(_LABELS, args[place] if place < len(args) else None)
        if not hasattr(type(self), "fastlora_plain"):  # kept by a wrapper since before `restore`
            labels = None
        if labels is None or gathered_by(self._modules[head]) or not _takes(self, labels, options, args[place + 1 :]):
            return plain.forward(self, *args, **options)
        call = _Call(self, self._modules[head], logits, labels, options.get("shift_labels"))
        _active.calls.append(call)
        try:
            found = plain.forward(self, *args, **options)
        except _UnforeseenError:
            call.found = None
        finally:
            _active.calls.pop()
        if call.found is None and _active.smoothing:
            raise RuntimeError(
                f"{plain.__name__} does with its head, its labels or its loss what a trial did not show, and its own "
                "loss has no label smoothing: set label_smoothing_factor to 0, or speed_up to false"
            )
        if call.found is None:
            warnings.warn(
                f"{plain.__name__} does with its head, its labels or its loss what a trial did not show: this forward "
                "is made twice, the second time by its own code; speed_up(model, loss=False) leaves its loss alone",
                stacklevel=2,
            )
            return plain.forward(self, *args, **options)
        found["logits"] = call.lazy(to_float)
        return found

    def own_or(stand_in: Callable[[_Call], Any], own: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get(self: Any) -> Any:
            if not torch.compiler.is_compiling() and _active.calls and _active.calls[-1].model is self:
                return stand_in(_active.calls[-1])
            return own(self)

        return get

    return {
        "forward": forward,
        head: property(own_or(_Head, lambda self: self._modules[head])),
        "loss_function": property(own_or(lambda call: call.loss, plain.loss_function.fget), plain.loss_function.fset),
    }


class _Head:
    """What a model finds under its head's name while it computes a loss."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def __call__(self, x: Tensor) -> Tensor:
        return self._call.take(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.head, name)


def _takes(model: Any, labels: Any, options: dict[str, Any], rest: tuple[Any, ...]) -> bool:
    """Whether this call's loss can be computed from hidden states."""
    dict_out = options.get("return_dict")
    if dict_out is None:
        dict_out = getattr(model.config, "return_dict", True)
    return (
        type(labels) is Tensor and labels.dim() == 2 and labels.dtype is torch.int64
        and dict_out and not rest and _is_zero(options.get("logits_to_keep", 0))
        and options.get("ignore_index", IGNORED) == IGNORED
        and not seen_by_others(labels, None) and _loss_of(model) is _own_loss()
    )  # fmt: skip


def _is_zero(keep: Any) -> bool:
    return type(keep) is int and keep == 0


def _targets(labels: Tensor, shifted: Tensor | None) -> _Targets:
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    shifted = shifted.flatten()
    if (known := _active.targets) is not None:
        return _Targets(shifted, known, lambda: len(known))
    counts = shifted != IGNORED
    if labels.device.type == "cpu":
        order = counts.nonzero()[:, 0]
        return _Targets(shifted, order, lambda: len(order))
    if labels.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _Targets(shifted, None, lambda: len(shifted))
    order = counts.to(torch.uint8).argsort(descending=True, stable=True)
    number = torch.empty((), dtype=torch.int64, pin_memory=True)
    number.copy_(counts.sum(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> int:
        arrived.synchronize()
        return int(number)

    return _Targets(shifted, order, read)
