"""From the last hidden states to the loss: the head, logits and cross-entropy, each way it is done.

    hf                 transformers from 4.50: logits in fp32 and their log-softmax; the targets are shifted
    hf-shifted         before: the same and a copy of the fp32 logits without the last position
    hf-shifted-kept    the same, while the logits in 16 bits are alive
    fused, fused-kept  these two with a fused cross-entropy, which writes its gradient over the shifted copy
    chunks             Liger-Kernel's fused linear cross-entropy: logits of some rows at a time, gradients in forward
    fastlora           the same, by the rows of `ops/loss.py`; -min: by the fewest

Sources: `modeling_llama.py` and `loss/loss_utils.py` of transformers at these versions;
`ops/fused_linear_cross_entropy.py` of Liger-Kernel; `aten/src/ATen/native/LossNLL.cpp` of PyTorch.
"""

from fastlora.memory.layer import Layers, cast, norm, scaled
from fastlora.memory.sizes import FP32, HALF, Parameter, Sized, apply

KINDS = ("hf", "hf-shifted", "hf-shifted-kept", "fused", "fused-kept", "chunks", "fastlora", "fastlora-min")
FASTLORA_VALUES, _ROWS, _TILE = (
    2**26,
    128,
    64,
)  # logits at once, at most, and rows: `_VALUES`, `_ROWS`, `_TILE` of ops/loss.py


def loss_of(
    run: Layers, kind: str, last: list[Sized], final: Parameter | None, head: Parameter | None, softcap: bool
) -> tuple[Sized, Sized | None]:
    """[x [tokens, hidden]], which is emptied -> the loss, and the logits that the model returns with it."""
    h = norm(run, last.pop(), final, "final norm")  # the model holds it until it returns
    with run.book.said(term="logits and loss"):
        if kind in ("chunks", "fastlora", "fastlora-min"):
            return _chunks(run, kind, h, head), None
        held = [_head(run, h, head)]
        if softcap:
            held.append(_capped(held.pop()))
        logits = held[0] if kind == "hf" or kind.endswith("kept") else None
        return _cross_entropy(run, kind, held), logits


def _head(run: Layers, h: Sized, weight: Parameter | None) -> Sized:
    elements = run.tokens * run.shape.vocabulary
    if weight is not None:
        return apply("logits", [h, weight], elements, h.width, saves=[h])
    width: float = HALF if run.autocast else max(run.width, run.head_width)
    h = cast(h, width, "x for the head")
    return apply("logits", [h], elements, width)


def _capped(logits: Sized) -> Sized:
    logits = scaled(logits, "logits, scaled")
    logits = apply("tanh of logits", [logits], logits.elements, logits.width, saves_result=True)
    return scaled(logits, "logits, capped")


def _cross_entropy(run: Layers, kind: str, held: list[Sized]) -> Sized:
    elements = held[0].elements
    if "gpt" in run.shape.flags:  # no fp32 outside of autocast; and one copy more, seen in all its cases
        width: float = FP32 if run.autocast else held[0].width
        extra = run.book.tensor("logits, again", elements, width)
    else:
        width, extra = FP32, None
    logits = cast(held.pop(), width, "logits in fp32")
    if kind != "hf":
        shifted = apply("logits, shifted", [logits], elements, width)
        if kind.startswith("fused"):
            return apply("loss", [shifted], 1, FP32, saves=[shifted])
        logits, shifted = shifted, logits
    found = apply("loss", [apply("log-softmax", [logits], elements, width, saves_result=True)], 1, FP32)
    del extra
    return found


def _chunks(run: Layers, kind: str, h: Sized, head: Parameter | None) -> Sized:
    shape = run.shape
    if kind == "chunks":
        parts = -(-shape.vocabulary // shape.hidden)
        rows = 1 << (max(1, -(-run.tokens // parts)) - 1).bit_length()
        per_logit: float = HALF + FP32
    else:
        most = max(_ROWS, FASTLORA_VALUES // shape.vocabulary // _ROWS * _ROWS) if kind == "fastlora" else _ROWS
        rows = -(-run.tokens // -(-run.tokens // most) // _TILE) * _TILE
        per_logit = HALF + FP32
    rows = min(rows, run.tokens)
    if kind.startswith("fastlora"):  # rows with a target, chosen before the head
        h = apply("hidden states with a target", [h], h.elements, h.width)
    gradient = run.book.tensor("d x of the loss", h.elements, h.width)
    d_head = [run.book.tensor("d head", head.elements, FP32, "gradients")] if head is not None else []
    logits = run.book.tensor("logits of some rows", rows * shape.vocabulary, per_logit)
    del logits
    inputs = [h] if head is None else [h, head]
    return apply("loss", inputs, 1, FP32, saves=[gradient, *d_head])
