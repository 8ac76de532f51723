"""Whole LoRA linears in bf16 by the compiled CPU library, for processors with AVX512_BF16; `native` says how.

    y  = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias
    dx = dy W + scaling · mask ∘ ((dy B) A),   dA = scaling · (dy B)ᵀ x̃,   dB = scaling · dyᵀ h,   h = x̃ Aᵀ

One call forward, one backward, over a dense weight or NF4 codes. The update is summed first, in fp32, and the base
product onto it, with one rounding; neither the update nor an expanded weight is written to memory. x, dy and W are
multiplied in bf16, an NF4 weight rounded to it as by `nf4_dequantize`. bf16 adapters are multiplied as they are, h and
dy B rounded to bf16 for their second factors; fp32 adapters in bf16 parts that keep 24 bits (16 where the result is
bf16), or as they are in a forward of few tokens.

For a few tokens these calls are not much longer than the time it takes to make them: operands are packed by `struct`
and checked by one expression each, and only a refusal looks at what was wrong.

Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
"""

import struct
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from fastlora.native.cpu import ISAS, check, chosen_isa, loaded
from fastlora.native.lora import dropout_of
from fastlora.native.weight import weight_of

MAX_RANK = 512
FEW_TOKENS = 16  # what is left to this code where the processor has AMX, which torch uses

_ADAPTER_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_OPERANDS = struct.Struct("@Pq 5P3q PPq Qi4x fi")  # fastlora::LoraLinear of csrc/linear.h


class Packed(NamedTuple):
    """An NF4 weight [n, k], its tensors as in `native.nf4_dequantize`."""

    codes: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    blocksize: int
    n: int
    k: int


