"""The fused LoRA linear: one operator forward, one backward, for dense and NF4 weights.

    y  = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias
    dx = dy W + scaling · mask ∘ ((dy B) A)
    dA = scaling · (dy B)ᵀ x̃,      dB = scaling · dyᵀ h,      h = x̃ Aᵀ,  x̃ = mask ∘ x

Saved for backward: x (where dA is wanted), h in fp32 (where dB is wanted), and the seed of the mask.
The expanded weight is never saved: backward expands it again. Both operators are registered with
`torch.library`, with fakes and autograd, so that `torch.compile` sees two opaque nodes, and a
selective checkpoint can keep `fastlora::lora_linear`'s outputs by name.

Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import dequantize, linear_cpu, linear_cpu_bf16
from fastlora.ops.autograd import eager, refuse_func_gradients, refuse_second_derivative, seen_by_others
from fastlora.ops.backend import Backend, backend
from fastlora.ops.nf4 import FLOAT_DTYPES, NF4Weight
from fastlora.ops.operands import Base, Lora, Needs

_OPERANDS = (
    "Tensor weight, Tensor? absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int blocksize, "
    "Tensor? lora_a, Tensor? lora_b, Tensor? seed, float scaling, float dropout_p"
)
torch.library.define("fastlora::lora_linear", f"(Tensor x, Tensor? bias, {_OPERANDS}, bool save_h) -> (Tensor, Tensor)")
torch.library.define(
    "fastlora::lora_linear_backward",
    f"(Tensor dy, Tensor? x, Tensor? h, SymInt k, {_OPERANDS}, bool need_x, bool need_a, bool need_b) "
    "-> (Tensor, Tensor, Tensor)",
)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias.

    Differentiable in x, lora_a, lora_b, bias, and in a dense weight.

    Args:
        x: [..., K], bf16, fp16 or fp32; any strides. Under autocast it is cast to autocast's dtype.
        weight: [N, K], dense in x's dtype, or an `NF4Weight`.
        lora_a: [R, K], fp32 or x's dtype. lora_b: [N, R], likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
        bias: [N], in x's dtype or fp32; either is added as it is.
        dropout_p: share of x's elements that the update does not see, in steps of 2**-16; only while `training`.
    Returns:
        [..., N], dtype of x, accumulated in fp32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, or dropout_p is not in [0, 1).
    Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
    """
    if not 0.0 <= dropout_p < 1.0 - 2**-17:
        raise ValueError(f"dropout_p must be at least 0 and below 1, by 2**-17 or more; got {dropout_p}")
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias)
    _check_adapters(x, weight, lora_a, lora_b)
    seed = None
    if training and dropout_p >= 2**-17:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    save_h = torch.is_grad_enabled() and lora_b.requires_grad
    return _call(x, bias, weight, lora_a, lora_b, seed, scaling, dropout_p, save_h)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias over a frozen NF4 weight; differentiable in x and bias.

    Args:
        x: [..., K], bf16, fp16 or fp32. bias: [N], in x's dtype or fp32.
    Returns:
        [..., N], dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    x, _, bias = _autocast(x, weight, bias)
    _check(x, weight, bias)
    return _call(x, bias, weight, None, None, None, 0.0, 0.0, False)


