"""Which layers of a model recompute what: as little as a device's memory allows.

Of a checkpointed layer its input is held ("full"), or that and what its linears and its attention return ("selective",
`keep_linears`); of one that is not, whatever its backward reads ("none"). How much that is for a token is counted in a
forward over a few tokens, in the model as it is, on the device where it is.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.layers import bases, between
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.sites import blocks as _layers
from fastlora.ops import loss
from fastlora.ops.expanded import keep_weights
from fastlora.ops.keeping import keep_linears
from fastlora.ops.offload import offloaded

POLICIES = ("min", "full", "selective", "none", "auto")
_COUNTED = 64  # tokens
_MARGIN = 0.05  # of the memory, for what the allocator cannot use
_PRODUCT = 2**28  # bytes of a base product that is held in fp32
_TRAINED = 12  # bytes of a trained number: its gradient and AdamW's moments


class Checkpointing(NamedTuple):
    """What `checkpoint_layers` chose: numbers of layers, and bytes of the step's memory above the model's, by count."""

    full: int
    selective: int
    none: int
    needed: int
    memory: int

    def __str__(self) -> str:
        held = {"all": self.full, "all but linears and attention": self.selective, "nothing": self.none}
        chosen = ", ".join(f"{count} layers recompute {what}" for what, count in held.items() if count)
        if not self.memory:
            return chosen or "as the model's own switch has it"
        counted = f"{chosen}; counted {self.needed / 1e9:.2f} GB of {self.memory / 1e9:.2f}"
        return counted if self.needed <= self.memory else f"{counted}, which is too little: use fewer tokens"


class Counted(NamedTuple):
    """Bytes a token that layers hold for backward; one number a layer."""

    none: list[int]
    linears: list[int]
    input: int


def checkpoint_layers(
    model: Any, policy: str = "auto", *, tokens: int = 0, memory: int | None = None, offload: bool = False
) -> Checkpointing:
    """Set gradient checkpointing of a transformers model, layer by layer; gradients stay the same.

    Instead of `gradient_checkpointing_enable`, and of `gradient_checkpointing=True` in TrainingArguments. Call it after
    `replace_linear` and `speed_up`, with the model on its device.

    Args:
        policy: "full", "selective", "none", or "auto": "selective" for as many layers as fit, then "none" for as many
            of them as fit, or "min" where not even "full" does. On CUDA a "full" layer's expanded weights are held from
            its recomputation to its backward; with "min" they are expanded again.
        tokens: of a micro-batch at most, for "auto".
        memory: bytes that a step may take above the model's own, for "auto"; by default what is free now.
        offload: let the inputs of checkpointed layers wait in host memory, copied while layers compute; on CUDA.
    Returns:
        What was chosen. The bytes are a count for a part and an estimate for the rest: gradients and moments of what is
        trained, expanded weights, a part of the loss, one layer's backward.
    Raises:
        ValueError: an unknown policy, "auto" without tokens, a model without layers that can be checkpointed, or
            `offload` of a model that is not on a CUDA device. Nothing is changed.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    layers = _layers(model)
    if not layers and (policy in ("none", "auto") or not getattr(model, "supports_gradient_checkpointing", False)):
        raise ValueError(f"{type(model).__name__} has no layers that can be checkpointed one by one")
    if policy == "auto" and tokens < 1:
        raise ValueError("policy 'auto' needs the tokens of a micro-batch")
    if offload and not (layers and _on_cuda(model)):
        raise ValueError("offload moves inputs of a model's layers from a CUDA device to the host; this model has none")
    if not layers:  # one switch for all that it checkpoints
        _enable(model, policy)
        return Checkpointing(0, 0, 0, 0, 0)
    count, needed, free = len(layers), 0, 0
    kinds = [policy] * count
    if policy == "auto":
        free = _free(model) if memory is None else memory
        counted, most = count_bytes(model, layers), int(free * (1 - _MARGIN))
        kinds, needed = plan(counted._replace(input=0) if offload else counted, _fixed(model, tokens), tokens, most)
        if needed > most:
            kinds, needed = ["min"] * count, needed - _kept_weights(model)
    _enable(model, "full")
    for layer, kind in zip(layers, kinds, strict=True):
        layer.gradient_checkpointing = kind != "none"
        function = _offloading if offload else checkpoint
        layer._gradient_checkpointing_func = functools.partial(function, **_options(kind, _on_cuda(model)))
    selective, none = (kinds.count(kind) for kind in ("selective", "none"))
    full = count - selective - none
    return Checkpointing(full, selective, none, needed, free)