class Update(NamedTuple):
    """The update of a LoRA linear.

    Args:
        lora_a: [R, K], fp32 or bf16, contiguous, R from 1 to MAX_RANK. lora_b: [N, R], likewise, of the same dtype.
        scaling: the factor of B A.
        seed, p: of the mask of dropout, as in `native_lora.lora_shrink`; seed None: no mask.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    seed: int | None = None
    p: float = 0.0


def supports(m: int, n: int, k: int, rank: int, packed: bool) -> bool:
    """Whether these functions take x [m, k] and W [n, k] (NF4 if `packed`) here, and are the quickest way.

    Raises:
        ValueError: FASTLORA_CPU_ISA names no instruction set of this machine.
        RuntimeError: the library is not loaded.
    """
    library = loaded()
    if rank > MAX_RANK or n % 2 or k % (32 if packed else 2) or ISAS[chosen_isa(library)] != "avx512bf16":
        return False
    return m <= FEW_TOKENS or not library.fastlora_linear_is_for_few_tokens()


def linear(
    x: Tensor, weight: Tensor | Packed, update: Update | None, bias: Tensor | None, out: Tensor, h: Tensor | None = None
) -> None:
    """out = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias, and h = dropout(x) Aᵀ.

    Args:
        x: [M, K], bf16; columns next to one another, rows any stride apart; K even, over NF4 a multiple of 32.
        weight: [N, K], bf16, columns next to one another; or NF4. N even.
        bias: [N], fp32, contiguous.
        out: [M, N], bf16, contiguous; overwritten.
        h: [M, R], fp32, contiguous; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded, or the processor lacks AVX512_BF16; see `supports`.
    """
    library = loaded()
    operands, N, K, R = _operands(weight, update)
    M = _require_rows("x", x, K)
    _require("out", out, (M, N), torch.bfloat16)
    if bias is not None:
        _require("bias", bias, (N,), torch.float32)
    if h is not None:
        _require("h", h, (M, R), torch.float32)
    isa = chosen_isa(library)
    if M == 0 or N == 0:
        return
    check(
        library.fastlora_linear(
            operands, x.data_ptr(), M, x.stride(0), None if bias is None else bias.data_ptr(), out.data_ptr(),
            None if h is None else h.data_ptr(), isa, torch.get_num_threads(),
        )
    )  # fmt: skip


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | Packed,
    update: Update | None,
    dx: Tensor | None,
    da: Tensor | None = None,
    db: Tensor | None = None,
) -> None:
    """dx, dA and dB, each where there is a tensor to write it to.

    Args:
        dy: [M, N], bf16; columns next to one another.
        x: [M, K], as in `linear`; needed for da. h: [M, R], as `linear` gives it; needed for db.
        dx: [M, K], bf16, contiguous; overwritten.
        da: [R, K]. db: [N, R]. Both of the adapters' dtype, contiguous; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded, or the processor lacks AVX512_BF16; see `supports`.
    """
    library = loaded()
    operands, N, K, R = _operands(weight, update)
    M = _require_rows("dy", dy, N)
    if dx is not None:
        _require("dx", dx, (M, K), torch.bfloat16)
    if da is not None:
        _require("da", da, (R, K), None if update is None else update.lora_a.dtype)
        if x is None or _require_rows("x", x, K) != M:
            raise ValueError(f"da needs x of [{M}, {K}]; got {None if x is None else list(x.shape)}")
    if db is not None:
        _require("db", db, (N, R), None if update is None else update.lora_a.dtype)
        if h is None:
            raise ValueError("db needs h, as linear() gives it")
        _require("h", h, (M, R), torch.float32)
    isa = chosen_isa(library)
    check(
        library.fastlora_linear_backward(
            operands, dy.data_ptr(), M, dy.stride(0), None if da is None or x is None else x.data_ptr(),
            0 if x is None else x.stride(0), None if db is None or h is None else h.data_ptr(),
            None if dx is None else dx.data_ptr(), None if da is None else da.data_ptr(),
            None if db is None else db.data_ptr(), isa, torch.get_num_threads(),
        )
    )  # fmt: skip


def _operands(weight: Tensor | Packed, update: Update | None) -> tuple[bytes, int, int, int]:
    """The operands as the library takes them, N, K and R. They borrow the tensors."""
    if isinstance(weight, Packed):
        N, K, granule = weight.n, weight.k, 32
        nf4 = weight_of(*weight)
        base = (
            0,
            0,
            nf4.codes,
            nf4.absmax,
            nf4.absmax2 or 0,
            nf4.code2 or 0,
            nf4.offset or 0,
            N,
            K,
            nf4.log2_blocksize,
        )
    else:
        if not (weight.dtype is torch.bfloat16 and weight.dim() == 2 and weight.is_cpu and weight.stride(1) == 1):
            _refuse("weight", weight, "[N, K] in torch.bfloat16 on the CPU, columns next to one another")
        (N, K), granule = weight.shape, 2
        base = (weight.data_ptr(), weight.stride(0), 0, 0, 0, 0, 0, N, K, 0)
    if N % 2 or K % granule:
        raise ValueError(f"a weight of [{N}, {K}]: N must be even, and K, over NF4 a multiple of 32")
    if update is None:
        return _OPERANDS.pack(*base, 0, 0, 0, 0, -1, 0.0, 1), N, K, 0
    lora_a, lora_b, scaling, seed, p = update
    R, dtype = lora_a.shape[0], lora_a.dtype
    if dtype not in _ADAPTER_DTYPES or not 1 <= R <= MAX_RANK:
        _refuse("lora_a", lora_a, f"[R, {K}] in torch.float32 or torch.bfloat16, R from 1 to {MAX_RANK}")
    _require("lora_a", lora_a, (R, K), dtype)
    _require("lora_b", lora_b, (N, R), dtype)
    dropout = dropout_of(seed, p)
    seed, threshold = (0, -1) if dropout is None else (dropout.seed, dropout.threshold)
    adapters = (lora_a.data_ptr(), lora_b.data_ptr(), R, seed, threshold, scaling, _ADAPTER_DTYPES[dtype])
    return _OPERANDS.pack(*base, *adapters), N, K, R


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if not (tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()):
        _refuse(name, tensor, f"{list(shape)} in {dtype}, contiguous, on the CPU")


def _require_rows(name: str, x: Tensor, columns: int) -> int:
    """The number of rows of an activation."""
    if not (x.dtype is torch.bfloat16 and x.dim() == 2 and x.is_cpu and x.shape[1] == columns and x.stride(1) == 1):
        _refuse(name, x, f"[M, {columns}] in torch.bfloat16 on the CPU, columns next to one another")
    return x.shape[0]


def _refuse(name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise ValueError(
        f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}, "
        f"expected {expected}"
    )
