"""One small linear of each kind, forward and backward, against fp64: `python -m bench.gpu.each_kind`.

Few tokens and many, NF4 and dense, adapters in fp32 and in 16 bits, dropout, DoRA, a mixed batch, experts. Small, so
that a memory checker goes through it in a minute. Without a CUDA device, Triton's interpreter runs it.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora.ops import dora, grouped, mixed, nf4
from fastlora.ops.linear import lora_linear
from fastlora.ops.operands import Lora

N, K, R, SCALING = 192, 256, 16, 2.0
MANY = 576  # above this the weight is expanded and cuBLAS multiplies


def run() -> int:
    """Print a line for each kind; the number of those that are off."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter multiplies bf16 wrongly
    wrong = 0
    for name, ours, exact in kinds(device, dtype):
        off = ((ours().double() - exact()).norm() / exact().norm()).item()
        good = off < 0.01
        wrong += not good
        print(f"{'ok   ' if good else 'WRONG'} {name}: {off:.2e}", flush=True)
    return wrong


def kinds(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(name, what fastlora computes, the same in fp64): the output and all gradients, flat."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std

    packed = nf4.quantize(draw(N, K, std=K**-0.5).to(dtype))
    exact = packed.dequantize(torch.float32)
    for m in (1, 16, 40, MANY):
        x, dy = draw(m, K).to(dtype), draw(m, N).to(dtype)
        for base, weight in (("nf4", packed), ("dense", exact.to(dtype))):
            values = exact if base == "nf4" else exact.to(dtype)
            for adapter in (torch.float32, dtype):
                a, b = draw(R, K, std=K**-0.5).to(adapter), draw(N, R, std=R**-0.5).to(adapter)
                yield (
                    f"{base}, {m} tokens, adapters {str(adapter)[6:]}",
                    partial(_flat, lora_linear, (x, a, b), dy, weight),
                    partial(_flat, reference.lora_linear, (x, a, b), dy, values, wide=True),
                )
    x, dy = draw(48, K).to(dtype), draw(48, N).to(dtype)
    a, b = draw(R, K, std=K**-0.5), draw(N, R, std=R**-0.5)
    magnitude = draw(N).abs() + 1
    norms = dora.row_norms(packed, a, b, SCALING)
    plain = (magnitude / norms).double()[:, None] * (exact.double() + SCALING * b.double() @ a.double())
    yield (
        "DoRA over nf4",
        lambda: dora.dora_linear(x, packed, a, b, SCALING, magnitude, norms).detach(),
        lambda: x.double() @ plain.t(),
    )
    adapters = {"one": Lora(a, b, SCALING)}
    names = ["one", "none", "one"]
    of_one = exact.double() + SCALING * b.double() @ a.double()
    yield (
        "a mixed batch over nf4",
        lambda: mixed.mixed_linear(x.view(3, 16, K), packed, None, adapters, names).detach(),
        lambda: torch.stack([
            part.double() @ (of_one if name == "one" else exact.double()).t()
            for part, name in zip(x.view(3, 16, K), names, strict=True)
        ]),
    )  # fmt: skip
    stack, pairs = draw(2, N, K, std=K**-0.5).to(dtype), (draw(2, R, K, std=K**-0.5), draw(2, N, R, std=R**-0.5))
    offsets = torch.tensor([20, 48], device=device, dtype=torch.int32)
    yield (
        "experts, dense",
        lambda: grouped.grouped_lora_linear(x, stack, *pairs, SCALING, offsets).detach(),
        lambda: torch.cat([
            rows.double() @ (w.double() + SCALING * lora_b.double() @ lora_a.double()).t()
            for rows, w, lora_a, lora_b in zip(x.split([20, 28]), stack, *pairs, strict=True)
        ]),
    )  # fmt: skip


def _flat(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor, weight: Any, wide: bool = False
) -> Tensor:
    if wide:
        leaves, dy, weight = tuple(t.double() for t in leaves), dy.double(), weight.double()
    x, a, b = (t.detach().clone().requires_grad_() for t in leaves)
    y = function(x, weight, a, b, SCALING)
    gradients = torch.autograd.grad(y, (x, a, b), dy.to(y.dtype))
    return torch.cat([t.detach().double().flatten() / t.double().norm() for t in (y, *gradients)])


if __name__ == "__main__":
    sys.exit(1 if run() else 0)
