"""DoRA over the linear: y = (m / ‖W + s · B A‖) ∘ (x Wᵀ + s · x Aᵀ Bᵀ) + bias, with the norm of each row.

The norm is a constant in the backward pass, as in the paper. It takes a pass over the whole weight;
`peft_layers.kept_norms` keeps it until A, B or the weight changes.

The base decides where the factor m / norm goes:
    NF4 on CUDA   into the scales of the packed weight and the rows of B. Both passes are then those of a LoRA linear,
                  by whichever kernel. Only where m is trained are passes over [M, N] added: one for its gradient, and
                  one for a bias
    16 bits, A and B in fp32   into y; in backward, in fp32, into the rows of B and dB
    otherwise     into y, and into dy

With dropout the factor applies only to x̃, what dropout leaves of x, and there to the base's part too: y = x Wᵀ +
(factor - 1) ∘ x̃ Wᵀ + factor ∘ s x̃ Aᵀ Bᵀ, two base products as in peft. (Over 16 bits with fp32 adapters and without
autocast, peft multiplies in fp32; such a layer steps back to peft.)

Source: arXiv:2402.09353, equation 5 and section 4.3.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.operands import Lora
from fastlora.ops.autograd import computed_in, refuse_second_derivative, seen_by_others
from fastlora.ops.backend import backend
from fastlora.ops.linear import lora_linear, nf4_dequantize, nf4_linear, run, run_backward
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import Gradients, Needs, in_dtype

SMALLEST = 2.0**-60  # the factor of an output in place of 0
ROWS_AT_ONCE = 1024  # of a dense weight, widened to fp32 for their norms


def row_norms(weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + scaling · B A‖ of each row: [N], fp32, detached.

    Args:
        weight: [N, K], dense or NF4. lora_a: [R, K]. lora_b: [N, R].
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        if runs_kernels(weight.codes if isinstance(weight, NF4Weight) else weight):
            out = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
            changed = torch.ones(1, dtype=torch.int32, device=weight.device)
            norms_by_kernel(changed, weight, (lora_a.detach(), lora_b.detach()), scaling, out)
            return out
        if isinstance(weight, NF4Weight):
            merged = nf4_dequantize(weight, None, lora_a, lora_b, scaling)
            return torch.linalg.vector_norm(merged, dim=1, dtype=torch.float32)
        a, b = lora_a.float(), lora_b.float()
        norms = [
            torch.addmm(rows.float(), part, a, alpha=scaling).norm(dim=1)  # [rows, K] + [rows, R] @ [R, K] -> [rows]
            for rows, part in zip(weight.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
        ]
        return torch.cat(norms)


def runs_kernels(frozen: Tensor) -> bool:
    """Whether Triton's kernels can be launched for a weight: its device has them, and nothing must see operators."""
    return not seen_by_others(frozen, None) and backend(frozen.device).name == "triton"


def norms_by_kernel(
    changed: Tensor, weight: Tensor | NF4Weight, adapters: Sequence[Tensor], scaling: float, out: Tensor
) -> None:
    from fastlora.kernels import dora as kernel

    lora_a, lora_b = adapters
    frozen = weight.detach() if isinstance(weight, Tensor) else weight
    kernel.row_norms(changed, frozen, lora_a, lora_b, scaling, out)


