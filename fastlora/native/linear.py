"""Whole LoRA linears in bf16 by the compiled CPU library, for processors with AVX512_BF16; see `native.cpu` on calls.

    y  = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias
    dx = dy W + scaling · mask ∘ ((dy B) A),   dA = scaling · (dy B)ᵀ x̃,   dB = scaling · dyᵀ h,   h = x̃ Aᵀ

One call forward, one backward, over a dense weight or NF4 codes. The update is summed first, in fp32, and the base
product is added to it, with one rounding; neither the update nor an expanded weight is written to memory. x, dy and W
are multiplied in bf16, an NF4 weight rounded to it as by `nf4_dequantize`. bf16 adapters are multiplied as they are,
and h and dy B are rounded to bf16 for their second factors. fp32 adapters are multiplied in bf16 parts that keep 24
bits (16 where the result is bf16), or as they are in a forward of few tokens.

For a few tokens the work takes little more time than the call itself. So operands are packed by `struct` and checked by
one expression each, and what was wrong is found out only after a check has failed.

Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
"""

import struct
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastlora.kernels.operands import Lora, Packed
from fastlora.native.cpu import ISAS, chosen_isa, loaded, raise_for_status
from fastlora.native.lora import dropout_of
from fastlora.native.weight import fields_of

MAX_RANK = 512
FEW_TOKENS = 16  # where the processor has AMX, which torch uses, this code serves only so many tokens

_ADAPTER_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_OPERANDS = struct.Struct("@Pq 5P3q PPq Qi4x fi")  # fastlora::LoraLinear of csrc/linear.h


def supports(m: int, n: int, k: int, rank: int, packed: bool) -> bool:
    """Whether these functions take x [m, k] and W [n, k] (NF4 if `packed`) on this machine, and are the fastest way.

    Raises:
        ValueError: FASTLORA_CPU_ISA names no instruction set of this machine.
        RuntimeError: the library is not loaded.
    """
    return _supports(m <= FEW_TOKENS, n, k, rank, packed)


@lru_cache(maxsize=4096)
def _supports(few: bool, n: int, k: int, rank: int, packed: bool) -> bool:
    library = loaded()
    if rank > MAX_RANK or n % 2 or k % (32 if packed else 2) or ISAS[chosen_isa(library)] != "avx512bf16":
        return False
    return few or not library.fastlora_linear_is_for_few_tokens()


def forget_choice() -> None:
    """Read FASTLORA_CPU_ISA again at the next call."""
    chosen_isa.cache_clear()
    _supports.cache_clear()


