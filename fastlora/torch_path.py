"""The fused linear in torch's own operators: the CPU path, and the fall-back on any other device.

NF4 expands through `Base.dense`, which on the CPU is one pass of compiled C++. From `MERGE_FROM_M`
tokens the update is merged into the expanding weight and costs no pass over activations. Below, and
for dense weights or dropout, it is added inside one matrix product with `beta=1`:

    y  = x Wᵀ;   y  += [h₁ h₂ h₁] [B₁ B₁ B₂]ᵀ,      h = h₁ + h₂, B = B₁ + B₂

with fp32 values split into two 16-bit ones, which keeps 16 bits of their product and never makes a
separate [M, N] in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import native, reference
from fastlora.dispatch import backend
from fastlora.operands import Base, Gradients, Lora, Needs

MERGE_FROM_M = 128
GEMV_UP_TO_M = 16


def forward(
    x: Tensor, base: Base, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h = dropout(x) Aᵀ [M, R] in fp32 where it is to be saved. x: [M, K]."""
    if lora is None:
        return _base_product(x, base, bias), None
    merges = _merges(x, base, lora)
    h = _dropped(x, lora) @ lora.a.to(lora.dtype).t() if save_h or not merges else None
    if merges:
        y = F.linear(x, base.merged(x.dtype, lora), bias)
    else:
        assert h is not None
        y = _base_product(x, base, bias)
        _add_product(y, h, lora.b.to(lora.dtype).t(), lora.scaling)
    return y, h.float() if h is not None and save_h else None


def backward(dy: Tensor, x: Tensor | None, h: Tensor | None, base: Base, lora: Lora | None, needs: Needs) -> Gradients:
    """Gradients of everything but a dense weight and the bias. dy: [M, N]; x is needed for dA, h for dB."""
    if lora is None:
        return Gradients(_base_product_t(dy, base) if needs.x else None, None, None)
    merges = _merges(dy, base, lora)
    g, da, db = None, None, None
    if needs.lora_a or needs.lora_b or (needs.x and not merges):
        wide_dy = dy.to(lora.dtype)
        if needs.lora_a or (needs.x and not merges):
            g = (wide_dy @ lora.b.to(lora.dtype)).mul_(lora.scaling)
        if needs.lora_b:
            assert h is not None
            db = (wide_dy.t() @ h.to(lora.dtype)).mul_(lora.scaling).to(lora.b.dtype)
    if needs.lora_a:
        assert g is not None
        assert x is not None
        da = (g.t() @ _dropped(x, lora)).to(lora.a.dtype)
    if not needs.x:
        return Gradients(None, da, db)
    if merges:
        return Gradients(dy @ base.merged(dy.dtype, lora), da, db)
    assert g is not None
    dx = _base_product_t(dy, base)
    if lora.seed is None:
        _add_product(dx, g, lora.a.to(lora.dtype), 1.0)
    else:
        dx += (g @ lora.a.to(lora.dtype)).mul_(_mask(lora, *dx.shape))
    return Gradients(dx, da, db)


def _merges(x: Tensor, base: Base, lora: Lora) -> bool:
    return base.is_nf4 and lora.seed is None and x.shape[0] >= MERGE_FROM_M


def _mask(lora: Lora, rows: int, cols: int) -> Tensor:
    """The dropout mask [rows, cols], derived anew from the seed."""
    assert lora.seed is not None
    mask = reference.dropout_mask(int(lora.seed.item()), rows, cols, lora.dropout_p)
    return mask.to(lora.seed.device, lora.dtype)


def _dropped(x: Tensor, lora: Lora) -> Tensor:
    """dropout(x) in the dtype of the low-rank products."""
    wide = x.to(lora.dtype)
    return wide if lora.seed is None else wide * _mask(lora, *x.shape)


def _reads_packed(x: Tensor, base: Base) -> bool:
    """Whether the product can read packed codes, so that no expanded weight is written."""
    return base.is_nf4 and 0 < x.shape[0] <= GEMV_UP_TO_M and backend(x.device).name == "cpp"


def _base_product(x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [M, N]."""
    if not _reads_packed(x, base):
        return F.linear(x, base.dense(x.dtype), bias)
    assert base.absmax is not None
    y = torch.empty(x.shape[0], base.n, dtype=x.dtype)
    native.nf4_gemv(x.contiguous(), base.weight, base.absmax, base.absmax2, base.code2, base.offset, base.blocksize, y)
    return y if bias is None else y.add_(bias)


def _base_product_t(dy: Tensor, base: Base) -> Tensor:
    """dy W, [M, K]."""
    if not _reads_packed(dy, base):
        return dy @ base.dense(dy.dtype)
    assert base.absmax is not None
    dx = torch.empty(dy.shape[0], base.k, dtype=dy.dtype)
    native.nf4_gemv_t(
        dy.contiguous(), base.weight, base.absmax, base.absmax2, base.code2, base.offset, base.blocksize, dx
    )
    return dx


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """out += alpha · left right, in one product. out: [M, N]; left: [M, R]; right: [R, N]; R is small."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, alpha=alpha)
        return
    left = left * alpha
    left_high, right_high = left.to(out.dtype), right.to(out.dtype)
    left_low, right_low = (left - left_high).to(out.dtype), (right - right_high).to(out.dtype)
    out.addmm_(torch.cat((left_high, left_low, left_high), dim=1), torch.cat((right_high, right_high, right_low)))