def dora_linear(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor,
    norms: Tensor, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = (magnitude / norms) ∘ (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias.

    Args:
        x: [..., K], bf16, fp16 or fp32. Under autocast it is cast to autocast's dtype.
        weight: [N, K], dense in x's dtype or NF4. lora_a: [R, K], lora_b: [N, R], fp32 or dtype of x.
        magnitude: [N]. norms: [N], fp32, from `row_norms`, taken as constants. bias: [N] or None.
    Returns:
        [..., N], dtype of x; over a dense weight under autocast, autocast's dtype. Differentiable in x, lora_a, lora_b,
        magnitude, bias, and in a dense weight.
    """
    dtype, given = computed_in(x), x.dtype
    result = torch.promote_types(given, dtype) if isinstance(weight, NF4Weight) else dtype
    inverse, x = norms.reciprocal(), x.to(dtype)
    operands = (x, lora_a, lora_b, magnitude, bias, weight, inverse, float(scaling))
    if isinstance(weight, NF4Weight):
        whole = weight.shape[1] % weight.blocksize == 0
        if whole and dtype != torch.float16 and x.numel() and runs_kernels(weight.codes):
            return _OverNF4.apply(*operands, torch.is_grad_enabled()).to(result)
    wider = dtype != torch.float32 and torch.float32 in (lora_a.dtype, lora_b.dtype)
    if wider and (isinstance(weight, NF4Weight) or not weight.requires_grad):
        return _Over16Bits.apply(*operands, result)
    if bias is not None and dtype == torch.float32 and not runs_kernels(x):
        # a factor of 1, as at the start, leaves every bit of the base: it may be the small rest of product and bias
        y = lora_linear(x, weight, lora_a, lora_b, scaling, bias)
        return torch.addcmul(y, y - bias, magnitude / norms - 1).to(result)
    return rescale(lora_linear(x, weight, lora_a, lora_b, scaling), magnitude, inverse, bias, result)


def dora_linear_with_dropout(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor,
    norms: Tensor, bias: Tensor | None, p: float,
) -> Tensor:  # fmt: skip
    """As `dora_linear`, with factor and update only on dropout(x): see the head of this file. p: the share dropped."""
    device, dtype, given = x.device.type, computed_in(x), x.dtype
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        dropped, factor = F.dropout(x, p), magnitude.float() * norms.reciprocal()
        low_rank = dtype if autocast else torch.promote_types(lora_a.dtype, lora_b.dtype)
        h = F.linear(dropped.to(low_rank), lora_a.to(low_rank))  # [..., R]
        update = F.linear(h, lora_b.to(low_rank)) * (factor * scaling)  # [..., N] * [N]
        update = update + _base_product(dropped.to(dtype), weight) * (factor - 1)
        y = _base_product(x.to(dtype), weight, bias) + update  # [..., N]
    return y.to(torch.promote_types(given, dtype) if isinstance(weight, NF4Weight) else dtype)


def _base_product(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, NF4Weight):
        return nf4_linear(x, weight, bias)
    return F.linear(x, in_dtype(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def rescale(y: Tensor, magnitude: Tensor, inverse: Tensor, bias: Tensor | None, result: torch.dtype) -> Tensor:
    """(magnitude · inverse) ∘ y + bias, in fp32, rounded once to `result`; differentiable in y, magnitude and bias.

    Args:
        y: [..., N]. magnitude: [N]. inverse: [N], fp32, 1 / norms. bias: [N].
    """
    if y.numel() and runs_kernels(y):
        return _Rescaled.apply(y, magnitude, bias, inverse, result)
    scaled = y.float() * (magnitude.float() * inverse)
    return (scaled if bias is None else scaled + bias.float()).to(result)


def _rescaled(y: Tensor, factor: Tensor, bias: Tensor | None, result: torch.dtype) -> Tensor:
    """As `rescale`, without gradients; y: [..., N]."""
    if y.numel() and runs_kernels(y):
        from fastlora.kernels import dora as kernel

        return kernel.rescale(y.reshape(-1, y.shape[-1]), factor, bias, result).view(y.shape)
    scaled = y.float() * factor
    return (scaled if bias is None else scaled + bias.float()).to(result)


def _sums(
    dy: Tensor, z: Tensor | None, factor: Tensor | None, need_total: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(factor ∘ dy in `dtype`, Σ dy ∘ z, Σ dy) over rows [M, N], the sums in fp32; None for what is not given."""
    if dy.numel() and runs_kernels(dy):
        from fastlora.kernels import dora as kernel

        return kernel.rescale_backward(dy, z, factor, need_total, dtype)
    return (
        None if factor is None else (dy.float() * factor).to(dtype),
        None if z is None else (dy.float() * z).sum(0),
        dy.sum(0, dtype=torch.float32) if need_total else None,
    )


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, magnitude: Tensor, bias: Tensor | None, inverse: Tensor, result: torch.dtype
    ) -> Tensor:
        factor = magnitude.float() * inverse
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, factor, inverse)
        ctx.dtypes = y.dtype, magnitude.dtype, None if bias is None else bias.dtype
        return _rescaled(y, factor, bias, result)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        z, factor, inverse = ctx.saved_tensors
        need_y, need_magnitude, need_bias, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        z = z.reshape(rows.shape) if need_magnitude else None
        dz, dot, total = _sums(rows, z, factor if need_y else None, need_bias, ctx.dtypes[0])
        dm = None if dot is None else (dot * inverse).to(ctx.dtypes[1])
        dz = None if dz is None else dz.view(dy.shape)
        return dz, dm, None if total is None else total.to(ctx.dtypes[2]), None, None