def linear(
    x: Tensor, weight: Tensor | Packed, lora: Lora | None, bias: Tensor | None, save_h: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias, and h = dropout(x) Aᵀ where `save_h`.

    Args:
        x: [M, K], bf16; adjacent columns, any row stride; K is even, and over NF4 a multiple of 32.
        weight: [N, K], bf16 with adjacent columns, or NF4. N is even.
        lora: A and B of one dtype, fp32 or bf16, contiguous, R from 1 to MAX_RANK; its bias is not read.
        bias: [N], fp32, contiguous.
    Returns:
        y [M, N], bf16; h [M, R], fp32, or None.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above.
        RuntimeError: the library is not loaded, or the processor lacks AVX512_BF16; see `supports`.
    """
    library = loaded()
    operands, N, K, R = _operands(weight, lora)
    M = _require_rows("x", x, K)
    bias_at = h_at = None
    if bias is not None:
        _require("bias", bias, (N,), torch.float32)
        bias_at = bias.data_ptr()
    y, h = x.new_empty((M, N)), None
    if save_h and lora is not None:
        h = torch.empty((M, R), dtype=torch.float32, device="cpu")
        h_at = h.data_ptr()
    if M and N:
        result = library.fastlora_linear(
            operands, x.data_ptr(), M, x.stride(0), bias_at, y.data_ptr(), h_at, chosen_isa(library),
            torch.get_num_threads(),
        )  # fmt: skip
        if result:
            raise_for_status(result)
    return y, h


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | Packed,
    lora: Lora | None,
    need_x: bool,
    need_a: bool = False,
    need_b: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB, each where it is needed.

    Args:
        dy: [M, N], bf16; adjacent columns.
        x: [M, K], as in `linear`; for dA. h: [M, R], as `linear` gives it; for dB.
        weight, lora: as in `linear`.
    Returns:
        dx [M, K], bf16; dA [R, K] and dB [N, R], of the adapters' dtype. None for what is not needed.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above, or what dA or dB needs is missing.
        RuntimeError: the library is not loaded, or the processor lacks AVX512_BF16; see `supports`.
    """
    library = loaded()
    operands, N, K, R = _operands(weight, lora)
    M = _require_rows("dy", dy, N)
    dx = da = db = x_at = h_at = dx_at = da_at = db_at = None
    x_stride = 0
    if (need_a or need_b) and lora is None:
        raise ValueError("dA and dB need the adapters: pass lora")
    if need_a:
        if x is None or _require_rows("x", x, K) != M:
            raise ValueError(f"dA needs x of [{M}, {K}]; got {None if x is None else list(x.shape)}")
        x_at, x_stride = x.data_ptr(), x.stride(0)
    if need_b:
        if h is None:
            raise ValueError("dB needs h, as linear() gives it")
        _require("h", h, (M, R), torch.float32)
        h_at = h.data_ptr()
    if need_x:
        dx = dy.new_empty((M, K))
        dx_at = dx.data_ptr()
    if need_a and lora is not None:
        da = torch.empty_like(lora.a)
        da_at = da.data_ptr()
    if need_b and lora is not None:
        db = torch.empty_like(lora.b)
        db_at = db.data_ptr()
    result = library.fastlora_linear_backward(
        operands, dy.data_ptr(), M, dy.stride(0), x_at, x_stride, h_at, dx_at, da_at, db_at, chosen_isa(library),
        torch.get_num_threads(),
    )  # fmt: skip
    if result:
        raise_for_status(result)
    return dx, da, db


def _operands(weight: Tensor | Packed, lora: Lora | None) -> tuple[bytes, int, int, int]:
    """The operands as the library takes them, N, K and R. They borrow the tensors' memory."""
    base: tuple[Any, ...]
    if isinstance(weight, Packed):
        *pointers, N, K, log2_blocksize = fields_of(weight)
        base, granule = (0, 0, *[pointer or 0 for pointer in pointers], N, K, log2_blocksize), 32
    else:
        if not (weight.dtype is torch.bfloat16 and weight.dim() == 2 and weight.is_cpu and weight.stride(1) == 1):
            _refuse("weight", weight, "[N, K] in torch.bfloat16 on the CPU, with adjacent columns")
        (N, K), granule = weight.shape, 2
        base = (weight.data_ptr(), weight.stride(0), 0, 0, 0, 0, 0, N, K, 0)
    if N % 2 or K % granule:
        raise ValueError(f"the weight is [{N}, {K}]: N and K must be even, and K of an NF4 weight a multiple of 32")
    if lora is None:
        return _OPERANDS.pack(*base, 0, 0, 0, 0, -1, 0.0, 1), N, K, 0
    lora_a, lora_b = lora.a, lora.b
    R, dtype = lora_a.shape[0], lora_a.dtype
    if dtype not in _ADAPTER_DTYPES or not 1 <= R <= MAX_RANK:
        _refuse("lora_a", lora_a, f"[R, {K}] in torch.float32 or torch.bfloat16, R from 1 to {MAX_RANK}")
    _require("lora_a", lora_a, (R, K), dtype)
    _require("lora_b", lora_b, (N, R), dtype)
    seed, threshold = 0, -1
    if lora.seed is not None:
        mask = dropout_of(int(lora.seed.item()), lora.dropout_p)
        assert mask is not None
        seed, threshold = mask.seed, mask.threshold
    adapters = (lora_a.data_ptr(), lora_b.data_ptr(), R, seed, threshold, lora.scaling, _ADAPTER_DTYPES[dtype])
    return _OPERANDS.pack(*base, *adapters), N, K, R


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if not (tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous()):
        _refuse(name, tensor, f"{list(shape)} in {dtype}, contiguous, on the CPU")


def _require_rows(name: str, x: Tensor, columns: int) -> int:
    """The number of rows of an activation."""
    if not (x.dtype is torch.bfloat16 and x.dim() == 2 and x.is_cpu and x.shape[1] == columns and x.stride(1) == 1):
        _refuse(name, x, f"[M, {columns}] in torch.bfloat16 on the CPU, with adjacent columns")
    return x.shape[0]


def _refuse(name: str, tensor: Tensor, expected: str) -> NoReturn:
    raise ValueError(
        f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}, "
        f"expected {expected}"
    )