def nf4_dequantize(
    weight: NF4Weight,
    dtype: torch.dtype | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """W, or W + scaling · B A, as a dense [N, K], rounded once from fp32. Not differentiable.

    Args:
        dtype: default the weight's dtype before quantization.
        lora_a: [R, K]. lora_b: [N, R].
    Raises:
        ValueError: only one adapter given, or shapes that do not fit.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError("nf4_dequantize merges lora_a and lora_b together: give both or neither")
    if lora_a is not None and lora_b is not None:
        _check_adapter_shapes(weight.shape, lora_a, lora_b)
        lora_a, lora_b = lora_a.detach(), lora_b.detach()
    return dequantize.nf4_dequantize(
        *weight.tensors(), *weight.shape, weight.blocksize, dtype or weight.dtype, lora_a, lora_b, scaling
    )


def _call(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    save_h: bool,
) -> Tensor:
    n, k = weight.shape
    parts: tuple[Any, Any, Any, Any, Any] = (weight, None, None, None, None)
    blocksize = 0
    if isinstance(weight, NF4Weight):
        parts, blocksize = weight.tensors(), weight.blocksize
    if seen_by_others(x, lora_a):
        refuse_func_gradients()
        return torch.ops.fastlora.lora_linear(
            x, bias, *parts, n, blocksize, lora_a, lora_b, seed, float(scaling), dropout_p, save_h
        )[0]
    base = Base(*parts, n, k, blocksize)
    lora = Lora(lora_a, lora_b, scaling, dropout_p, seed) if lora_a is not None and lora_b is not None else None
    if linear_cpu_bf16.serves(x, base, lora, bias):
        return linear_cpu_bf16.linear(x, base, lora, bias)
    if lora is not None and not base.is_nf4 and _is_small(x, seed):
        return linear_cpu.few_rows(x, base.weight, lora, bias)
    inputs = (x, bias, *parts, n, blocksize, lora_a, lora_b, seed, float(scaling), dropout_p, save_h)
    return _Eager.apply(*inputs)[0] if torch.is_grad_enabled() else _forward(*inputs)[0]


def _is_small(x: Tensor, seed: Tensor | None) -> bool:
    """Whether `torch_path.few_rows` is the quickest way to multiply x with a dense weight."""
    if os.environ.get("FASTLORA_BACKEND"):
        return False
    rows_fit = x.is_contiguous() and 0 < x.numel() <= linear_cpu.FEW_ROWS * x.shape[-1]
    return rows_fit and seed is None and not x.is_cuda and not torch.is_autocast_enabled(x.device.type)


def operators(x: Tensor, lora_a: Tensor | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of the operator as they are to be called: registered where someone must see them pass."""
    if seen_by_others(x, lora_a):
        return torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_linear_backward
    return _forward, _backward


def _autocast(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None
) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None]:
    """x and a dense weight in autocast's dtype; a bias in fp32 stays, so that its gradient is not rounded."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    if isinstance(weight, Tensor):
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    return x.to(dtype), weight, bias


def _check(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be bf16, fp16 or fp32; got {x.dtype}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be [N, K]; got {list(weight.shape)}")
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has {list(x.shape)}, the weight [N, K] = {[n, k]}: the last dimension of x must be {k}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}: move one of them")
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}: cast one of them, or run under autocast")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in (x.dtype, torch.float32)):
        raise ValueError(f"bias must be [{n}] in {x.dtype} or fp32; got {list(bias.shape)} in {bias.dtype}")


def _check_adapters(x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor) -> None:
    _check_adapter_shapes((weight.shape[0], weight.shape[1]), lora_a, lora_b)
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"{name} must be fp32 or {x.dtype} like x; got {adapter.dtype}")
        if adapter.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {adapter.device}: move one of them")


def _check_adapter_shapes(shape: tuple[int, int], lora_a: Tensor, lora_b: Tensor) -> None:
    n, k = shape
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] == 0:
        raise ValueError(
            f"lora_a must be [R, K] and lora_b [N, R] with the same R >= 1; "
            f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
        )
    if lora_a.shape[1] != k or lora_b.shape[0] != n:
        raise ValueError(
            f"the weight is [N, K] = {[n, k]}; lora_a {list(lora_a.shape)} must end in {k}, "
            f"lora_b {list(lora_b.shape)} must begin with {n}"
        )


def kernels(n: int, k: int, r: int, blocksize: int, dtype: torch.dtype, device: torch.device) -> str:
    """What computes a linear [N, K] by its number of tokens, in words: "up to 16 tokens decode, above ...".

    Args:
        r: rank of the adapter, 0 for none. blocksize: of an NF4 weight, 0 for a dense one. dtype: of x.
    """
    steps: list[tuple[int, str]] = []
    for bound, words in _path(device).steps(n, k, blocksize, r, dtype, device):
        steps[-1:] = [(bound, words)] if steps and steps[-1][1] == words else [*steps[-1:], (bound, words)]
    *below, (_, last) = steps
    told = [f"up to {bound} tokens {words}" for bound, words in below]
    return ", ".join([*told, f"above {last}"]) if told else last


def _path(device: torch.device) -> ModuleType:
    """The module whose `forward` and `backward` run on a device."""
    if backend(device).name == "triton":
        from fastlora.ops import linear_cuda

        return linear_cuda
    return linear_cpu


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The low-rank products keep their own dtype, whatever surrounds the call."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _unpack(k: int, operands: tuple[Any, ...]) -> tuple[Base, Lora | None]:
    """The twelve operands of an operator's signature as the pair that the code paths take."""
    weight, absmax, absmax2, code2, offset, n, blocksize, lora_a, lora_b, seed, scaling, dropout_p = operands
    base = Base(weight, absmax, absmax2, code2, offset, n, k, blocksize)
    return base, Lora(lora_a, lora_b, scaling, dropout_p, seed) if lora_a is not None else None


