"""Cross-entropy of rows of logits, and its gradient: the logits are read twice and nothing else is stored.

With t = cap · tanh(scale · z / cap), or scale · z without a cap, and smoothing e over V classes:

    loss = log Σ exp(t) - (1 - e) · t[label] - e · mean(t)
    dz   = (exp(t - log Σ exp(t)) - (1 - e) · [v = label] - e / V) · dt/dz · factor

A row whose label is `ignored` has loss and gradient 0; one whose label is no class has NaN.

Source: arXiv:1805.02867 (maximum and sum in one pass); arXiv:1512.00567, section 7 (smoothing).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastlora.kernels.launch import Launcher
from torch import Tensor

_BLOCK, _WARPS = 2048, 8  # of a program, which has a row
_LOWEST = -1e30  # of the running maxima: minus infinity less itself would be NaN


@triton.jit
def _capped(z, scale, cap, CAPPED: tl.constexpr):
    t = z * scale
    if CAPPED:
        t = cap * (2 * tl.sigmoid(2 * t / cap) - 1)
    return t


@triton.jit
def _cross_entropy_kernel(
    z_ptr, label_ptr, factor_ptr, loss_ptr, dz_ptr, V, stride_zm, stride_dm, scale, cap, smoothing, ignored,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    z_ptr += row * stride_zm
    dz_ptr += row * stride_dm
    columns = tl.arange(0, BLOCK)
    if label == ignored:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                tl.store(dz_ptr + start + columns, tl.zeros([BLOCK], tl.float32), mask=start + columns < V)
    else:
        is_class = (label >= 0) & (label < V)
        chosen = tl.load(z_ptr + tl.where(is_class, label, 0)).to(tl.float32)
        chosen = tl.where(is_class, _capped(chosen, scale, cap, CAPPED), float("nan"))
        most = tl.full([BLOCK], LOWEST, tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            t = _capped(tl.load(z_ptr + start + columns, mask=inside, other=0.0).to(tl.float32), scale, cap, CAPPED)
            if SMOOTH:
                total += tl.where(inside, t, 0.0)
            t = tl.where(inside, t, float("-inf"))
            larger = tl.maximum(most, t)
            sums = sums * tl.exp(most - larger) + tl.exp(t - larger)
            most = larger
        top = tl.max(most, 0)
        lse = top + tl.log(tl.sum(sums * tl.exp(most - top), 0))
        loss = lse - chosen
        if SMOOTH:
            loss += smoothing * (chosen - tl.sum(total, 0) / V)
        tl.store(loss_ptr + row, loss)
        if GRADIENT:
            scale_of_all = scale * tl.load(factor_ptr)
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                t = _capped(tl.load(z_ptr + start + columns, mask=inside, other=0.0).to(tl.float32), scale, cap, CAPPED)
                dt = tl.exp(t - lse) + tl.where(start + columns == label, smoothing - 1.0, 0.0)
                dt += chosen - chosen  # NaN where the label is no class
                if SMOOTH:
                    dt -= smoothing / V
                dt *= scale_of_all
                if CAPPED:
                    dt *= 1 - (t / cap) * (t / cap)
                tl.store(dz_ptr + start + columns, dt.to(dz_ptr.dtype.element_ty), mask=inside)


def _constants(capped: bool, smooth: bool, gradient: bool, *_: Any) -> dict[str, Any]:
    flags = {"CAPPED": capped, "SMOOTH": smooth, "GRADIENT": gradient}
    return {**flags, "LOWEST": _LOWEST, "BLOCK": _BLOCK, "num_warps": _WARPS}


_launcher = Launcher(_cross_entropy_kernel, _constants)


def cross_entropy(
    z: Tensor, labels: Tensor, scale: float, cap: float, smoothing: float, ignored: int, factor: Tensor,
    dz: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss of each row, [M] in fp32, and in `dz` factor times its gradient.

    Args:
        z: [M, V], bf16, fp16 or fp32, rows contiguous. labels: [M] in int64. cap: 0 for none.
        factor: one number in fp32.
        dz: [M, V] to be filled, rows contiguous; may be z. None if no gradient is wanted.
    """
    m, v = z.shape
    loss = torch.empty(m, dtype=torch.float32, device=z.device)
    if m:
        out = z if dz is None else dz
        strides = z.stride(0), out.stride(0)
        key = (bool(cap), bool(smoothing), dz is not None, v, strides, z.dtype, out.dtype, ignored)
        _launcher(key, (m,), (z, labels, factor, loss, out), (v, *strides, scale, cap, smoothing, ignored))
    return loss
