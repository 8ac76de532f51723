"""The linear by one C++ call forward and one backward: bf16 on a CPU with AVX512_BF16, for any number of tokens.

See `native.linear` for the arithmetic. h is computed in fp32 on the way, and kept where dB is wanted.
"""

import torch
from torch import Tensor

from fastlora.kernels.operands import Lora
from fastlora.native import linear
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import Gradients, Needs


def takes(x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None) -> bool:
    """Whether this path computes the linear on a CPU with the C++ library, forward as well as backward.

    x: [..., K], not empty.
    """
    if x.dtype is not torch.bfloat16:
        return False
    packed = isinstance(weight, NF4Weight)
    if not isinstance(weight, NF4Weight) and weight.stride(1) != 1:
        return False
    (n, k), r = weight.shape, 0 if lora is None else lora.a.shape[0]
    return linear.supports(x.numel() // k, n, k, r, packed)


def forward(
    x: Tensor, weight: Tensor | NF4Weight, lora: Lora | None, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and h = dropout(x) Aᵀ [M, R] in fp32 where `save_h`. x: [M, K]."""
    if lora is not None:
        lora = _as_read(lora)
    if bias is not None:
        bias = bias.float().contiguous()
    return linear.linear(x if x.stride(1) == 1 else x.contiguous(), weight, lora, bias, save_h)


def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor | NF4Weight, lora: Lora | None, needs: Needs
) -> Gradients:
    """Gradients of everything except a dense weight and the bias. dy: [M, N]; x is needed for dA, h for dB."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    if lora is None:
        dx, *_ = linear.linear_backward(dy, None, None, weight, None, needs.x)
        return Gradients(dx, None, None)
    read = _as_read(lora)
    x = x if x is None or x.stride(1) == 1 else x.contiguous()
    dx, da, db = linear.linear_backward(dy, x, h, weight, read, *needs)
    if read is not lora:
        da = None if da is None else da.to(lora.a.dtype)
        db = None if db is None else db.to(lora.b.dtype)
    return Gradients(dx, da, db)


def _as_read(lora: Lora) -> Lora:
    """A and B as the library reads them: in one dtype and contiguous."""
    a, b = lora.a, lora.b
    if a.dtype is not b.dtype:
        a, b = a.float(), b.float()
    if a is lora.a and b is lora.b and a.is_contiguous() and b.is_contiguous():
        return lora
    return lora._replace(a=a.contiguous(), b=b.contiguous())
