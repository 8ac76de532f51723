"""The fused linear in torch's own operators: the CPU path, and the fall-back on any other device.

NF4 expands through `Base.dense`, which on the CPU is one pass of compiled C++. From `MERGE_FROM_M`
tokens the update is merged into the expanding weight and costs no pass over activations. Below, and
for dense weights or dropout, the update is written first and the base product is added to it with
beta = 1, in fp32 and rounded once: added the other way round, a small update would round away.

    y = [h1 h2 h1] [B1 B1 B2]ᵀ + bias,     h = h1 + h2, B = B1 + B2
    y = y + x Wᵀ

Where adapters are fp32 and activations have 16 bits, each factor is split into two 16-bit ones, which
keeps 16 bits of the product and never makes an [M, N] in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import native, reference
from fastlora.dispatch import backend
from fastlora.operands import Base, Gradients, Lora, Needs

MERGE_FROM_M = 128
GEMV_UP_TO_M = 8


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
        y = _sum(_update(h * lora.scaling, lora.b.to(lora.dtype).t(), x, base, bias), x, base)
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
    update = _update(g, lora.a.to(lora.dtype), dy, base, None)
    if lora.seed is not None:
        update.mul_(_mask(lora, *update.shape))
    return Gradients(_sum(update, dy, base, transposed=True), da, db)


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


def _packed_product(x: Tensor, base: Base, transposed: bool) -> Tensor:
    """x Wᵀ, or x W where `transposed`, in fp32, for a few rows."""
    assert base.absmax is not None
    out = torch.empty(x.shape[0], base.k if transposed else base.n)
    product = native.nf4_gemv_t if transposed else native.nf4_gemv
    product(x.contiguous(), base.weight, base.absmax, base.absmax2, base.code2, base.offset, base.blocksize, out)
    return out


def _base_product(x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [M, N]."""
    if not _reads_packed(x, base):
        return F.linear(x, base.dense(x.dtype), bias)
    y = _packed_product(x, base, transposed=False)
    return (y if bias is None else y + bias).to(x.dtype)


def _base_product_t(dy: Tensor, base: Base) -> Tensor:
    """dy W, [M, K]."""
    if not _reads_packed(dy, base):
        return dy @ base.dense(dy.dtype)
    return _packed_product(dy, base, transposed=True).to(dy.dtype)


def _update(left: Tensor, right: Tensor, x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
    """left right + bias, to which `_sum` adds the base product. left: [M, R]; right: [R, N].

    In fp32 where that product comes in fp32 (few rows), else in x's dtype.
    """
    dtype = torch.float32 if _reads_packed(x, base) else x.dtype
    if left.dtype != dtype and dtype == torch.float32:
        left, right = left.float(), right.float()
    elif left.dtype != dtype:
        left_high, right_high = left.to(dtype), right.to(dtype)
        left_low, right_low = (left - left_high).to(dtype), (right - right_high).to(dtype)
        left = torch.cat((left_high, left_low, left_high), dim=1)
        right = torch.cat((right_high, right_high, right_low))
    return left @ right if bias is None else torch.addmm(bias.to(dtype), left, right)


def _sum(update: Tensor, x: Tensor, base: Base, transposed: bool = False) -> Tensor:
    """update + x Wᵀ (or x W), rounded once to x's dtype; `update` is overwritten."""
    if _reads_packed(x, base):
        return update.add_(_packed_product(x, base, transposed)).to(x.dtype)
    weight = base.dense(x.dtype)
    return update.addmm_(x, weight if transposed else weight.t())
