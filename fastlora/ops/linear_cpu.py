"""The linear in torch's own operators and compiled C++: the CPU path, and the fall-back on any other device.

If the C++ library is loaded, it expands NF4 in one pass, multiplies a few rows with packed codes directly, and computes
the low-rank products h, g, dA and dB, reading 16-bit activations once and never widening them in memory. If not,
torch's operators compute the same. bf16 on a processor with AVX512_BF16 takes `linear_cpu_bf16` instead.

With at least as many tokens as the weight has rows or columns, the update is merged while the weight is expanded, and
costs no pass over activations. With fewer, and for dense weights or dropout, the update is written first and the base
product is added to it with beta = 1, in fp32, rounded once: added the other way round, a small update would be rounded
away.

    y = [h1 h2 h1] [B1 B1 B2]ᵀ + bias,     h = h1 + h2, B = B1 + B2
    y = y + x Wᵀ

Where adapters are fp32 and activations have 16 bits, each factor is split into two 16-bit ones, which keeps 16 bits of
the product and never makes an [M, N] in fp32. For a few rows the extra calls do not pay, and fp32 is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import reference
from fastlora.kernels.operands import Lora
from fastlora.native import cpu, linear
from fastlora.native.lora import dropout_mask, lora_outer, lora_shrink
from fastlora.ops.backend import backend
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import ANY_M, Gradients, Needs, Step, added_product, affine, dense, merged, with_rows

GEMV_UP_TO_M = 8  # above, expanding the weight and one product are faster than decoding it for every few rows
SPLIT_FROM_M = 128
STREAM_FROM = 1 << 15  # elements of an activation below which torch's own calls are faster


def forward(
    x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h = dropout(x) Aᵀ [M, R] in fp32 where `save_h`. x: [M, K]."""
    if lora is None:
        return _base_product(x, weight, bias), None
    if _is_small_fp32(x, weight, lora):
        shrunk = F.linear(x, lora.a)  # [M, R]
        y = affine(x, dense(weight, x.dtype), bias).addmm_(shrunk, lora.b.t(), alpha=lora.scaling)
        return y, shrunk if save_h else None
    merges = _merges(x, weight, lora)
    h = _shrink(x, lora.a.t(), 1.0, lora) if save_h or not merges else None  # [M, R]
    if merges:
        assert isinstance(weight, NF4Weight)
        y = affine(x, merged(weight, x.dtype, lora), bias)
    else:
        assert h is not None
        y = _adapted(h, x, weight, lora, bias)
    return y, h.float() if h is not None and save_h else None


def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor | NF4Weight, lora: Lora | None, needs: Needs
) -> Gradients:
    """Gradients of everything except a dense weight and the bias. dy: [M, N]; x is needed for dA, h for dB."""
    if lora is None:
        return Gradients(_base_product_t(dy, weight) if needs.x else None, None, None)
    if _is_small_fp32(dy, weight, lora):
        return _small_fp32_backward(dy, x, h, dense(weight, dy.dtype), lora, needs)
    merges, undropped = _merges(dy, weight, lora), lora._replace(seed=None)
    g, da, db = None, None, None
    if needs.lora_b:
        assert h is not None
        db = _outer(h, dy, lora.scaling, undropped, transposed=True).to(lora.b.dtype)  # [N, R]
    if needs.lora_a or (needs.x and not merges):
        g = _shrink(dy, lora.b, lora.scaling, undropped)  # [M, R]
    if needs.lora_a:
        assert g is not None
        assert x is not None
        da = _outer(g, x, 1.0, lora).to(lora.a.dtype)  # [R, K]
    if not needs.x:
        return Gradients(None, da, db)
    if merges:
        assert isinstance(weight, NF4Weight)
        return Gradients(dy @ merged(weight, dy.dtype, lora), da, db)
    assert g is not None
    packed = _reads_packed(dy, weight)
    update = _update(g, lora.a, dy, packed, None)  # [M, K]
    if lora.seed is not None:
        update.mul_(_mask(lora, *update.shape))
    return Gradients(_sum(update, dy, weight, packed, transposed=True), da, db)


