"""An output head and its cross-entropy in one operator: logits exist for a few rows at a time.

The gradients are found in forward, while a part's logits are there: dx is saved, and nothing is multiplied again.
They are those of the mean, so that a dy of 1 rounds nothing a second time. In fp16 they are those of the sum, held in
fp32, for a loss scale comes with dy and what it saves would be lost before.

Source: arXiv:2410.10989, section 3.2 (gradients in forward); arXiv:2408.00118, section 2 (capped logits).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.kernels.operands import FLOAT_DTYPES
from fastlora.ops.autograd import computed_in, refuse_second_derivative
from fastlora.ops.backend import backend
from fastlora.ops.operands import wide_product

IGNORED = -100
_VALUES = {"cuda": 2**26, "cpu": 2**22}  # logits at a time
_ROWS, _TILE = 128, 64  # at least; a multiple


class Logits(NamedTuple):
    """What becomes of what a head returns: cap · tanh(scale · z / cap); a cap of 0 is none."""

    scale: float = 1.0
    cap: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """The logits. z: of any shape and dtype."""
        t = z if self.scale == 1 else z * self.scale
        return torch.tanh(t / self.cap) * self.cap if self.cap else t


def linear_cross_entropy(
    x: Tensor, head: nn.Module, labels: Tensor, *, places: Tensor | None = None, logits: Logits | None = None,
    smoothing: float = 0.0, ignored: int = IGNORED, divisor: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of `logits(head(x))`, summed over rows, over `divisor`: 0-d fp32, in nats.

    Differentiable in x and the head.

    A frozen `nn.Linear` without bias is multiplied directly, on CUDA in fp32 from its 16-bit operands; any other head,
    adapted or quantized or with hooks, is called for each part.

    Args:
        x: [T, H]. head: H to V. labels: [T], int64, in [0, V) or `ignored`.
        places: [n], int64: the rows that count, each once; all by default. `labels` are those of all T rows.
        smoothing: share of the target that is spread over all V classes.
        divisor: a number, or a tensor of one.
    Returns:
        The sum over divisor; its sum is 0 where no row counts.
    Raises:
        RuntimeError: a second derivative is asked for.
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    if not torch.is_grad_enabled():
        x, trained = x.detach(), []
    if not isinstance(divisor, Tensor):
        divisor = torch.full((), divisor, dtype=torch.float32, device=x.device)
    factor = divisor.detach().to(x.device, torch.float32).reciprocal().reshape(())
    asked = _Asked(head, logits or Logits(), smoothing, ignored, factor)
    total: Tensor = _apply(x, labels, places, asked, *trained)
    return total


class _Asked(NamedTuple):
    head: nn.Module
    logits: Logits
    smoothing: float
    ignored: int
    factor: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, places: Tensor | None, asked: _Asked, *trained: Tensor) -> Tensor:
        needs = ctx.needs_input_grad
        factor, fp16 = asked.factor, computed_in(x) is torch.float16
        asked = asked._replace(factor=torch.ones_like(factor)) if fp16 else asked
        make = torch.zeros_like if places is not None else torch.empty_like
        dx = make(x, dtype=torch.float32 if fp16 else x.dtype) if needs[0] else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained if any(needs)]
        weight = _plain_weight(asked.head, x)
        count = len(x) if places is None else len(places)
        losses = torch.empty(count, dtype=torch.float32, device=x.device)
        width = weight.shape[0] if weight is not None else getattr(asked.head, "out_features", 2**15)
        step = _rows_at_a_time(count, width, x.is_cuda)
        for start in range(0, count, step):
            part = slice(start, start + step)
            rows = part if places is None else places[part]
            found = _of_part(x[rows], labels[rows], weight, asked, trained, (dx is not None, bool(sums)))
            losses[part], dpart, dtrained = found
            if dx is not None and dpart is not None:
                dx[rows] = dpart.to(dx.dtype)
            for total, more in zip(sums, dtrained, strict=True):
                total += more
        ctx.save_for_backward(dx, *sums)
        ctx.dtypes, ctx.factor = [x.dtype, *(p.dtype for p in trained)], factor if fp16 else None
        return losses.sum() * factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        dy = dy if ctx.factor is None else dy * ctx.factor
        found = [None if t is None else _scaled(t, dy, d) for t, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return found[0], None, None, None, *found[1:]


_apply = super(torch.autograd.Function, _LinearCrossEntropy).apply  # without its search for torch.func's wrappers


def _rows_at_a_time(count: int, width: int, cuda: bool) -> int:
    """Rows of a part: as equal as whole tiles allow, for a short one would read the whole weight for a few rows."""
    most = max(_ROWS, _VALUES["cuda" if cuda else "cpu"] // width // _ROWS * _ROWS)
    return -(-count // (-(-count // most) or 1) // _TILE) * _TILE or 1


def _scaled(t: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """t · dy, multiplied in fp32: a loss scale may be more than fp16 holds."""
    return torch.mul(t, dy.reshape(1), out=torch.empty_like(t, dtype=dtype))


def _plain_weight(head: nn.Module, x: Tensor) -> Tensor | None:
    """The weight of a head that does nothing but multiply, in the dtype of the product."""
    replaced = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    if type(head) is not nn.Linear or head.bias is not None or replaced or type(head.weight) is not nn.Parameter:
        return None
    dtype, weight = computed_in(x), head.weight.detach()
    if weight.device != x.device or (weight.dtype is not dtype and not torch.is_autocast_enabled(x.device.type)):
        return None  # the head says what is wrong
    return weight.to(dtype)


def _of_part(
    x: Tensor, labels: Tensor, weight: Tensor | None, asked: _Asked, trained: Sequence[Tensor],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:  # fmt: skip
    """(losses [rows], dx or None, gradients of the trained or none). wanted: dx, those of the trained."""
    if weight is not None:
        x = x.to(weight.dtype)
        z = wide_product(x, weight.t()) if x.is_cuda else x @ weight.t()
        losses, dz = _cross_entropy(z, labels, asked, x.dtype if any(wanted) else None, in_place=True)
        if dz is None:
            return losses, None, ()
        fp16 = x.dtype is torch.float16  # which has too few exponents for sums of gradients
        dx = None if not wanted[0] else wide_product(dz, weight) if fp16 else dz @ weight
        if not wanted[1]:
            return losses, dx, ()
        return losses, dx, (wide_product(dz.t(), x) if fp16 or x.is_cuda else dz.t() @ x,)
    with torch.set_grad_enabled(any(wanted)):
        leaf = x.detach().requires_grad_(wanted[0])
        z = asked.head(leaf[None]).flatten(0, 1)
        losses, dz = _cross_entropy(z.detach(), labels, asked, z.dtype if any(wanted) else None)
    if dz is None:
        return losses, None, ()
    inputs = [leaf] * wanted[0] + list(trained) * wanted[1]
    found = torch.autograd.grad(z, inputs, dz, allow_unused=True)
    found = tuple(torch.zeros_like(at) if g is None else g for g, at in zip(found, inputs, strict=True))
    return losses, found[0] if wanted[0] else None, found[wanted[0] :]


def _cross_entropy(
    z: Tensor, labels: Tensor, asked: _Asked, dtype: torch.dtype | None, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(losses [rows], their gradient [rows, V] in `dtype`, or None without one). z: [rows, V]."""
    _, (scale, cap), smoothing, ignored, factor = asked
    labels = labels.to(z.device)  # where a head is on a device of its own
    if z.dtype in FLOAT_DTYPES and backend(z.device).name == "triton":
        from fastlora.kernels.cross_entropy import cross_entropy

        z = z if z.stride(1) == 1 else z.contiguous()
        dz = None if dtype is None else z if in_place and z.dtype is dtype else torch.empty_like(z, dtype=dtype)
        return cross_entropy(z, labels, scale, cap, smoothing, ignored, factor, dz), dz
    t = asked.logits(z.float() if cap or scale != 1 else z)
    found = t.log_softmax(1, dtype=torch.float32)  # then, in its place, the gradient
    counts = labels != ignored
    label = labels.where(counts, 0)[:, None]
    losses = (smoothing - 1) * found.gather(1, label)[:, 0]
    if smoothing:
        losses -= smoothing * found.mean(1)
    losses = losses.where(counts, 0)
    if dtype is None:
        return losses, None
    found.exp_().scatter_add_(1, label, torch.full_like(found[:, :1], smoothing - 1))
    if smoothing:
        found -= smoothing / found.shape[1]
    found *= scale * factor * counts[:, None]
    if cap:
        found *= 1 - (t / cap) ** 2
    return losses, found.to(dtype)
