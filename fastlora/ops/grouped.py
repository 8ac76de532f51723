"""The linear of a stack of experts: every row of x with the weight and the adapters of its own expert.

    y[s] = x[s] W[e]ᵀ + scaling · x[s] A[e]ᵀ B[e]ᵀ + bias[e]        e: the expert of row s

Rows are sorted by expert, so those of one expert are a stretch, and `offsets` says where each stretch ends. Forming
W + scaling · B A first, as peft does, reads and writes the whole stack at every call, including experts without a row,
and rounds the update to the weight's dtype. Here LoRA costs one read of x, and a product with rank columns.

    grouped_cuda   products of our own over the whole stack, LoRA inside
    grouped        here: torch's grouped_mm three times, for x W, x A and h B
    grouped_loop   `ops.linear.lora_linear` for each expert that has rows; the numbers of rows are read on the host

The first two need nothing from the host, so torch.compile sees no break. The first serves 16-bit rows wherever the
Triton kernels run. The second serves what the first does not take (mainly a dense stack that is trained) in bf16 on
CUDA, and bf16 inside torch.compile. The third serves everything else. On sm_80, 86, 89 and 120 torch's grouped_mm
itself goes expert by expert, and waits for the numbers of rows.

An NF4 stack is expanded for grouped_mm in one launch, forward and again backward, and never kept. Up to FEW_ROWS rows
it is read packed instead, expert by expert. (This follows from counting launches and bytes, not from a measurement: 3
to 7 launches an expert, 2.5 bytes a weight.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.ops import grouped_cuda, grouped_loop
from fastlora.ops.autograd import refuse_second_derivative
from fastlora.ops.nf4 import NF4Weight

FEW_ROWS = 16
_ALIGNED = 8  # bf16 numbers in 16 bytes, the alignment of rows that grouped_mm needs


def grouped_lora_linear(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    offsets: Tensor, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[s] = x[s] W[e]ᵀ + scaling · x[s] A[e]ᵀ B[e]ᵀ + bias[e], e being the expert of row s.

    Args:
        x: [S, K], bf16, fp16 or fp32, sorted by expert.
        weight: [E, N, K], dtype of x, any strides, so a stack kept as [E, K, N] can be passed transposed. Or an
            `NF4Weight` [E N, K], expert by expert.
        lora_a: [E, R, K]. lora_b: [E, N, R]. fp32, or dtype of x; both None for no update.
        scaling: factor of the update.
        offsets: [E], int32: expert e has rows offsets[e - 1] to offsets[e]; the last is S. (Rows beyond it have no
            expert and give zero, except on the path through grouped_mm.)
        bias: [E, N].
    Returns:
        [S, N], dtype of x; differentiable in x, weight, lora_a, lora_b and bias.
    Raises:
        ValueError: the operands do not fit together.
    """
    _check_grouped(x, weight, lora_a, lora_b, offsets, bias)
    if not grouped_cuda.refusal(x, weight, offsets.numel(), lora_a, lora_b):
        return grouped_cuda.grouped_linear(x, weight, lora_a, lora_b, scaling, offsets, bias)
    if _takes_grouped_mm(x, weight, offsets.numel()) and (isinstance(weight, Tensor) or x.shape[0] > FEW_ROWS):
        return _by_grouped_mm(x, weight, lora_a, lora_b, scaling, offsets, bias)
    return grouped_loop.one_by_one(x, weight, lora_a, lora_b, scaling, offsets, bias)


