"""Examples of a micro-batch in one row, without padding; each sees itself alone.

The row has the same tokens, targets and loss that the padded batch has, so packing changes how long a step takes and
nothing else. Position ids begin again at each example. Attention gets where each begins as `cu_seq_lens_q`, the name
that transformers has for it: on CUDA one variable-length call of flash attention, which torch carries; elsewhere, and
in fp32, one call an example.
"""

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.training.data import IGNORED, PAD_MULTIPLE, TokenSet

NAME = "fastlora_packed"
_FLASH = (torch.bfloat16, torch.float16)


class _Packed(threading.local):
    on = False


_packed = _Packed()


class Room(NamedTuple):
    """For rows of few shapes, which CUDA graphs need: at most so many examples, of at most so many tokens."""

    examples: int
    longest: int


def pack(examples: TokenSet, rows: Sequence[int], pad_token_id: int, room: Room | None = None) -> dict[str, Any]:
    """The examples `rows` one after the other in a row; what fills it up is one more, or several.

    It is filled to a multiple of `PAD_MULTIPLE`. With a room, to a rung of a ladder that has four in each doubling, and
    examples of no tokens fill `cu_seq_lens_q`.

    Returns:
        input_ids, position_ids, labels: [1, tokens] int64. An example's first token is predicted from nothing.
        cu_seq_lens_q, cu_seq_lens_k: [examples + 1] int32, where each begins, and the end. max_length_q, max_length_k:
        the longest's tokens.
    """
    lengths = [int(examples.lengths[row]) for row in rows]
    unit = PAD_MULTIPLE if room is None else _unit(sum(lengths))
    rest, most = -sum(lengths) % unit, max(lengths) if room is None else room.longest
    while rest > 0:
        lengths.append(min(rest, most))
        rest -= most
    places = len(lengths) if room is None else room.examples + -(-unit // most)
    ends = np.cumsum([0, *lengths, *[0] * (places - len(lengths))]).tolist()
    ids = np.full(ends[-1], pad_token_id, dtype=np.int64)
    labels = np.full(ends[-1], IGNORED, dtype=np.int64)
    for row, start in zip(rows, ends, strict=False):
        first, end = examples.offsets[row], examples.offsets[row + 1]
        ids[start : start + end - first] = examples.tokens[first:end]
        labels[start + 1 : start + end - first] = examples.labels[first + 1 : end]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    begins = torch.tensor(ends, dtype=torch.int32)
    rows_of_one = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {
        **{name: torch.from_numpy(array)[None] for name, array in rows_of_one.items()},
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), begins),
        **dict.fromkeys(("max_length_q", "max_length_k"), most),
    }


def _unit(tokens: int) -> int:
    """A quarter of the largest power of two below, and a size that suits the kernels."""
    return max(64, 1 << max(0, (tokens - 1).bit_length() - 3))


@contextmanager
def packed() -> Iterator[None]:
    """For calls of a model with a packed row: no mask is made for it."""
    outer, _packed.on = _packed.on, True
    try:
        yield
    finally:
        _packed.on = outer


def prepare(model: Any, longest: int) -> str:
    """Let a model take packed rows of examples of up to `longest` tokens; why it cannot, or "".

    Its attention is then `NAME`, which without packing is transformers' "sdpa". If it cannot, it is as before.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation
    if own not in ("sdpa", "flash_attention_2", "flash_attention_3"):
        return f"its attention is {own}"
    for name in ("sliding_window", "attention_chunk_size"):
        width = getattr(config, name, None)
        if width and width < longest:
            return f"its attention reaches {width} tokens, fewer than max_length"
    if own == "sdpa":
        if not _register():
            return "this version of transformers has no attention of one's own choice"
        model.set_attn_implementation(NAME)
    reason = _what_goes_wrong(model)
    if reason and own == "sdpa":
        model.set_attn_implementation(own)
    return reason


@functools.cache
def _register() -> bool:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        return False

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        begins = options.get("cu_seq_lens_q")
        if begins is None:
            return sdpa_attention_forward(module, q, k, v, attention_mask, **options)
        dropout, scaling = options.get("dropout", 0.0), options.get("scaling")
        if q.is_cuda and q.dtype in _FLASH and not dropout and q.shape[-1] <= 256:
            return _variable_length(q, k, v, begins, options["max_length_q"], scaling), None
        one: Any = F.scaled_dot_product_attention
        sizes = [size for size in begins.diff().tolist() if size]
        parts = zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True)
        more = {"dropout_p": dropout, "scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
        found = [one(*part, is_causal=True, **more) for part in parts]
        return torch.cat(found, 2).transpose(1, 2).contiguous(), None

    def mask(*args: Any, **options: Any) -> Any:
        return None if _packed.on else sdpa_mask(*args, **options)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    return True


def _variable_length(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scaling: float | None) -> Tensor:
    """q: [1, heads, tokens, size]; k, v with fewer heads or as many. Returns [1, tokens, heads, size]."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    known = inspect.signature(attend).parameters
    options = {"scale": scaling, "window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    options = {name: value for name, value in options.items() if name in known}  # they differ between versions of torch
    rows = (t[0].transpose(0, 1) for t in (q, k, v))
    return attend(*rows, begins, begins, longest, longest, **options)[None]  # type: ignore[no-any-return]


@contextmanager
def watched_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """While this is open, the embeddings of a call are leaves, and in the list that this yields."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        yield seen
    finally:
        hook.remove()


def _what_goes_wrong(model: Any) -> str:
    """Why examples in one row are not what each is alone, by a trial on a few tokens; "" if they are.

    A later example's gradient at an earlier one's embeddings is 0, not merely small, if it does not see it.
    """
    embedding = model.get_input_embeddings()
    device, rows = embedding.weight.device, embedding.weight.shape[0]
    ids = ((rows // 2 + torch.arange(7)) % rows).numpy()
    examples = TokenSet(ids, ids, np.array([0, 3, 7]))
    batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in pack(examples, [0, 1], 0).items()}
    del batch["labels"]
    try:
        with packed(), watched_embeddings(model) as seen:
            found = model.eval()(**batch, use_cache=False).logits[0, 3:7]
        (gradient,) = torch.autograd.grad(found.float().sum(), seen[0])
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"][:, 3:7], use_cache=False).logits[0]
    except Exception as error:
        return f"a packed row could not be tried: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    if gradient[0, :3].abs().max() > 0:
        return "its examples see each other in one row"
    off = (found.float() - alone.float()).norm() / alone.float().norm()
    return "" if off < 0.05 else f"an example's logits are {off:.0%} off in one row with another"
