"""The LoRA linear: one operator forward, one backward, for dense and NF4 weights.

    y  = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias
    dx = dy W + scaling · mask ∘ ((dy B) A)
    dA = scaling · (dy B)ᵀ x̃,      dB = scaling · dyᵀ h,      h = x̃ Aᵀ,  x̃ = mask ∘ x

Saved for backward: x (where dA is wanted), h in fp32 (where dB is wanted), and the seed of the mask.
The expanded weight is never saved: backward expands it again. Both operators are registered with
`torch.library`, with fakes and autograd, so that `torch.compile` sees two opaque nodes, and a
selective checkpoint can keep `fastlora::lora_linear`'s outputs by name. Where nothing must see them
pass, `_Linear` runs the same code without torch's dispatcher.

There is one way to the kernels: `_path` chooses among `linear_cpu_bf16`, `linear_cpu` and `linear_cuda`,
at most once a pass. Each has `forward` and `backward` over rows [M, K].

Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.operands import Lora
from fastlora.ops import dequantize, keeping, linear_cpu, linear_cpu_bf16
from fastlora.ops.autograd import refuse_func_gradients, refuse_second_derivative, seen_by_others
from fastlora.ops.backend import backend
from fastlora.ops.checks import as_autocast, check_adapter_shapes, check_adapters, check_linear
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import Gradients, Needs, Step

LEAST_DROPOUT = 2.0**-17  # half a step of the mask's rate
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
        dropout_p: the share of x's elements that the update does not see, in steps of 2**-16; only while `training`.
    Returns:
        [..., N], dtype of x, accumulated in fp32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, or dropout_p is not in [0, 1).
    Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
    """
    return _call(*prepared(x, weight, (lora_a, lora_b, scaling), bias, dropout_p, training))


def prepared(
    x: Tensor, weight: Any, adapter: tuple[Tensor, Tensor, float] | None, bias: Tensor | None, dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor | NF4Weight, Lora | None, Tensor | None]:  # fmt: skip
    """(x, weight, adapter with the seed of its mask, bias) as a linear multiplies them; raises as `lora_linear`."""
    if not 0.0 <= dropout_p < 1.0 - LEAST_DROPOUT:
        raise ValueError(f"dropout_p must be at least 0 and below 1 - 2**-17; got {dropout_p}")
    x, weight, bias = as_autocast(x, weight, bias)
    check_linear(x, weight, bias)
    if adapter is None:
        return x, weight, None, bias
    lora_a, lora_b, scaling = adapter
    check_adapters(x, weight.shape, lora_a, lora_b)
    seed = None
    if training and dropout_p >= LEAST_DROPOUT:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    return x, weight, Lora(lora_a, lora_b, float(scaling), dropout_p, seed), bias


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias over a frozen NF4 weight; differentiable in x and bias.

    Args:
        x: [..., K], bf16, fp16 or fp32. bias: [N], in x's dtype or fp32.
    Returns:
        [..., N], dtype of x.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _call(*prepared(x, weight, None, bias))


def nf4_dequantize(
    weight: NF4Weight,
    dtype: torch.dtype | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 0.0,
) -> Tensor:
    """W, or W + scaling · B A, as a dense [N, K], rounded once from fp32. Not differentiable.

    Args:
        dtype: by default the weight's dtype before quantization.
        lora_a: [R, K]. lora_b: [N, R].
    Raises:
        ValueError: only one adapter is given, or the shapes do not fit.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError("nf4_dequantize merges lora_a and lora_b together: give both or neither")
    if lora_a is not None and lora_b is not None:
        check_adapter_shapes(weight.shape, lora_a, lora_b)
        lora_a, lora_b = lora_a.detach(), lora_b.detach()
    return dequantize.nf4_dequantize(weight, dtype or weight.dtype, lora_a, lora_b, scaling)


def computed_by(n: int, k: int, r: int, blocksize: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The paths that compute a linear [N, K], and how, by the number of tokens: "up to 16 tokens decode, above ...".

    Args:
        r: rank of the adapter, 0 for none. blocksize: of an NF4 weight, 0 for a dense one. dtype: of x.
    """
    steps: list[Step] = []
    for step in _path_on(device).steps(n, k, blocksize, r, dtype, device):
        steps[-1:] = [step] if steps and steps[-1].words == step.words else [*steps[-1:], step]
    *below, last = steps
    said = [f"up to {step.m} tokens {step.words}" for step in below]
    said.append(f"above {last.words}" if said else last.words)
    return ", ".join(dict.fromkeys(step.path for step in steps)), ", ".join(said)


