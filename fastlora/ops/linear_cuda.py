"""The linear on CUDA, by the number of tokens: kernels that read packed codes for few, cuBLAS for many.

    decode       up to 16, no dropout: each packed byte read once, LoRA inside; compiled CUDA, or the same in Triton
    fused        up to about M*: tiles expand inside the product, and LoRA's h or g is one more tile of the contraction
    dequantize   above: the weight expanded into memory, one cuBLAS product

`fastlora.kernels.choice` says which, by a table for each GPU. What a kernel does not take, a dtype or an odd shape,
goes to the next one down this list. Dense weights always go to cuBLAS.

Without dropout an expanded NF4 weight has s · B A merged in: LoRA costs only the shrink, the dy pass and the x pass,
each one read of an activation. With dropout, or over a dense weight, where merging would round small updates away,
cuBLAS writes the base product in fp32, and `expand` adds the update to it and rounds once. (With beta = 1 cuBLAS rounds
the base product to 16 bits before it adds, measured on an H100: most of a small update would be lost.)

The expanded weight comes from torch's caching allocator, which gives every layer of a stream the same block
in turn: in effect a scratch buffer, with nothing to size or to free.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.kernels import choice, decode, fused, search
from fastlora.kernels import lora as kernel
from fastlora.kernels.choice import Choice
from fastlora.kernels.lora_plan import Dropout
from fastlora.kernels.operands import Lora
from fastlora.native import cuda
from fastlora.ops import expanded
from fastlora.ops.backend import compiled_decode, read_once
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import ANY_M, Gradients, Needs, Step, affine, dense, merged, wide_product

_DECODERS = {"decode-cuda": cuda, "decode": decode}
_NEXT = {"decode-cuda": "decode", "decode": "fused", "fused": "dequantize"}
DEQUANTIZE = Choice("dequantize")
_NO_DROPOUT = Dropout()
MOST_BASE_VALUES = 1 << 26  # of a base product kept in fp32: 256 MiB


def forward(
    x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h = dropout(x) Aᵀ [M, R] in fp32 where `save_h`. x: [M, K]."""
    chosen = _choose("linear", x, weight, lora, lambda other: forward_by(other, x, weight, lora, bias, save_h))
    return forward_by(chosen, x, weight, lora, bias, save_h)


def forward_by(
    chosen: Choice, x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None, save_h: bool,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `forward`, by a given kernel, which must support the operands. h: if it is there already."""
    a, b, scaling, dropout = _parts(lora)
    if h is None and a is not None and lora is not None and (save_h or needs_h(chosen, weight, lora)):
        h = kernel.shrink(x, a, dropout)  # [M, R]
    if isinstance(weight, NF4Weight) and chosen.kernel in _DECODERS:
        y = _DECODERS[chosen.kernel].decode(x, weight, a, b, scaling, bias)
    elif isinstance(weight, NF4Weight) and chosen.kernel == "fused":
        y = fused.linear(x, weight, h, b, scaling, bias, chosen.config)
    elif lora is None:
        y = affine(x, dense(weight, x.dtype), bias)
    elif isinstance(weight, NF4Weight) and merges(weight, lora):
        y = affine(x, merged(weight, x.dtype, lora), bias)
    else:
        assert h is not None
        assert b is not None
        y = _added(h, b, scaling, x, dense(weight, x.dtype).t(), _NO_DROPOUT, bias)
    return y, h if save_h else None


def rescaled(
    x: Tensor, weight: Tensor, lora: Lora, factor: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(factor ∘ (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias [..., N] in `dtype`, x Wᵀ [M, N], h = x Aᵀ [M, R] in fp32).

    x: [..., K]. weight: [N, K]. factor: [N], fp32.
    """
    a, b, scaling, _ = _parts(lora)
    assert a is not None
    assert b is not None
    rows = x.reshape(-1, x.shape[-1])
    h, base = kernel.shrink(rows, a, _NO_DROPOUT), wide_product(rows, weight.t())
    y = kernel.expand(h, b, scaling, dtype, _NO_DROPOUT, bias, base, rescale=factor)
    return y.view(*x.shape[:-1], -1), base.to(x.dtype), h


def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor | NF4Weight, lora: Lora | None, needs: Needs
) -> Gradients:
    """Gradients of everything except a dense weight and the bias. dy: [M, N]; x is needed for dA, h for dB."""
    chosen = DEQUANTIZE
    if needs.x:
        chosen = _choose("linear_t", dy, weight, lora, lambda other: backward_by(other, dy, x, h, weight, lora, needs))
    return backward_by(chosen, dy, x, h, weight, lora, needs)