def _forward(x: Tensor, bias: Tensor | None, *operands_and_save_h: Any) -> tuple[Tensor, Tensor]:
    *operands, save_h = operands_and_save_h
    if x.numel() == 0:
        y, h = _forward_fake(x, bias, *operands_and_save_h)
        return y.zero_(), h.zero_()
    base, lora = _unpack(x.shape[-1], tuple(operands))
    with _no_autocast(x.device):
        y, saved = _path(x.device).forward(x.reshape(-1, base.k), base, lora, bias, save_h)
    return y.view(*x.shape[:-1], base.n), saved if saved is not None else x.new_empty(0, dtype=torch.float32)


@torch.library.register_fake("fastlora::lora_linear")
def _forward_fake(x: Tensor, bias: Tensor | None, *operands_and_save_h: Any) -> tuple[Tensor, Tensor]:
    *operands, save_h = operands_and_save_h
    base, lora = _unpack(x.shape[-1], tuple(operands))
    h_shape = (x.numel() // base.k, lora.a.shape[0]) if save_h and lora is not None else (0,)
    return x.new_empty((*x.shape[:-1], base.n)), x.new_empty(h_shape, dtype=torch.float32)


def _backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, k: int, *operands_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need_x, need_a, need_b = operands_and_needs
    if dy.numel() == 0:
        dx, da, db = _backward_fake(dy, x, h, k, *operands_and_needs)
        return dx.zero_(), da.zero_(), db.zero_()
    base, lora = _unpack(k, tuple(operands))
    rows = x.reshape(-1, k) if x is not None else None
    with _no_autocast(dy.device):
        grads = _path(dy.device).backward(dy.reshape(-1, base.n), rows, h, base, lora, Needs(need_x, need_a, need_b))
    return (
        grads.x.view(*dy.shape[:-1], k) if grads.x is not None else dy.new_empty(0),
        grads.lora_a if grads.lora_a is not None else dy.new_empty(0),
        grads.lora_b if grads.lora_b is not None else dy.new_empty(0),
    )


@torch.library.register_fake("fastlora::lora_linear_backward")
def _backward_fake(
    dy: Tensor, x: Tensor | None, h: Tensor | None, k: int, *operands_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need_x, need_a, need_b = operands_and_needs
    _, lora = _unpack(k, tuple(operands))
    return (
        dy.new_empty((*dy.shape[:-1], k) if need_x else (0,)),
        torch.empty_like(lora.a, memory_format=torch.contiguous_format) if lora and need_a else dy.new_empty(0),
        torch.empty_like(lora.b, memory_format=torch.contiguous_format) if lora and need_b else dy.new_empty(0),
    )


_X, _BIAS, _WEIGHT, _LORA_A, _LORA_B = 0, 1, 2, 9, 10  # positions among the operator's inputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, *operands, save_h = inputs
    base, lora = _unpack(x.shape[-1], tuple(operands))
    needs = ctx.needs_input_grad
    keep_x = needs[_WEIGHT] or needs[_LORA_A]
    ctx.base_facts = (base.n, base.k, base.blocksize)
    ctx.lora_facts = (lora.scaling, lora.dropout_p) if lora is not None else (0.0, 0.0)
    ctx.bias_dtype = bias.dtype if bias is not None else None
    adapters = (lora.a, lora.b, lora.seed) if lora is not None else (None, None, None)
    ctx.save_for_backward(x if keep_x else None, output[1] if save_h else None, *base[:5], *adapters)


def _autograd(ctx: Any, dy: Tensor, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, torch.ops.fastlora.lora_linear_backward)


def _gradients(ctx: Any, dy: Tensor, operator: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    x, h, *base_tensors, lora_a, lora_b, seed = ctx.saved_tensors
    n, k, blocksize = ctx.base_facts
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needs)
    if needs[_X] or needs[_LORA_A] or needs[_LORA_B]:
        dx, da, db = operator(
            dy, x if needs[_LORA_A] else None, h, k, *base_tensors, n, blocksize, lora_a, lora_b, seed,
            *ctx.lora_facts, needs[_X], needs[_LORA_A], needs[_LORA_B],
        )  # fmt: skip
        for position, grad in ((_X, dx), (_LORA_A, da), (_LORA_B, db)):
            if needs[position]:
                grads[position] = grad
    if needs[_BIAS]:
        grads[_BIAS] = dy.reshape(-1, n).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if needs[_WEIGHT]:
        grads[_WEIGHT] = dy.reshape(-1, n).t() @ x.reshape(-1, k)
    return tuple(grads)


_Eager = eager(_forward, _setup_context, _gradients, _backward)
torch.library.impl("fastlora::lora_linear", "CompositeExplicitAutograd", _forward)
torch.library.impl("fastlora::lora_linear_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_autograd("fastlora::lora_linear", _autograd, setup_context=_setup_context)

__all__ = ["Backend", "backend", "lora_linear", "nf4_dequantize", "nf4_linear"]