def _check_grouped(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
) -> None:
    experts = offsets.numel()
    if offsets.ndim != 1 or offsets.dtype != torch.int32 or not experts:
        raise ValueError(f"offsets must be [E] in int32; got {list(offsets.shape)} in {offsets.dtype}")
    packed = isinstance(weight, NF4Weight)
    n, k = weight.shape[-2] // (experts if packed else 1), weight.shape[-1]
    if x.ndim != 2 or x.shape[1] != k or tuple(weight.shape) != ((experts * n, k) if packed else (experts, n, k)):
        wanted = f"an NF4 weight [{experts} N, K]" if packed else f"weight [{experts}, N, K]"
        raise ValueError(f"x must be [S, K] and {wanted}; got {list(x.shape)} and {list(weight.shape)}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b go together: give both or neither")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[1] if lora_a.ndim == 3 else 0
        if rank == 0 or lora_a.shape != (experts, rank, k) or lora_b.shape != (experts, n, rank):
            raise ValueError(
                f"for a stack {[experts, n, k]} lora_a must be [{experts}, R, {k}] and lora_b [{experts}, {n}, R]; "
                f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
            )
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"bias must be [{experts}, {n}]; got {list(bias.shape)}")


def _takes_grouped_mm(x: Tensor, weight: Tensor | NF4Weight, experts: int) -> bool:
    """Whether torch's grouped_mm can compute these products, and is worth it."""
    n = weight.shape[-2] // (experts if isinstance(weight, NF4Weight) else 1)
    return _fits_grouped_mm(x.device, x.dtype, n, weight.shape[-1])


def _fits_grouped_mm(device: torch.device, dtype: torch.dtype, n: int, k: int) -> bool:
    if dtype is not torch.bfloat16 or n % _ALIGNED or k % _ALIGNED or not hasattr(F, "grouped_mm"):
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.compiler.is_compiling()


def computed_by(
    device: torch.device, dtype: torch.dtype, experts: int, n: int, k: int, blocksize: int, rank: int
) -> tuple[str, str]:
    """The path that computes the grouped linear of a frozen stack of experts [N, K], and how it does, in words.

    Args:
        dtype: of the rows. blocksize: of an NF4 stack, 0 for a dense one. rank: of the adapters, 0 for none.
    """
    if not grouped_cuda.reason(device, dtype, dtype, experts, blocksize, rank):
        return "grouped_cuda", grouped_cuda.words(device, n, k, blocksize, rank)
    if _fits_grouped_mm(device, dtype, n, k):
        return "grouped", "grouped_mm (torch)"
    return "grouped_loop", "expert by expert"


class _PackedProduct(torch.autograd.Function):
    """x [S, K] by an NF4 stack [E N, K] -> [S, N]; the stack is expanded only for the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, offsets: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(offsets)
        w = _expanded(weight, offsets, x.dtype).transpose(1, 2)  # [E, K, N]
        return F.grouped_mm(x, w, offs=offsets)  # [S, N]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        (offsets,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        w = _expanded(ctx.weight, offsets, dy.dtype)  # [E, N, K]
        return F.grouped_mm(dy.contiguous(), w, offs=offsets), None, None  # [S, K]


def _expanded(weight: NF4Weight, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype).view(offsets.numel(), -1, weight.shape[1])  # [E, N, K]


def _by_grouped_mm(
    x: Tensor, weight: Tensor | NF4Weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float,
    offsets: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if isinstance(weight, NF4Weight):
        y: Tensor = _PackedProduct.apply(x, weight, offsets)
    else:
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)  # [S, K] by [E, K, N] -> [S, N]
    if lora_a is not None and lora_b is not None:
        a, b = lora_a.to(x.dtype).contiguous(), lora_b.to(x.dtype).contiguous()  # as grouped_mm needs them
        missing = -a.shape[1] % _ALIGNED
        if missing:
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        h = F.grouped_mm(x, a.transpose(1, 2), offs=offsets)  # [S, K] by [E, K, R] -> [S, R]
        y = y + F.grouped_mm(h * scaling, b.transpose(1, 2), offs=offsets)  # [S, R] by [E, R, N] -> [S, N]
    if bias is not None:
        y = y + bias[_experts_of_rows(x.shape[0], offsets)].to(y.dtype)
    return y


def _experts_of_rows(rows: int, offsets: Tensor) -> Tensor:
    """[S]: the expert of each row."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)