def backward_by(
    chosen: Choice,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | NF4Weight,
    lora: Lora | None,
    needs: Needs,
) -> Gradients:
    """As `backward`, with dx by a given kernel, which must support the operands."""
    if lora is None:
        return Gradients(dx_by(chosen, dy, None, weight, lora) if needs.x else None, None, None)
    x, h = x if needs.lora_a else None, h if needs.lora_b else None
    g, da, db = gradients(dy, x, h, lora, needs.x and needs_g(chosen, weight, lora))
    return Gradients(dx_by(chosen, dy, g, weight, lora) if needs.x else None, da, db)


def gradients(
    dy: Tensor, x: Tensor | None, h: Tensor | None, lora: Lora, need_g: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g = scaling · dy B [M, R] in fp32, dA, and dB; x is given where dA is wanted, h where dB is."""
    a, b, scaling, dropout = _parts(lora)
    assert a is not None
    assert b is not None
    g, da, db = kernel.gradients(dy, x, h, a, b, scaling, dropout, need_g)
    if a.dtype is not lora.a.dtype or b.dtype is not lora.b.dtype:
        da, db = None if da is None else da.to(lora.a.dtype), None if db is None else db.to(lora.b.dtype)
    return g, da, db


def shrink(x: Tensor, lora_a: Tensor, lora: Lora | None = None) -> Tensor:
    """h = dropout(x) Aᵀ [M, R] in fp32, with the mask of `lora`, if it has one. x: [M, K]."""
    return kernel.shrink(x, lora_a, _parts(lora)[3])


def x_gradient(x: Tensor, g: Tensor, lora: Lora) -> Tensor:
    """dA = gᵀ dropout(x), in A's dtype, with the mask of `lora`. x: [M, K]; g: [M, R]."""
    return kernel.total(kernel.x_parts(x, g, _parts(lora)[3], lora.dtype), lora.a.dtype)


def needs_h(chosen: Choice, weight: Tensor | NF4Weight, lora: Lora) -> bool:
    """Whether y is made of h."""
    return chosen.kernel not in _DECODERS and needs_g(chosen, weight, lora)


def needs_g(chosen: Choice, weight: Tensor | NF4Weight, lora: Lora) -> bool:
    """Whether dx is made of g: not where the update is merged into an expanded weight."""
    return not (chosen.kernel == "dequantize" and merges(weight, lora))


def choose(op: str, rows: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None = None) -> Choice:
    """The kernel for y ("linear", from rows x) or dx ("linear_t", from rows dy)."""

    def run(other: Choice) -> object:
        if op == "linear":
            return forward_by(other, rows, weight, lora, bias, False)
        return backward_by(other, rows, None, None, weight, lora, Needs(True, False, False))

    return _choose(op, rows, weight, lora, run)


def base_product(op: str, rows: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    """x Wᵀ ("linear") or dy W ("linear_t"): in fp32 by cuBLAS, in the rows' dtype where packed codes are read."""
    forwards = op == "linear"

    def run(other: Choice) -> object:
        if forwards:
            return forward_by(other, rows, weight, None, None, False)
        return backward_by(other, rows, None, None, weight, None, Needs(True, False, False))

    chosen = _choose(op, rows, weight, None, run)
    if chosen.kernel == "dequantize":
        whole = dense(weight, rows.dtype)
        return wide_product(rows, whole.t() if forwards else whole)
    if forwards:
        return forward_by(chosen, rows, weight, None, None, False)[0]
    return dx_by(chosen, rows, None, weight, None)


def dx_by(chosen: Choice, dy: Tensor, g: Tensor | None, weight: Tensor | NF4Weight, lora: Lora | None) -> Tensor:
    """dx [M, K] from dy [M, N] and g = scaling · dy B [M, R]; a merged weight needs no g."""
    a, _, _, dropout = _parts(lora)
    if isinstance(weight, NF4Weight) and chosen.kernel == "fused":
        return fused.linear_t(dy, weight, g, a, dropout, chosen.config)
    if lora is None:
        return dy @ dense(weight, dy.dtype)
    if isinstance(weight, NF4Weight) and merges(weight, lora):
        return dy @ merged(weight, dy.dtype, lora)
    assert g is not None
    assert a is not None
    return _added(g, a.t(), 1.0, dy, dense(weight, dy.dtype), dropout)


def _added(
    h: Tensor, b: Tensor, scaling: float, x: Tensor, w: Tensor, dropout: Dropout, bias: Tensor | None = None
) -> Tensor:
    """mask ∘ (scaling · h bᵀ) + x w + bias in x's dtype, rounded once; x w is in fp32, for some rows at a time."""
    m, n = x.shape[0], w.shape[1]
    rows = max(MOST_BASE_VALUES // n // 256 * 256, 256)
    if m <= rows or dropout.active or x.dtype is torch.float32:  # masks go by the number of a row
        return kernel.expand(h, b, scaling, x.dtype, dropout, bias, wide_product(x, w))
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        kernel.expand(h[part], b, scaling, x.dtype, dropout, bias, wide_product(x[part], w), out=out[part])
    return out


def _choose(
    op: str, rows: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, run: Callable[[Choice], object]
) -> Choice:
    """The kernel for a product with these operands; `run` does it by a given choice, for a search."""
    if not isinstance(weight, NF4Weight) or (rows.shape[0] > choice.DECODE_UP_TO_M and expanded.holds(rows.device)):
        return DEQUANTIZE
    r, drops = (0, False) if lora is None else (lora.a.shape[0], lora.seed is not None)
    asked = op, rows.shape[0], weight.shape, weight.blocksize, r, drops, rows.dtype, rows.device
    return _by_table(*asked) or _by_search(*asked, run)


@read_once
def _by_table(
    op: str, m: int, shape: tuple[int, int], blocksize: int, r: int, drops: bool, dtype: torch.dtype,
    device: torch.device,
) -> Choice | None:  # fmt: skip
    """The table's choice, or the next one down where that does not take the operands; None: it is to be searched."""
    if search.autotunes():
        return None
    n, k = shape
    chosen = choice.choose(op, m, n, k, r, drops, device, compiled_decode(device)[0])
    while refusal(chosen.kernel, dtype, m, k, n, blocksize, r):
        chosen = Choice(_NEXT[chosen.kernel])
    return chosen


def _by_search(
    op: str, m: int, shape: tuple[int, int], blocksize: int, r: int, drops: bool, dtype: torch.dtype,
    device: torch.device, run: Callable[[Choice], object],
) -> Choice:  # fmt: skip
    n, k = shape

    def fits(other: Choice) -> bool:
        return not refusal(other.kernel, dtype, m, k, n, blocksize, r)

    return search.search(op, m, n, k, r, drops, device, compiled_decode(device)[0], run, fits)


_WORDS = {
    "decode-cuda": "decode (CUDA C++)",
    "decode": "decode (Triton)",
    "fused": "fused dequantize-GEMM",
    "dequantize": "dequantize, then cuBLAS",
}


def steps(n: int, k: int, blocksize: int, r: int, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """What computes y by the number of tokens, without dropout; blocksize 0: a dense weight."""
    if not blocksize:
        return [Step(ANY_M, "linear_cuda", "cuBLAS in fp32, then the update")]
    found = []
    for bound, chosen in choice.steps("linear", n, k, r, False, device, compiled_decode(device)[0]):
        while refusal(chosen.kernel, dtype, min(bound, k), k, n, blocksize, r):
            chosen = Choice(_NEXT[chosen.kernel])
        found.append(Step(bound, "linear_cuda", _WORDS[chosen.kernel]))
    return found


def refusal(kernel: str, dtype: torch.dtype, m: int, k: int, n: int, blocksize: int, r: int) -> str:
    """Why a kernel does not take a product of these operands; empty where it does."""
    if kernel == "dequantize":
        return ""
    return _refusal(kernel, dtype, m if kernel in _DECODERS else 0, k, n, blocksize, r)


@functools.lru_cache(maxsize=4096)
def _refusal(kernel: str, dtype: torch.dtype, m: int, k: int, n: int, blocksize: int, r: int) -> str:
    if kernel in _DECODERS:
        return _DECODERS[kernel].supports(dtype, m, k, n, blocksize, r)
    return fused.supports(dtype, k, n, blocksize, r)


def _parts(lora: Lora | None) -> tuple[Tensor | None, Tensor | None, float, Dropout]:
    """A and B in one dtype, the scaling, and what the kernels need of dropout."""
    if lora is None:
        return None, None, 0.0, _NO_DROPOUT
    a, b = lora.a, lora.b
    if a.dtype != b.dtype:
        a, b = a.to(lora.dtype), b.to(lora.dtype)
    return a, b, lora.scaling, Dropout(lora.dropout_p, lora.seed) if lora.seed is not None else _NO_DROPOUT


def merges(weight: Tensor | NF4Weight, lora: Lora | None) -> bool:
    """Whether an expanded weight can have the update merged in."""
    return isinstance(weight, NF4Weight) and lora is not None and lora.seed is None