class _OverNF4(torch.autograd.Function):
    """The factor goes into the weight's scales and B's rows. A factor of 0 becomes SMALLEST, so that dm can be formed.

    Saved: x (for dA), h (for dB), y without the bias (for dm), [N] numbers. Backward computes scales and rows again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor | None, weight: NF4Weight,
        inverse: Tensor, scaling: float, records: bool,
    ) -> Tensor:  # fmt: skip
        _, need_a, need_b, need_magnitude, *_ = (need and records for need in ctx.needs_input_grad)
        factor = magnitude.float() * inverse
        factor = torch.where(factor == 0, SMALLEST, factor)
        apart = need_magnitude and bias is not None  # the bias is added afterwards: dm needs y without it
        # z [..., N], h [M, R]
        z, h = run(x, *_scaled(weight, factor, lora_a, lora_b, scaling), None if apart else bias, need_b)
        kept = x if need_a else None, h if need_b else None, z if need_magnitude else None
        ctx.save_for_backward(*kept, lora_a, lora_b, factor, inverse)
        ctx.weight, ctx.scaling = weight, scaling
        ctx.dtypes = magnitude.dtype, None if bias is None else bias.dtype
        return z if bias is None or not apart else (z + bias).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, z, lora_a, lora_b, factor, inverse = ctx.saved_tensors
        need_x, need_a, need_b, need_magnitude, need_bias, *_ = ctx.needs_input_grad
        dx = da = db = dm = dbias = None
        if need_x or need_a or need_b:
            operands = _scaled(ctx.weight, factor, lora_a, lora_b, ctx.scaling)
            dx, da, db = run_backward(dy, x, h, *operands, Needs(need_x, need_a, need_b))
            da = None if da is None else da.to(lora_a.dtype)
            db = None if db is None else (factor[:, None] * db).to(lora_b.dtype)  # [N, 1] * [N, R]
        rows = dy.reshape(-1, dy.shape[-1])  # [M, N]
        z = z.reshape(rows.shape) if need_magnitude else None
        _, dot, total = _sums(rows, z, None, need_bias, dy.dtype)  # [N], [N]
        if dot is not None:
            dm = (dot * inverse / factor).to(ctx.dtypes[0])
        if total is not None:
            dbias = total.to(ctx.dtypes[1])
        return dx, da, db, dm, dbias, None, None, None, None


def _scaled(
    weight: NF4Weight, factor: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[NF4Weight, Lora]:
    """The operands of a linear with factor ∘ (W + scaling · B A)."""
    from fastlora.kernels import dora as kernel

    absmax = kernel.scaled_absmax(weight, factor)
    scaled = NF4Weight(weight.codes, absmax, weight.shape, weight.dtype, weight.blocksize)
    return scaled, Lora(lora_a, (factor[:, None] * lora_b).to(lora_b.dtype), scaling)  # [N, 1] * [N, R]


class _Over16Bits(torch.autograd.Function):
    """fp32 adapters over a dense 16-bit or an NF4 weight; the gradients of A and B are as exact as the adapters.

    `rescale` would pass on factor ∘ dy, rounded to 16 bits before the low-rank products read it. Here the factor goes
    into the rows of B and of dB, in fp32, and dy stays as it came.

    Saved for dm: z = x Wᵀ + s · x Aᵀ Bᵀ. Where kernels add the update to the base product and rescale in one go, z
    never exists, and x Wᵀ is saved: Σ dy ∘ z is then Σ dy ∘ x Wᵀ and the products of B's elements with dB's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor | None,
        weight: Tensor | NF4Weight, inverse: Tensor, scaling: float, result: torch.dtype,
    ) -> Tensor:  # fmt: skip
        _, need_a, need_b, need_magnitude, *_ = ctx.needs_input_grad
        factor, lora = magnitude.float() * inverse, Lora(lora_a, lora_b, scaling)
        frozen = in_dtype(weight, x.dtype)
        y: Tensor
        h: Tensor | None
        ctx.apart = isinstance(frozen, Tensor) and x.numel() > 0 and runs_kernels(x)
        if ctx.apart:
            from fastlora.ops import linear_cuda

            assert isinstance(frozen, Tensor)
            y, z, h = linear_cuda.rescaled(x, frozen, lora, factor, bias, result)  # [..., N], [M, N], [M, R]
        else:
            z, h = run(x, frozen, lora, None, need_b)  # [..., N], [M, R]
            y = _rescaled(z, factor, bias, result)
        need_h = need_b or (need_magnitude and ctx.apart)
        kept = x if need_a else None, h if need_h else None, z if need_magnitude else None
        ctx.save_for_backward(*kept, lora_a, lora_b, factor, inverse)
        ctx.weight, ctx.scaling, ctx.dtype = weight, scaling, x.dtype
        ctx.dtypes = magnitude.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        x, h, z, lora_a, lora_b, factor, inverse = ctx.saved_tensors
        need_x, need_a, need_b, need_magnitude, need_bias, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        weight = in_dtype(ctx.weight, ctx.dtype)

        def products(dy: Tensor, b: Tensor, *needs: bool) -> Gradients:
            return run_backward(dy, x, h, weight, Lora(lora_a, b, ctx.scaling), Needs(*needs))

        dx = da = db = dm = dbias = None
        z = z.reshape(rows.shape) if need_magnitude else None
        dz, dot, total = _sums(rows, z, factor if need_x else None, need_bias, ctx.dtype)  # [M, N], [N], [N]
        if dz is not None:
            dx = products(dz.view(dy.shape), lora_b, True, False, False).x  # [..., K]
        more = ctx.apart and need_magnitude
        if need_a or need_b or more:
            rescaled_b = factor[:, None] * lora_b
            _, da, db = products(dy.to(ctx.dtype), rescaled_b, False, need_a, need_b or more)  # [R, K], [N, R]
        if dot is not None:
            dot = dot + (db * lora_b).sum(1) if db is not None and more else dot
            dm = (dot * inverse).to(ctx.dtypes[0])
        db = factor[:, None] * db if db is not None and need_b else None
        if total is not None:
            dbias = total.to(ctx.dtypes[1])
        return dx, da, db, dm, dbias, None, None, None, None
