"""The grouped linear in Triton: one operator forward, one backward, and no wait for the device.

    y[s]  = x[s] W[e]ᵀ + scaling · h[s] B[e]ᵀ + bias[e],     h[s] = x[s] A[e]ᵀ        e: the expert of row s
    dx[s] = dy[s] W[e] + g[s] A[e],                          g[s] = scaling · dy[s] B[e]
    dA[e] = g[e's rows]ᵀ x[e's rows],                        dB[e] = scaling · dy[e's rows]ᵀ h[e's rows]
    dbias[e] = the sum of dy over e's rows: the dB of an h of ones

Five launches: shrink and product forward; the dy pass, the product with the transposed stack and the x pass backward.
Saved: x where dA is wanted, h in fp32 where dB is wanted. W is frozen; a dense stack in training takes another path.

An NF4 stack is expanded inside the product, again for each row tile, at 5 to 8 instructions a weight. Expanding it once
into memory and reading it from there costs 4 bytes a weight, including experts without rows. Both costs are those of
one matrix with S / E rows, E times over, so the same table decides, by M* of `kernels.choice`: 144 to 528 rows an
expert by its model (predicted, not measured for stacks). Above it the stack is expanded, forward and backward, and
never kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.autograd import (
    constant_under_compile,
    eager,
    refuse_func_gradients,
    refuse_second_derivative,
    seen_by_others,
)
from fastlora.ops.backend import backend
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import dense

_OPERANDS = (
    "Tensor offsets, Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, "
    "int n, int k, int blocksize, Tensor? lora_a, Tensor? lora_b, float scaling"
)
torch.library.define(
    "fastlora::grouped_lora_linear", f"(Tensor x, Tensor? bias, {_OPERANDS}, bool save_h) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastlora::grouped_lora_linear_backward",
    f"(Tensor dy, Tensor? x, Tensor? h, {_OPERANDS}, bool need_x, bool need_a, bool need_b, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def refusal(x: Tensor, weight: Tensor | NF4Weight, experts: int, lora_a: Tensor | None, lora_b: Tensor | None) -> str:
    """Why this path does not take a grouped linear of these operands; empty where it does."""
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        return "the stack is trained"
    if weight.device != x.device:
        return "the stack is on another device"
    adapters = [adapter for adapter in (lora_a, lora_b) if adapter is not None]
    if any(adapter.dtype not in (torch.float32, x.dtype) for adapter in adapters):
        return "adapters are neither in fp32 nor in the rows' dtype"
    blocksize = weight.blocksize if isinstance(weight, NF4Weight) else 0
    rank = lora_a.shape[1] if lora_a is not None else 0
    return reason(x.device, x.dtype, weight.dtype, experts, blocksize, rank)


@constant_under_compile
def reason(
    device: torch.device, x_dtype: torch.dtype, dtype: torch.dtype, experts: int, blocksize: int, rank: int
) -> str:
    """As `refusal`, for a stack that is not trained. blocksize: of an NF4 stack, 0 for a dense one of `dtype`."""
    if backend(device).name != "triton":
        return f"the Triton kernels do not run on {device}"
    from fastlora.kernels import grouped as kernel

    return kernel.supports(x_dtype, dtype if not blocksize else None, experts, 0, blocksize, rank)


def words(device: torch.device, n: int, k: int, blocksize: int, rank: int) -> str:
    """What computes a stack of experts [N, K] on this path, by the rows of an expert; blocksize 0: a dense stack."""
    from fastlora.kernels import choice

    product = "grouped product (Triton)"
    if not blocksize:
        return product
    steps = choice.steps("linear", n, k, rank, False, device)
    bounds = [bound for bound, chosen in steps if chosen.kernel != "dequantize"]
    if k % blocksize or not bounds:
        return f"dequantize, then {product}"
    return f"up to {bounds[-1]} rows an expert grouped fused dequantize-GEMM, above dequantize, then {product}"


def grouped_linear(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    offsets: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `ops.grouped.grouped_lora_linear`, for operands that `refusal` does not refuse."""
    parts: tuple[Any, ...] = (weight, None, None, None, None)
    blocksize, experts = 0, offsets.numel()
    if isinstance(weight, NF4Weight):
        parts, blocksize = weight.tensors(), weight.blocksize
    sizes = (weight.shape[-2] // (experts if blocksize else 1), weight.shape[-1], blocksize)
    if lora_a is not None and lora_b is not None and lora_a.dtype != lora_b.dtype:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    save_h = torch.is_grad_enabled() and lora_b is not None and lora_b.requires_grad
    inputs = (x, bias, offsets, *parts, *sizes, lora_a, lora_b, float(scaling), save_h)
    if seen_by_others(x, lora_a):
        refuse_func_gradients()
        return torch.ops.fastlora.grouped_lora_linear(*inputs)[0]
    return _Eager.apply(*inputs)[0] if torch.is_grad_enabled() else _forward(*inputs)[0]


def _stack(x: Tensor, op: str, offsets: Tensor, operands: tuple[Any, ...], rank: int) -> Any:
    """The weights as the kernel takes them: dense [E, N, K], or packed where that is cheaper for this many rows."""
    from fastlora.kernels import choice
    from fastlora.kernels import grouped as kernel

    *tensors, n, k, blocksize = operands
    if not blocksize:
        return tensors[0]
    codes, absmax, *nested = tensors
    experts = offsets.numel()
    weight = NF4Weight(codes, absmax, (experts * n, k), x.dtype, blocksize, *nested)
    rows = -(-x.shape[0] // experts)
    chosen = choice.choose(op, rows, n, k, rank, False, x.device)
    if chosen.kernel == "dequantize" or kernel.supports(x.dtype, None, experts, k, blocksize, rank):
        return dense(weight, x.dtype).view(experts, n, k)
    return weight


def _forward(x: Tensor, bias: Tensor | None, offsets: Tensor, *operands_and_save_h: Any) -> tuple[Tensor, Tensor]:
    from fastlora.kernels import grouped as kernel
    from fastlora.kernels import lora
    from fastlora.kernels.segments import by_offsets

    *operands, lora_a, lora_b, scaling, save_h = operands_and_save_h
    if x.numel() == 0:
        y, h = _forward_fake(x, bias, offsets, *operands_and_save_h)
        return y.zero_(), h.zero_()
    segments, h = by_offsets(offsets, x.shape[0]), None
    if lora_a is not None:
        h = lora.shrink(x, lora_a, lora.Dropout(), segments=segments)  # [S, R]
    stack = _stack(x, "linear", offsets, tuple(operands), lora_a.shape[1] if lora_a is not None else 0)
    y = kernel.grouped_linear(x, stack, segments, h, lora_b, scaling, bias)  # [S, N]
    return y, h if save_h and h is not None else x.new_empty(0, dtype=torch.float32)


@torch.library.register_fake("fastlora::grouped_lora_linear")
def _forward_fake(x: Tensor, bias: Tensor | None, offsets: Tensor, *operands_and_save_h: Any) -> tuple[Tensor, Tensor]:
    *_, n, _, _, lora_a, _, _, save_h = operands_and_save_h
    h_shape = (x.shape[0], lora_a.shape[1]) if save_h and lora_a is not None else (0,)
    return x.new_empty((x.shape[0], n)), x.new_empty(h_shape, dtype=torch.float32)


def _backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, offsets: Tensor, *operands_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastlora.kernels import grouped as kernel
    from fastlora.kernels import lora
    from fastlora.kernels.segments import by_offsets

    *operands, lora_a, lora_b, scaling, need_x, need_a, need_b, need_bias = operands_and_needs
    none, segments = dy.new_empty(0), by_offsets(offsets, dy.shape[0])
    if dy.numel() == 0:
        dx, da, db, dbias = _backward_fake(dy, x, h, offsets, *operands_and_needs)
        return dx.zero_(), da.zero_(), db.zero_(), dbias.zero_()
    g, dx, da, db, dbias = None, none, none, none, none
    if lora_b is not None and (need_x or need_a or need_b):
        g, found = lora.dy_pass(
            dy, lora_b, h if h is not None else dy, scaling, need_x or need_a, need_b, segments=segments
        )
        db = found.to(lora_b.dtype) if found is not None else none  # [E, N, R]
    if need_a:
        assert x is not None
        assert g is not None
        da = lora.x_pass(x, g, lora.Dropout(), lora_a.dtype, segments=segments).to(lora_a.dtype)  # [E, R, K]
    if need_x:
        stack = _stack(dy, "linear_t", offsets, tuple(operands), lora_a.shape[1] if lora_a is not None else 0)
        dx = kernel.grouped_linear_t(dy, stack, segments, g, lora_a)  # [S, K]
    if need_bias:
        of_ones = dy.new_zeros(offsets.numel(), operands[-3], 1)  # B [E, N, 1]; only dB is computed
        _, sums = lora.dy_pass(
            dy, of_ones, dy.new_ones(len(dy), 1, dtype=torch.float32), 1.0, False, True, segments=segments
        )
        assert sums is not None
        dbias = sums.squeeze(2)  # [E, N]
    return dx, da, db, dbias


@torch.library.register_fake("fastlora::grouped_lora_linear_backward")
def _backward_fake(
    dy: Tensor, x: Tensor | None, h: Tensor | None, offsets: Tensor, *operands_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, n, k, _, lora_a, lora_b, _, need_x, need_a, need_b, need_bias = operands_and_needs
    return (
        dy.new_empty((dy.shape[0], k) if need_x else (0,)),
        torch.empty_like(lora_a, memory_format=torch.contiguous_format) if need_a else dy.new_empty(0),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format) if need_b else dy.new_empty(0),
        dy.new_empty((offsets.numel(), n), dtype=torch.float32) if need_bias else dy.new_empty(0),
    )


_X, _BIAS, _LORA_A, _LORA_B = 0, 1, 11, 12  # positions among the operator's inputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, offsets, *tensors_and_sizes, lora_a, lora_b, scaling, save_h = inputs
    *base, n, k, blocksize = tensors_and_sizes
    ctx.sizes, ctx.scaling = (n, k, blocksize), scaling
    ctx.bias_dtype = bias.dtype if bias is not None else None
    keep_x, keep_h = ctx.needs_input_grad[_LORA_A], save_h
    ctx.save_for_backward(x if keep_x else None, output[1] if keep_h else None, offsets, *base, lora_a, lora_b)


def _autograd(ctx: Any, dy: Tensor, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, torch.ops.fastlora.grouped_lora_linear_backward)


def _gradients(ctx: Any, dy: Tensor, operator: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    x, h, offsets, *base, lora_a, lora_b = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[position] for position in (_X, _LORA_A, _LORA_B, _BIAS)]
    grads: list[Tensor | None] = [None] * len(needs)
    if any(wanted):
        found = operator(dy, x, h, offsets, *base, *ctx.sizes, lora_a, lora_b, ctx.scaling, *wanted)
        for position, grad, want in zip((_X, _LORA_A, _LORA_B, _BIAS), found, wanted, strict=True):
            if want:
                grads[position] = grad.to(ctx.bias_dtype) if position == _BIAS else grad
    return tuple(grads)


_Eager = eager(_forward, _setup_context, _gradients, _backward)
torch.library.impl("fastlora::grouped_lora_linear", "CompositeExplicitAutograd", _forward)
torch.library.impl("fastlora::grouped_lora_linear_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_autograd("fastlora::grouped_lora_linear", _autograd, setup_context=_setup_context)