def steps(n: int, k: int, blocksize: int, r: int, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """What computes y by the number of tokens, without dropout; blocksize 0: a dense weight."""
    cpp, packed = backend(device).name == "cpp", blocksize > 0
    found = [Step(ANY_M, "linear_cpu", "torch's product, update first")]
    if packed:
        found = [Step(ANY_M, "linear_cpu", "expand, then torch's product")]
        if r:
            first = Step(min(n, k) - 1, "linear_cpu", "expand, then torch's product, update first")
            found = [first, Step(ANY_M, "linear_cpu", "expand and merge, then torch's product")]
        if cpp:
            found = [Step(GEMV_UP_TO_M, "linear_cpu", "C++ product over packed codes"), *found]
    if cpp and dtype is torch.bfloat16 and linear.supports(1, n, k, r, packed):
        few = ANY_M if linear.supports(ANY_M, n, k, r, packed) else linear.FEW_TOKENS
        found = [Step(few, "linear_cpu_bf16", "one C++ product"), *(step for step in found if step.m > few)]
    return found


def _merges(x: Tensor, weight: Tensor | NF4Weight, lora: Lora) -> bool:
    """Whether to merge: that costs N K R products, a separate update M N R or M K R."""
    return isinstance(weight, NF4Weight) and lora.seed is None and x.shape[0] >= min(weight.shape)


def _is_small_fp32(x: Tensor, weight: Tensor | NF4Weight, lora: Lora) -> bool:
    """Whether all operands are fp32, dense and small, so that the fewest calls of torch are the fastest.

    Nothing is rounded below fp32 there, so that the order of the two parts of a sum does not matter.
    """
    return (
        x.dtype is torch.float32
        and lora.seed is None
        and isinstance(weight, Tensor)
        and x.shape[0] * max(weight.shape) < STREAM_FROM
    )


def _small_fp32_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, lora: Lora, needs: Needs
) -> Gradients:
    """`backward` by the fewest calls of torch; see `_is_small_fp32`."""
    g, dx, da, db = None, None, None, None
    if needs.x or needs.lora_a:
        g = (dy @ lora.b).mul_(lora.scaling)  # [M, R]
    if needs.x:
        assert g is not None
        dx = (dy @ weight).addmm_(g, lora.a)  # [M, K]
    if needs.lora_a:
        assert g is not None
        assert x is not None
        da = g.t() @ x  # [R, K]
    if needs.lora_b:
        assert h is not None
        db = (dy.t() @ h).mul_(lora.scaling)  # [N, R]
    return Gradients(dx, da, db)


def _has_cpp(x: Tensor) -> bool:
    return backend(x.device).name == "cpp"


def _streams(x: Tensor, lora: Lora) -> bool:
    """Whether C++ computes a low-rank product: where there is enough to read, or a mask to derive."""
    return (x.numel() >= STREAM_FROM or lora.seed is not None) and _has_cpp(x)


def _seed(lora: Lora) -> int | None:
    return None if lora.seed is None else int(lora.seed.item())


def _mask(lora: Lora, rows: int, columns: int) -> Tensor:
    """The dropout mask [rows, columns] in fp32, derived again from the seed."""
    assert lora.seed is not None
    if _has_cpp(lora.seed):
        mask = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
        dropout_mask(int(lora.seed.item()), lora.dropout_p, mask)
        return mask
    return reference.dropout_mask(int(lora.seed.item()), rows, columns, lora.dropout_p).to(lora.seed.device)


def _dropped(x: Tensor, lora: Lora) -> Tensor:
    """dropout(x) in the dtype of the low-rank products."""
    wide = x.to(lora.dtype)
    return wide if lora.seed is None else wide * _mask(lora, *x.shape).to(lora.dtype)


def _shrink(x: Tensor, right: Tensor, scaling: float, lora: Lora) -> Tensor:
    """scaling · dropout(x) right, [M, R]. x: [M, K]; right: [K, R], a view of an adapter."""
    if _streams(x, lora):
        out = torch.empty(x.shape[0], right.shape[1], dtype=torch.float32, device="cpu")
        lora_shrink(with_rows(x), right.t().float(), out, scaling, _seed(lora), lora.dropout_p)
        return out
    # the factor goes to the smaller operand: a 16-bit product would be rounded a second time
    return _dropped(x, lora) @ _scaled(right.to(lora.dtype), scaling)  # [M, K] @ [K, R]