def _path_on(device: torch.device) -> ModuleType:
    """The module whose `steps` describe the linears on a device."""
    if backend(device).name == "triton":
        from fastlora.ops import linear_cuda

        return linear_cuda
    return linear_cpu


def _path(x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None) -> ModuleType:
    """The module whose `forward` or `backward` computes a pass. x: the rows of that pass, x or dy, not empty."""
    name = backend(x.device).name
    if name == "triton":
        from fastlora.ops import linear_cuda

        return linear_cuda
    return linear_cpu_bf16 if name == "cpp" and linear_cpu_bf16.takes(x, weight, lora) else linear_cpu


def _call(x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None) -> Tensor:
    """The linear, for operands that fit; differentiable."""
    lora_a, lora_b, scaling, dropout_p, seed, _ = lora or (None, None, 0.0, 0.0, None, None)
    records = torch.is_grad_enabled()
    if seen_by_others(x, lora_a):
        refuse_func_gradients()
        return run(x, weight, lora, bias, records and lora_b is not None and lora_b.requires_grad)[0]
    if not records:
        return _forward(x, weight, lora, bias, False)[0]
    dense, packed = (None, weight) if isinstance(weight, NF4Weight) else (weight, None)
    y: Tensor = _apply(x, lora_a, lora_b, bias, dense, seed, (packed, scaling, dropout_p))
    return y


