"""The grouped linear expert by expert, each by `ops.linear.lora_linear`; the numbers of rows are read on the host.

torch.compile cannot look into a loop whose lengths are data, so under it this is one operator, whose backward goes
through the experts again. It takes dense weights [E, N, K] of any strides, or an NF4 stack [E N, K].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.autograd import refuse_second_derivative
from fastlora.ops.linear import lora_linear, nf4_linear
from fastlora.ops.nf4 import NF4Weight

_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor? bias, Tensor offsets, Tensor? absmax, "
    "Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int k, int blocksize, float scaling"
)
_TRAINED = 5  # the first operands: x, a dense weight, A, B, bias
torch.library.define("fastlora::grouped_segments", f"({_OPERANDS}) -> Tensor")
torch.library.define(
    "fastlora::grouped_segments_backward",
    f"(Tensor dy, {_OPERANDS}, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def one_by_one(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    offsets: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `grouped.grouped_lora_linear`."""
    if not torch.compiler.is_compiling():
        return _loop(x, weight, lora_a, lora_b, scaling, offsets, bias)
    if isinstance(weight, NF4Weight):
        codes, *scales = weight.tensors()
        packed = (*scales, *weight.shape, weight.blocksize)
        return torch.ops.fastlora.grouped_segments(x, codes, lora_a, lora_b, bias, offsets, *packed, float(scaling))
    dense = (None, None, None, None, weight.shape[0] * weight.shape[1], weight.shape[2], 0)
    return torch.ops.fastlora.grouped_segments(x, weight, lora_a, lora_b, bias, offsets, *dense, float(scaling))


def _loop(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    offsets: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    ends = offsets.tolist()
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    # One node in the graph for all: with a slice per expert, each expert would make a gradient of the size of x.
    *rows, unowned = x.split([*lengths, x.shape[0] - ends[-1]])  # [rows of the expert, K] each
    weights = weight.unbind(0) if isinstance(weight, Tensor) else _Stack(weight, len(ends))
    biases = [None] * len(ends) if bias is None else bias.unbind(0)
    adapters = None
    if lora_a is not None and lora_b is not None:
        adapters = list(zip(lora_a.unbind(0), lora_b.contiguous().unbind(0), strict=True))
    results = []
    for expert, part in enumerate(rows):
        if not part.shape[0]:
            continue
        w, b = weights[expert], biases[expert]
        if adapters is not None:
            results.append(lora_linear(part, w, *adapters[expert], scaling, b))  # [rows of the expert, N]
        else:
            results.append(nf4_linear(part, w, b) if isinstance(w, NF4Weight) else F.linear(part, w, b))
    if unowned.shape[0] or not results:
        results.append(x.new_zeros(unowned.shape[0], weights[0].shape[0]))
    return results[0] if len(results) == 1 else torch.cat(results)


class _Stack:
    """The experts of an NF4 stack as weights of their own, read one by one."""

    def __init__(self, weight: NF4Weight, experts: int) -> None:
        self.weight, self.n = weight, weight.shape[0] // experts

    def __getitem__(self, expert: int) -> NF4Weight:
        return self.weight.rows(expert * self.n, (expert + 1) * self.n)


def _forward(*operands: Any) -> Tensor:
    x, weight, lora_a, lora_b, bias, offsets, absmax, *scales, n, k, blocksize, scaling = operands
    if absmax is not None:
        weight = NF4Weight(weight, absmax, (n, k), x.dtype, blocksize, *scales)
    with torch.autocast(x.device.type, enabled=False):
        return _loop(x, weight, lora_a, lora_b, scaling, offsets, bias)


def _backward(dy: Tensor, *operands_and_needs: Any) -> tuple[Tensor, ...]:
    *operands, needs = operands_and_needs
    with torch.enable_grad():
        leaves = [
            value.detach().requires_grad_() if need else value
            for value, need in zip(operands[:_TRAINED], needs, strict=True)
        ]
        y = _forward(*leaves, *operands[_TRAINED:])
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True))
    return tuple(next(found).contiguous() if need else dy.new_empty(0) for need in needs)


def _forward_fake(*operands: Any) -> Tensor:
    x, offsets, n = operands[0], operands[_TRAINED], operands[10]
    return x.new_empty((x.shape[0], n // offsets.shape[0]))


def _backward_fake(dy: Tensor, *operands_and_needs: Any) -> tuple[Tensor, ...]:
    *operands, needs = operands_and_needs
    return tuple(
        value.new_empty(value.shape) if need else dy.new_empty(0)
        for value, need in zip(operands[:_TRAINED], needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.numbers = inputs[10:]


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    needs = list(ctx.needs_input_grad[:_TRAINED])
    found = torch.ops.fastlora.grouped_segments_backward(dy, *ctx.saved_tensors, *ctx.numbers, needs)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 9


torch.library.impl("fastlora::grouped_segments", "CompositeExplicitAutograd", _forward)
torch.library.impl("fastlora::grouped_segments_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("fastlora::grouped_segments", _forward_fake)
torch.library.register_fake("fastlora::grouped_segments_backward", _backward_fake)
torch.library.register_autograd("fastlora::grouped_segments", _autograd, setup_context=_setup_context)