def _outer(left: Tensor, x: Tensor, scaling: float, lora: Lora, transposed: bool = False) -> Tensor:
    """scaling · leftᵀ dropout(x), [R, K], or its transpose [K, R], contiguous. left: [M, R]; x: [M, K]."""
    if _streams(x, lora):
        shape = (x.shape[1], left.shape[1]) if transposed else (left.shape[1], x.shape[1])
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        view = out.t() if transposed else out
        lora_outer(with_rows(x), left.float().contiguous(), view, scaling, _seed(lora), lora.dropout_p)
        return out
    wide, left = _dropped(x, lora), _scaled(left.to(lora.dtype), scaling)
    return wide.t() @ left if transposed else left.t() @ wide


def _scaled(t: Tensor, scaling: float) -> Tensor:
    return t if scaling == 1.0 else t * scaling


def _reads_packed(x: Tensor, weight: Tensor | NF4Weight) -> bool:
    """Whether the product can read packed codes, so that no expanded weight is written."""
    return isinstance(weight, NF4Weight) and 0 < x.shape[0] <= GEMV_UP_TO_M and _has_cpp(x)


def _packed_product(x: Tensor, weight: Tensor | NF4Weight, transposed: bool) -> Tensor:
    """x Wᵀ, or x W where `transposed`, in fp32, for a few rows."""
    assert isinstance(weight, NF4Weight)
    out = torch.empty(x.shape[0], weight.shape[transposed], dtype=torch.float32, device="cpu")
    (cpu.nf4_gemv_t if transposed else cpu.nf4_gemv)(x.contiguous(), weight, out)
    return out


def _base_product(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [M, N]."""
    if not _reads_packed(x, weight):
        return affine(x, dense(weight, x.dtype), bias)
    y = _packed_product(x, weight, transposed=False)
    return (y if bias is None else y + bias).to(x.dtype)


def _base_product_t(dy: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    """dy W, [M, K]."""
    if not _reads_packed(dy, weight):
        return dy @ dense(weight, dy.dtype)
    return _packed_product(dy, weight, transposed=True).to(dy.dtype)


def _adapted(h: Tensor, x: Tensor, weight: Tensor | NF4Weight, lora: Lora, bias: Tensor | None) -> Tensor:
    """x Wᵀ + scaling · h Bᵀ + bias, [M, N].

    The update goes first, and the base product is added to it. A bias wider than x must not be rounded twice, as it may
    be larger than both; with such a bias the base goes first.
    """
    packed = _reads_packed(x, weight)
    if bias is None or bias.dtype == x.dtype or packed:
        return _sum(_update(h * lora.scaling, lora.b.t(), x, packed, bias), x, weight, packed)
    y = x @ dense(weight, x.dtype).t()
    return torch.add(y, torch.addmm(bias, h.float() * lora.scaling, lora.b.t().float()), out=y)


def _update(left: Tensor, right: Tensor, x: Tensor, packed: bool, bias: Tensor | None) -> Tensor:
    """left right + bias, to which `_sum` adds the base product. left: [M, R]; right: [R, N], a view of an adapter.

    In fp32 where the base product will be in fp32 (`packed`), else in x's dtype.
    """
    dtype = torch.float32 if packed else x.dtype
    if dtype == torch.float32 or right.dtype == dtype:
        left, right = left.to(dtype), right.to(dtype)
    elif left.shape[0] < SPLIT_FROM_M:
        update = left.float() @ right.float()
        return (update if bias is None else update + bias).to(dtype)
    else:
        left, right = left.float(), right.float()
        left_high, right_high = left.to(dtype), right.to(dtype)
        left_low, right_low = (left - left_high).to(dtype), (right - right_high).to(dtype)
        left = torch.cat((left_high, left_low, left_high), dim=1)  # [M, 3 R]
        right = torch.cat((right_high, right_high, right_low))  # [3 R, N]
    return affine(left, right.t(), bias)


def _sum(update: Tensor, x: Tensor, weight: Tensor | NF4Weight, packed: bool, transposed: bool = False) -> Tensor:
    """update + x Wᵀ (or x W), rounded once to x's dtype; `update` is overwritten."""
    if packed:
        return update.add_(_packed_product(x, weight, transposed)).to(x.dtype)
    w = dense(weight, x.dtype)
    return added_product(update, x, w if transposed else w.t())