def run(
    x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and, where `save_h`, h [M, R] in fp32: by the operator where others must see it pass.

    Differentiable only there. x: [..., K]; the operands must fit.
    """
    if not seen_by_others(x, None if lora is None else lora.a):
        return _forward(x, weight, lora, bias, save_h)
    y, h = torch.ops.fastlora.lora_linear(x, bias, *_flat(weight, lora), save_h)
    return y, h if save_h else None


def run_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor | NF4Weight, lora: Lora | None, needs: Needs
) -> Gradients:
    """The backward pass of `run`. dy: [..., N]; x [..., K] is needed for dA, h for dB; dx is [..., K]."""
    if not seen_by_others(dy, None if lora is None else lora.a):
        return _backward(dy, x, h, weight, lora, needs)
    k = weight.shape[1]
    found = torch.ops.fastlora.lora_linear_backward(dy, x, h, k, *_flat(weight, lora), *needs)
    return Gradients(*(grad if need else None for grad, need in zip(found, needs, strict=True)))


def _forward(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora: Lora | None,
    bias: Tensor | None,
    save_h: bool,
    path: ModuleType | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and h [M, R] or None, perhaps kept ones, by `path`; None: by the path chosen here."""
    keeper = keeping.keeper()
    if keeper is None:
        return _computed(x, weight, lora, bias, save_h, path)
    key = x.shape, x.dtype, weight.shape, save_h, lora is None
    return keeper.call(key, lambda: _computed(x, weight, lora, bias, save_h, path))


def _computed(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora: Lora | None,
    bias: Tensor | None,
    save_h: bool,
    path: ModuleType | None,
) -> tuple[Tensor, Tensor | None]:
    n, k = weight.shape
    if x.numel() == 0:
        h = x.new_zeros((x.numel() // k if k else 0, lora.r), dtype=torch.float32) if lora and save_h else None
        return x.new_zeros((*x.shape[:-1], n)), h
    device = x.device.type
    if torch.is_autocast_enabled(device):  # the low-rank products keep their own dtype
        torch.set_autocast_enabled(device, False)  # `torch.autocast` does the same in 7 us
        try:
            return _computed(x, weight, lora, bias, save_h, path)
        finally:
            torch.set_autocast_enabled(device, True)
    path = path or _path(x, weight, lora)
    if x.dim() == 2:
        return path.forward(x, weight, lora, bias, save_h)  # type: ignore[no-any-return]
    y, h = path.forward(x.reshape(-1, k), weight, lora, bias, save_h)
    return y.view(*x.shape[:-1], n).data, h  # no view for autograd: what a caller does to y in place is allowed


def _backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | NF4Weight,
    lora: Lora | None,
    needs: Needs,
    path: ModuleType | None = None,
) -> Gradients:
    """As `run_backward`, by `path`; None: by the path chosen here."""
    n, k = weight.shape
    if dy.numel() == 0:
        dx = dy.new_zeros((*dy.shape[:-1], k)) if needs.x else None
        da, db = (torch.zeros_like(lora.a), torch.zeros_like(lora.b)) if lora else (None, None)
        return Gradients(dx, da if needs.lora_a else None, db if needs.lora_b else None)
    device = dy.device.type
    if torch.is_autocast_enabled(device):
        torch.set_autocast_enabled(device, False)
        try:
            return _backward(dy, x, h, weight, lora, needs, path)
        finally:
            torch.set_autocast_enabled(device, True)
    rows = dy if dy.dim() == 2 else dy.reshape(-1, n)
    x = x if x is None or x.dim() == 2 else x.reshape(-1, k)
    path = path or _path(dy, weight, lora)
    found: Gradients = path.backward(rows, x, h, weight, lora, needs)
    return found if found.x is None or dy.dim() == 2 else found._replace(x=found.x.view(*dy.shape[:-1], k))


def _all_gradients(
    dy: Tensor, x: Tensor | None, grads: Gradients, needs: tuple[bool, bool], n: int, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB, d bias, d weight). needs: whether the last two, of the bias and of a dense weight, are wanted."""
    dbias = dweight = None
    need_bias, need_weight = needs
    if need_bias or need_weight:
        rows = dy.reshape(-1, n)
        dbias = rows.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else None  # [N]
        if need_weight:
            assert x is not None
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])  # [N, K]
    return *grads, dbias, dweight


class _Linear(torch.autograd.Function):
    """The linear without torch's dispatcher, which costs 150 us a call if it leads to Python."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None, dense: Tensor | None,
        seed: Tensor | None, rest: tuple[NF4Weight | None, float, float],
    ) -> Tensor:  # fmt: skip
        _, need_a, need_b, _, need_dense, _, _ = ctx.needs_input_grad
        packed, scaling, dropout_p = rest
        weight: Any = packed if dense is None else dense
        lora = None
        if lora_a is not None and lora_b is not None:
            lora = Lora(lora_a, lora_b, scaling, dropout_p, seed)
        path = _path(x, weight, lora) if x.numel() else None  # for this call's backward too
        y, h = _forward(x, weight, lora, bias, need_b, path)
        frozen = (dense,) if packed is None else packed.tensors()  # saved, so that autograd notices a change in between
        ctx.save_for_backward(x if need_a or need_dense else None, h, lora_a, lora_b, seed, *frozen)
        ctx.rest, ctx.path, ctx.bias_dtype = rest, path, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, lora_a, lora_b, seed, frozen, *_ = ctx.saved_tensors
        need_x, need_a, need_b, need_bias, need_dense, _, _ = ctx.needs_input_grad
        packed, scaling, dropout_p = ctx.rest
        weight = frozen if packed is None else packed
        grads = Gradients(None, None, None)
        if need_x or need_a or need_b:
            lora = None if lora_a is None else Lora(lora_a, lora_b, scaling, dropout_p, seed)
            grads = _backward(dy, x if need_a else None, h, weight, lora, Needs(need_x, need_a, need_b), ctx.path)
        if not (need_bias or need_dense):
            return *grads, None, None, None, None
        found = _all_gradients(dy, x, grads, (need_bias, need_dense), weight.shape[0], ctx.bias_dtype)
        return *found, None, None


# Function.apply without its search of the arguments for torch.func's wrappers: `seen_by_others` has found that no
# transform of torch.func is active. A tensor that has outlived its transform is refused by the products.
_apply = super(torch.autograd.Function, _Linear).apply


def _flat(weight: Tensor | NF4Weight, lora: Lora | None) -> tuple[Any, ...]:
    """The twelve operands of an operator's schema."""
    parts: tuple[Any, ...] = (weight, None, None, None, None)
    blocksize = 0
    if isinstance(weight, NF4Weight):
        parts, blocksize = weight.tensors(), weight.blocksize
    a, b, scaling, dropout_p, seed, _ = lora or (None, None, 0.0, 0.0, None, None)
    return *parts, weight.shape[0], blocksize, a, b, seed, float(scaling), dropout_p


def _unflat(k: int, dtype: torch.dtype, operands: tuple[Any, ...]) -> tuple[Tensor | NF4Weight, Lora | None]:
    """The inverse of `_flat`."""
    weight, absmax, absmax2, code2, offset, n, blocksize, lora_a, lora_b, seed, scaling, dropout_p = operands
    if absmax is not None:
        weight = NF4Weight(weight, absmax, (n, k), dtype, blocksize, absmax2, code2, offset)
    return weight, None if lora_a is None else Lora(lora_a, lora_b, scaling, dropout_p, seed)


_N, _LORA_A, _LORA_B = 5, 7, 8  # positions in `_flat`


def _operator(x: Tensor, bias: Tensor | None, *operands_and_save_h: Any) -> tuple[Tensor, Tensor]:
    *operands, save_h = operands_and_save_h
    weight, lora = _unflat(x.shape[-1], x.dtype, tuple(operands))
    y, h = _forward(x, weight, lora, bias, save_h)
    return y, h if h is not None else x.new_empty(0, dtype=torch.float32)


@torch.library.register_fake("fastlora::lora_linear")
def _operator_fake(x: Tensor, bias: Tensor | None, *operands_and_save_h: Any) -> tuple[Tensor, Tensor]:
    *operands, save_h = operands_and_save_h
    lora_a = operands[_LORA_A]
    h_shape = (x.numel() // x.shape[-1], lora_a.shape[0]) if save_h and lora_a is not None else (0,)
    return x.new_empty((*x.shape[:-1], operands[_N])), x.new_empty(h_shape, dtype=torch.float32)


def _operator_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, k: int, *operands_and_needs: Any
) -> tuple[Tensor, ...]:
    *operands, need_x, need_a, need_b = operands_and_needs
    weight, lora = _unflat(k, dy.dtype, tuple(operands))
    grads = _backward(dy, x, h, weight, lora, Needs(need_x, need_a, need_b))
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fastlora::lora_linear_backward")
def _operator_backward_fake(
    dy: Tensor, x: Tensor | None, h: Tensor | None, k: int, *operands_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need_x, need_a, need_b = operands_and_needs
    none, lora_a, lora_b = dy.new_empty(0), operands[_LORA_A], operands[_LORA_B]
    return (
        dy.new_empty((*dy.shape[:-1], k)) if need_x else none,
        torch.empty_like(lora_a, memory_format=torch.contiguous_format) if lora_a is not None and need_a else none,
        torch.empty_like(lora_b, memory_format=torch.contiguous_format) if lora_b is not None and need_b else none,
    )


_X, _BIAS, _WEIGHT = 0, 1, 2  # positions among the operator's inputs: x, the bias, then those of `_flat`


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, *operands, save_h = inputs
    *tensors, n, blocksize, lora_a, lora_b, seed, scaling, dropout_p = operands
    needs = ctx.needs_input_grad
    keep_x = needs[_WEIGHT] or needs[2 + _LORA_A]
    ctx.numbers = (x.shape[-1], n, blocksize), (scaling, dropout_p)
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(x if keep_x else None, output[1] if save_h else None, *tensors, lora_a, lora_b, seed)


def _autograd(ctx: Any, dy: Tensor, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    x, h, *tensors, lora_a, lora_b, seed = ctx.saved_tensors
    (k, n, blocksize), facts = ctx.numbers
    needs = ctx.needs_input_grad
    wanted = Needs(needs[_X], needs[2 + _LORA_A], needs[2 + _LORA_B])
    grads = Gradients(None, None, None)
    if any(wanted):
        found = torch.ops.fastlora.lora_linear_backward(
            dy, x if wanted.lora_a else None, h, k, *tensors, n, blocksize, lora_a, lora_b, seed, *facts, *wanted
        )
        grads = Gradients(*(grad if need else None for grad, need in zip(found, wanted, strict=True)))
    dx, da, db, dbias, dweight = _all_gradients(dy, x, grads, (needs[_BIAS], needs[_WEIGHT]), n, ctx.bias_dtype)
    placed = {_X: dx, _BIAS: dbias, _WEIGHT: dweight, 2 + _LORA_A: da, 2 + _LORA_B: db}
    return tuple(placed.get(position) for position in range(len(needs)))


torch.library.impl("fastlora::lora_linear", "CompositeExplicitAutograd", _operator)
torch.library.impl("fastlora::lora_linear_backward", "CompositeExplicitAutograd", _operator_backward)
torch.library.register_autograd("fastlora::lora_linear", _autograd, setup_context=_setup_context)
