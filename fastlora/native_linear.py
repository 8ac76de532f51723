"""Whole LoRA linears in bf16 by the compiled CPU library, for processors with AVX512_BF16; `native` says how.

    y  = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias
    dx = dy W + scaling · mask ∘ ((dy B) A),   dA = scaling · (dy B)ᵀ x̃,   dB = scaling · dyᵀ h,   h = x̃ Aᵀ

One call forward, one backward, over a dense weight or NF4 codes. The update is summed first, in fp32, and the base
product onto it, with one rounding; neither the update nor an expanded weight is written to memory. x, dy and W are
multiplied in bf16, an NF4 weight rounded to it as by `nf4_dequantize`. bf16 adapters are multiplied as they are, h and
dy B rounded to bf16 for their second factors; fp32 adapters in bf16 parts that keep 24 bits (16 where the result is
bf16).

Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.native import ISAS, Weight, check, chosen_isa, loaded, pointer_of, require, require_matrix, weight_of
from fastlora.native_lora import Activations, Dropout, activations_of, dropout_of

MAX_RANK = 512
FEW_TOKENS = 16  # what is left to this code where the processor has AMX, which torch uses

_BF16 = (torch.bfloat16,)
_ADAPTER_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _LoraLinear(ctypes.Structure):
    """fastlora::LoraLinear of csrc/linear.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("nf4", Weight),
        ("lora_a", ctypes.c_void_p),
        ("lora_b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("adapter_dtype", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        ("dropout", ctypes.POINTER(Dropout)),
    )


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
    if chosen_isa(library) != ISAS.index("avx512bf16") or rank > MAX_RANK or n % 2 or k % (32 if packed else 2):
        return False
    return m <= FEW_TOKENS or not library.fastlora_linear_is_for_few_tokens()


def linear(
    x: Tensor, weight: Tensor | Packed, update: Update | None, bias: Tensor | None, out: Tensor, h: Tensor | None = None
) -> None:
    """out = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias, and h = dropout(x) Aᵀ.

    Args:
        x: [M, K], bf16; columns next to one another, rows any stride apart; K even, over NF4 a multiple of 32.
        weight: [N, K], bf16, columns next to one another; or NF4. N even.
        bias: [N], bf16, contiguous.
        out: [M, N], bf16, contiguous; overwritten.
        h: [M, R], fp32, contiguous; overwritten.
    Raises:
        ValueError: a tensor's dtype, shape, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded, or the processor lacks AVX512_BF16; see `supports`.
    """
    library = loaded()
    operands, (N, K, R) = _operands(weight, update)
    activations = _activations("x", x, K)
    _require_shape("out", out, (x.shape[0], N), _BF16)
    if bias is not None:
        require("bias", bias, _BF16, N)
    if h is not None:
        _require_shape("h", h, (x.shape[0], R), (torch.float32,))
    isa = chosen_isa(library)
    if out.numel() == 0:
        return
    check(
        library.fastlora_linear(
            ctypes.byref(operands),
            ctypes.byref(activations),
            pointer_of(bias),
            out.data_ptr(),
            pointer_of(h),
            isa,
            torch.get_num_threads(),
        )
    )


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
    operands, (N, K, R) = _operands(weight, update)
    gradients = _activations("dy", dy, N)
    M = dy.shape[0]
    if dx is not None:
        _require_shape("dx", dx, (M, K), _BF16)
    activations = None
    for name, out, shape in (("da", da, (R, K)), ("db", db, (N, R))):
        if out is None:
            continue
        if update is None:
            raise ValueError(f"{name} is asked for, but there is no update: pass one")
        _require_shape(name, out, shape, (update.lora_a.dtype,))
    if da is not None:
        if x is None or x.shape[0] != M:
            raise ValueError(f"da needs x of [{M}, {K}]; got {None if x is None else list(x.shape)}")
        activations = _activations("x", x, K)
    if db is not None:
        if h is None:
            raise ValueError("db needs h, as linear() gives it")
        _require_shape("h", h, (M, R), (torch.float32,))
    isa = chosen_isa(library)
    if N == 0 or K == 0 or M == 0:
        for out in (dx, da, db):
            if out is not None:
                out.zero_()
        return
    check(
        library.fastlora_linear_backward(
            ctypes.byref(operands),
            ctypes.byref(gradients),
            None if activations is None else ctypes.byref(activations),
            pointer_of(h),
            pointer_of(dx),
            pointer_of(da),
            pointer_of(db),
            isa,
            torch.get_num_threads(),
        )
    )


def _operands(weight: Tensor | Packed, update: Update | None) -> tuple[_LoraLinear, tuple[int, int, int]]:
    """The operands as the library takes them, and (N, K, R)."""
    if isinstance(weight, Packed):
        N, K = weight.n, weight.k
        pointer, stride, nf4 = None, 0, weight_of(*weight[:5], weight.blocksize, N, K)
    else:
        require_matrix("weight", weight, _BF16, strided=True)
        N, K = weight.shape
        if weight.stride(1) != 1 and K > 1:
            raise ValueError(f"weight has strides {list(weight.stride())}, its columns must be next to one another")
        pointer, stride, nf4 = weight.data_ptr(), weight.stride(0), Weight(None, None, None, None, None, N, K, 0)
    if N % 2 or K % (32 if isinstance(weight, Packed) else 2):
        raise ValueError(f"a weight of [{N}, {K}]: N must be even, and K, over NF4 a multiple of 32")
    if update is None:
        return _LoraLinear(pointer, stride, nf4, None, None, 0, 1, 0.0, None), (N, K, 0)
    lora_a, lora_b, scaling, seed, p = update
    require_matrix("lora_a", lora_a, tuple(_ADAPTER_DTYPES))
    R = lora_a.shape[0]
    _require_shape("lora_a", lora_a, (R, K), (lora_a.dtype,))
    _require_shape("lora_b", lora_b, (N, R), (lora_a.dtype,))
    if not 1 <= R <= MAX_RANK:
        raise ValueError(f"lora_a has {R} rows, expected 1 to {MAX_RANK}")
    dropout = dropout_of(seed, p)
    operands = _LoraLinear(
        pointer, stride, nf4, lora_a.data_ptr(), lora_b.data_ptr(), R, _ADAPTER_DTYPES[lora_a.dtype], scaling,
        None if dropout is None else ctypes.pointer(dropout),
    )  # fmt: skip
    return operands, (N, K, R)


def _activations(name: str, x: Tensor, columns: int) -> Activations:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"{name} is {list(x.shape)} {x.dtype}, expected [M, {columns}] in torch.bfloat16")
    return activations_of(x)


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    require(name, tensor, dtypes)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
