"""The linear of a stack of experts: every row of x with the weight and the adapters of its own expert.

    y[s] = x[s] W[e]ᵀ + scaling · x[s] A[e]ᵀ B[e]ᵀ + bias[e]        e: the expert of row s

Rows are sorted by expert, so those of one expert are a stretch, and `offsets` tell where each stretch ends. Forming
W + scaling · B A first, as peft does, reads and writes the whole stack at every call, experts without a row included,
and rounds the update to the weight's dtype. Here LoRA costs what it reads of x, and a product with rank columns.

    segments   `functional.lora_linear` for each expert that has rows; their numbers come to the host
    grouped    torch's grouped_mm, thrice: x W, x A and h B. Nothing comes to the host, torch.compile sees no break

The second serves bf16 on CUDA from sm_80 on and inside torch.compile, the first everything else.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora import functional

_ALIGNED = 8  # bf16 numbers in the 16 bytes to which grouped_mm wants rows aligned


def grouped_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[s] = x[s] W[e]ᵀ + scaling · x[s] A[e]ᵀ B[e]ᵀ + bias[e], e being the expert of row s.

    Args:
        x: [S, K], bf16, fp16 or fp32, sorted by expert.
        weight: [E, N, K], dtype of x; any strides, so that a stack kept as [E, K, N] is passed transposed.
        lora_a: [E, R, K]. lora_b: [E, N, R]. fp32, or dtype of x; both None for no update.
        scaling: factor of the update.
        offsets: [E], int32: expert e has rows offsets[e - 1] to offsets[e]; the last is S.
        bias: [E, N].
    Returns:
        [S, N], dtype of x; differentiable in x, weight, lora_a, lora_b and bias.
    Raises:
        ValueError: operands that do not fit together.
    """
    _check(x, weight, lora_a, lora_b, offsets, bias)
    if _takes_grouped_mm(x, weight):
        return _grouped(x, weight, lora_a, lora_b, scaling, offsets, bias)
    return _segments(x, weight, lora_a, lora_b, scaling, offsets, bias)


def _check(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, offsets: Tensor, bias: Tensor | None
) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be [S, K] and weight [E, N, K]; got {list(x.shape)} and {list(weight.shape)}")
    experts, n, k = weight.shape
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b go together: give both or neither")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[1] if lora_a.ndim == 3 else 0
        if rank == 0 or lora_a.shape != (experts, rank, k) or lora_b.shape != (experts, n, rank):
            raise ValueError(
                f"for a weight {list(weight.shape)} lora_a must be [{experts}, R, {k}] and lora_b [{experts}, {n}, R]; "
                f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
            )
    if offsets.shape != (experts,) or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be [{experts}] in int32; got {list(offsets.shape)} in {offsets.dtype}")
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"bias must be [{experts}, {n}]; got {list(bias.shape)}")


def _takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch can multiply by groups here, and gains by it."""
    if x.dtype is not torch.bfloat16 or weight.shape[1] % _ALIGNED or weight.shape[2] % _ALIGNED:
        return False
    if not hasattr(F, "grouped_mm"):
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return torch.compiler.is_compiling()


def _grouped(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)  # [S, K] by [E, K, N] -> [S, N]
    if lora_a is not None and lora_b is not None:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        missing = -a.shape[1] % _ALIGNED
        if missing:
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        h = F.grouped_mm(x, a.transpose(1, 2), offs=offsets)  # [S, K] by [E, K, R] -> [S, R]
        y = y + F.grouped_mm(h * scaling, b.transpose(1, 2), offs=offsets)
    if bias is not None:
        y = y + bias[_experts_of_rows(x.shape[0], offsets)].to(y.dtype)
    return y


def _experts_of_rows(rows: int, offsets: Tensor) -> Tensor:
    """[S]: the expert of each row."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)


def _segments(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    ends = offsets.tolist()
    # One node each in the graph: a slice per expert would make a whole gradient per expert.
    weights, biases = weight.unbind(0), [None] * len(ends) if bias is None else bias.unbind(0)
    if lora_a is not None and lora_b is not None:
        adapters = list(zip(lora_a.unbind(0), lora_b.contiguous().unbind(0), strict=True))
    results = []
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin == end:
            continue
        rows = x[begin:end]
        if lora_a is None:
            results.append(F.linear(rows, weights[expert], biases[expert]))
        else:
            results.append(functional.lora_linear(rows, weights[expert], *adapters[expert], scaling, biases[expert]))
    if not results:
        return x @ weights[0].t()
    return results[0] if len(results) == 1 else torch.cat(results)
