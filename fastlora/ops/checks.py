"""What the operands of a linear must be, checked once on the way from a layer to a kernel, and autocast's dtypes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.kernels.operands import FLOAT_DTYPES
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import in_dtype


def as_autocast(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None
) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None]:
    """x and a dense weight in autocast's dtype; an fp32 bias stays fp32, so that its gradient is not rounded."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    return x.to(dtype), in_dtype(weight, dtype), bias


def check_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
    """Raise ValueError where x [..., K], a weight [N, K] and a bias [N] do not fit together."""
    dtype, shape = x.dtype, weight.shape
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be bf16, fp16 or fp32; got {dtype}")
    if len(shape) != 2:
        raise ValueError(f"weight must be [N, K]; got {list(shape)}")
    n, k = shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x is {list(x.shape)} and the weight [N, K] = {[n, k]}: the last dimension of x must be {k}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}: move one of them")
    if weight.dtype is not dtype and isinstance(weight, Tensor):
        raise ValueError(f"x is {dtype} and the weight {weight.dtype}: cast one of them, or run under autocast")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in (dtype, torch.float32)):
        raise ValueError(f"bias must be [{n}] in {dtype} or fp32; got {list(bias.shape)} in {bias.dtype}")


def check_adapters(x: Tensor, shape: Sequence[int], lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise ValueError where A [R, K] and B [N, R] do not fit x and a weight of this shape."""
    check_adapter_shapes(shape, lora_a, lora_b)
    dtype, device = x.dtype, x.device
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype is not torch.float32 and adapter.dtype is not dtype:
            raise ValueError(f"{name} must be fp32 or {dtype} like x; got {adapter.dtype}")
        if adapter.device != device:
            raise ValueError(f"x is on {device} and {name} on {adapter.device}: move one of them")


def check_adapter_shapes(shape: Sequence[int], lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise ValueError where A and B do not fit a weight of shape (N, K)."""
    n, k = shape
    r = lora_a.shape[0] if lora_a.ndim == 2 else 0
    if r and lora_a.shape[1] == k and lora_b.shape == (n, r):
        return
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] == 0:
        raise ValueError(
            f"lora_a must be [R, K] and lora_b [N, R] with the same R >= 1; "
            f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
        )
    if lora_a.shape[1] != k or lora_b.shape[0] != n:
        raise ValueError(
            f"the weight is [N, K] = {[n, k]}; lora_a {list(lora_a.shape)} must end in {k}, "
            f"lora_b {list(lora_b.shape)} must begin with {n}"
        )
