"""A training step, forward and backward, on tensors without values: what it holds at its peak, and when that is."""

from collections import deque
from dataclasses import dataclass

from fastlora.memory.layer import Layer, Layers, scaled
from fastlora.memory.loss import loss_of
from fastlora.memory.sizes import FP32, INT64, Sized, apply, backward, checkpointed

_SCALED = ("granite", "gemma", "gemma2", "gemma3_text")  # multiply their embeddings


@dataclass(frozen=True)
class Step:
    """How a step runs over its layers.

    Attributes:
        checkpointing: "none", "full", "selective" (products and attention are kept) or "offload" (as full, and the
            inputs of layers wait in host memory).
        again: as many bytes as the inputs of layers have once more, while layers are recomputed.
        loss: a name of `loss.KINDS`.
        logits_kept: whether what the model returned is alive in backward, as in a loop of one's own.
        micro_batches: forward and backward passes before the optimizer's step.
        residual_width: bytes of a value of the embedding's output.
        inputs_train: the embedding's output needs a gradient (checkpointing, or a trained prompt).
    """

    checkpointing: str = "none"
    again: bool = False
    loss: str = "hf"
    logits_kept: bool = False
    micro_batches: int = 1
    residual_width: float = 2
    inputs_train: bool = False


def run_step(run: Layers, step: Step) -> None:
    """Count a step in the book of `run`. What is there before it must have been held before."""
    shape, book = run.shape, run.book
    layers = [Layer(run) for _ in range(shape.layers)]
    table = run.parameter(shape.embeddings, run.width) if run.full else None
    head = run.parameter(shape.head, run.width) if run.full and not shape.tied else table
    final = run.parameter(shape.final_norm, run.norm_width) if run.full else None
    if step.micro_batches > 1:  # as in the second: there are gradients to add to
        for p in run.parameters:
            p.hold_gradient()
    with book.said(doing="forward"):
        ids = book.tensor("ids, mask, labels", run.tokens * 3, INT64, "batch")
        x = book.tensor("embeddings", run.tokens * shape.hidden, step.residual_width)
        if table is not None:
            x = apply("embeddings", [table], x.elements, x.width, in_place=x)
        elif step.inputs_train:
            x = apply("embeddings", [run.parameter(0, 0)], x.elements, x.width, in_place=x)
        embedded = x  # a leaf that needs a gradient: the graph holds it
        if shape.model_type in _SCALED:
            x = scaled(x, "embeddings, scaled")
        more: list[Sized] = []
        for layer in layers:
            x = _through(run, layer, x, step, more)
    if not book.recording:  # logits of the last token of each sample, as in generation
        book.tensor("logits", run.samples * shape.vocabulary, FP32, "logits and loss")
        return
    with book.said(doing="the loss"):
        last = [x]
        del x
        found, logits = loss_of(run, step.loss, last, final, head, "softcap" in shape.flags)
        run.leave_autocast()
        if not step.logits_kept:
            logits = None
    with book.said(doing="backward"):
        backward(found)
        more.clear()
    del found, logits, ids, embedded


def _through(run: Layers, layer: Layer, x: Sized, step: Step, more: list[Sized]) -> Sized:
    if step.checkpointing == "none":
        return layer(x)

    kept: deque[Sized] = deque()

    def once(x: Sized) -> Sized:
        again = run.book.recording
        if again and step.again and not more:
            more.append(run.book.tensor("inputs of layers, again", x.elements * (run.shape.layers - 2), x.width))
        if step.checkpointing == "selective":
            run.kept = kept
        if again and step.checkpointing == "full" and run.lora == "fastlora":
            run.expanded = expanded
        found = layer(x)
        run.kept = run.expanded = None
        if again:
            run.leave_autocast()
        return found

    expanded: list[Sized] = []
    return checkpointed("input of a layer", once, x, kept=step.checkpointing != "offload", after=expanded.clear)