def plan(counted: Counted, fixed: int, tokens: int, memory: int) -> tuple[list[str], int]:
    """(each layer's policy, bytes of all): the last layers hold most, for theirs is freed before others recompute.

    Args:
        fixed: bytes that no policy changes.
    """
    count = len(counted.none)
    kinds = ["full"] * count
    needed = fixed + tokens * (
        count * counted.input + 2 * max(counted.none)
    )  # one is computed again, and its gradients
    for place in reversed(range(count)):
        more = tokens * counted.linears[place]
        if needed + more > memory:
            return kinds, needed
        kinds[place], needed = "selective", needed + more
    for place in reversed(range(count)):
        more = tokens * max(0, counted.none[place] - counted.linears[place] - counted.input)
        if needed + more > memory:
            break
        kinds[place], needed = "none", needed + more
    return kinds, needed


@torch.enable_grad()
def count_bytes(model: Any, layers: list[Any]) -> Counted:
    """What each layer holds, a token: by a forward in training mode over `_COUNTED` tokens, watching what is saved.

    The model's modes and the random states are as before.
    """
    embedding = model.get_input_embeddings()
    ids = torch.arange(_COUNTED, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    none, linears, inside = [0] * len(layers), [0] * len(layers), [-1]
    seen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def watch(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside[0] >= 0 and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())  # the graph holds it until all is counted
            none[inside[0]] += storage.nbytes()
        return tensor

    devices = [ids.device] if ids.is_cuda else []
    modes = [(module, module.training) for module in model.modules()]
    with (
        torch.random.fork_rng(devices),
        _watched(layers, inside, linears),
        torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor),
    ):
        hook = embedding.register_forward_hook(lambda module, args, y: y.requires_grad_() if y.is_leaf else None)
        try:
            found = model.train()(input_ids=ids, use_cache=False)
        finally:
            hook.remove()
            for module, mode in modes:
                module.training = mode
    hidden = model.config.get_text_config().hidden_size * embedding.weight.element_size()
    del found
    return Counted([n // _COUNTED for n in none], [n // _COUNTED for n in linears], hidden)


@contextmanager
def _watched(layers: list[Any], inside: list[int], linears: list[int]) -> Iterator[None]:
    """While this is open, `inside` holds the number of the layer that runs; `linears` gets what its linears keep."""
    hooks, was, contexts = [], [layer.gradient_checkpointing for layer in layers], {}

    def enter(place: int) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            inside[0], contexts[place] = place, keep_linears()[0]
            contexts[place].__enter__()

        return before

    def leave(place: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            recorder: Any = contexts[place]
            recorder.__exit__(None, None, None)
            linears[place] += recorder.taken.nbytes
            inside[0] = -1

        return after

    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = False
        hooks += [layer.register_forward_pre_hook(enter(place)), layer.register_forward_hook(leave(place))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, on in zip(layers, was, strict=True):
            layer.gradient_checkpointing = on


def _options(kind: str, on_cuda: bool) -> dict[str, Any]:
    """Of torch's checkpoint. A CPU expands weights into the same memory again and again, faster than into fresh."""
    if kind == "selective":
        return {"use_reentrant": False, "context_fn": keep_linears}
    return {"use_reentrant": False} | ({"context_fn": keep_weights} if on_cuda and kind == "full" else {})


def _offloading(*args: Any, **options: Any) -> Any:
    """torch's checkpoint, whose own inputs wait on the host."""
    with offloaded():
        return checkpoint(*args, **options)


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _enable(model: Any, kind: str) -> None:
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the older name
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": _options(kind, _on_cuda(model))})


def _fixed(model: Any, tokens: int) -> int:
    """Bytes of a step that do not depend on what is recomputed."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config.get_text_config()
    on_cuda = _on_cuda(model)
    if any("loss" in between.parts_of(module) for module in model.modules()):
        logits = 6 * min(loss._VALUES["cuda" if on_cuda else "cpu"], tokens * config.vocab_size)
    else:
        logits = 10 * tokens * config.vocab_size  # in 16 bits, in fp32, and the gradient in fp32
    widest = max((m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features")), default=0)
    return _TRAINED * trained + logits + 2 * 2 * widest + _kept_weights(model) + (_PRODUCT if on_cuda else 0)


def _kept_weights(model: nn.Module) -> int:
    """Bytes of the expanded weights that a "full" layer holds at most."""
    return max(map(_expanded_bytes, _layers(model)), default=0) if _on_cuda(model) else 0


def _expanded_bytes(layer: nn.Module) -> int:
    """Of a layer's NF4 weights in 16 bits, which `keep_weights` holds for one layer at a time."""
    packed: list[Any] = [m for m in layer.modules() if isinstance(m, NF4Linear) or bases.is_linear4bit(m)]
    return sum(2 * module.in_features * module.out_features for module in packed)


def _free(model: nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
