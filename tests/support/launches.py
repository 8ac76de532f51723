"""Launch what the CUDA path launches, for a GPU that is not there: every kernel is bound, specialized and compiled.

`python -m tests.support.launches 90` prints a line a compiled kernel: its name, bytes of shared memory, bytes of local
memory a thread, the registers spilled; with `experts` after it, what stacks of experts launch. The launchers run as
they are, on CPU tensors in bf16. Only Triton's driver is a stand-in (`bench.measure.pretend`); TRITON_INTERPRET is 0.
So a wrong argument, option or configuration shows here and not first on a GPU. Results are not looked at.
"""

import re
import sys
from typing import Any

import torch
from fastlora.kernels.choice import Choice
from fastlora.kernels.operands import Lora
from triton.runtime.jit import JITFunction

from bench.machine_code.sass import dump
from bench.measure.pretend import pretend as pretend_to_launch
from fastlora.ops import dora, grouped, linear_cuda, mixed_cuda, nf4
from fastlora.ops.operands import Needs
from fastlora.peft_layers.kept_norms import KeptNorms

ALL = Needs(True, True, True)


def pretend(arch: int) -> None:
    """Make this process take the CPU for a GPU of an architecture, and print what is compiled."""
    pretend_to_launch(arch)
    run = JITFunction.run
    seen = set()

    def printing(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            usage = dump(kernel.asm["cubin"], "-res-usage")
            local = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
            print(self.fn.__name__, kernel.metadata.shared, local, flush=True)
        return kernel

    JITFunction.run = printing


def step(
    m: int, kernel: str, adapter: torch.dtype, p: float = 0.0, bias: bool = True, k: int = 512, n: int = 768,
    gap: int = 0,
) -> None:  # fmt: skip
    """Forward and backward at m tokens, by a kernel both ways where it can do both. gap: numbers between rows."""
    weight = nf4.quantize(torch.randn(n, k))
    seed = torch.tensor([7]) if p else None
    r = 40 if m > 64 else 16
    lora = Lora(torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter), 2.0, p, seed)
    x, dy = torch.randn(m, k + gap).bfloat16()[:, :k], torch.randn(m, n + gap).bfloat16()[:, :n]
    _, h = linear_cuda.forward_by(Choice(kernel), x, weight, lora, dy[0] if bias else None, True)
    backward = "fused" if kernel == "decode" else kernel
    linear_cuda.backward_by(Choice(backward), dy, x, h, weight, lora, ALL)


def stack(rows: int, kind: str, adapter: torch.dtype, n: int = 256, k: int = 512) -> None:
    """Forward and backward through a stack of eight experts, with this many rows each."""
    weight: Any = torch.randn(8, n, k).bfloat16()
    if kind == "nf4":
        weight = nf4.quantize(weight.view(-1, k))
    elif kind == "transposed":
        weight = weight.mT.contiguous().mT
    a, b = torch.randn(8, 16, k).to(adapter), torch.randn(n, 16, 8).to(adapter).permute(2, 0, 1)
    x, bias = torch.randn(8 * rows, k).bfloat16(), torch.randn(8, n).bfloat16()
    leaves = [leaf.requires_grad_() for leaf in (x, a, b, bias)]
    offsets = rows * torch.arange(1, 9, dtype=torch.int32)
    y = grouped.grouped_lora_linear(x, weight, a, b, 2.0, offsets, bias)
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def experts(arch: int) -> None:
    """What stacks of experts launch: from few rows to so many that NF4 is expanded."""
    pretend(arch)
    for rows in (2, 20, 50, 100, 600):
        for kind in ("dense", "transposed", "nf4"):
            stack(rows, kind, torch.float32)
            if rows in (2, 100):
                stack(rows, kind, torch.bfloat16)
    for kind in ("dense", "transposed", "nf4"):
        stack(50, kind, torch.float32, n=320, k=192)
        stack(50, kind, torch.float32, n=130, k=192)


def mixed(adapter: torch.dtype, p: float, k: int = 512, n: int = 768) -> None:
    """Forward and backward of a batch whose samples have different adapters, with biases."""
    rows = mixed_cuda.rows_of((0, 1, -1, 0), 40, ((2.0, p), (1.0, 0.0)), torch.device("cpu"))
    weight = torch.randn(n, k).bfloat16()
    a, b = torch.randn(2, 16, k).to(adapter).requires_grad_(), torch.randn(2, n, 16).to(adapter).requires_grad_()
    x = torch.randn(160, k).bfloat16().requires_grad_()
    bias = torch.randn(3, n).requires_grad_()
    y = mixed_cuda.linear(x, weight, a, b, bias, rows, torch.bfloat16, torch.bfloat16)
    y.backward(torch.ones_like(y))


def decomposed(adapter: torch.dtype, base: str, k: int = 512, n: int = 768, m: int = 300) -> None:
    """DoRA forward and backward, twice, so that the norms of the first call are kept."""
    dense, kept = torch.randn(n, k), KeptNorms()
    weight = nf4.quantize(dense) if base == "nf4" else dense.bfloat16()
    a, b = torch.randn(16, k).to(adapter).requires_grad_(), torch.randn(n, 16).to(adapter).requires_grad_()
    x, magnitude = torch.randn(m, k).bfloat16().requires_grad_(), torch.ones(n, requires_grad=True)
    bias = torch.zeros(n).bfloat16().requires_grad_()
    for _ in range(2):
        norms = kept.of(weight, a, b, 2.0)
        y = dora.dora_linear(x, weight, a, b, 2.0, magnitude, norms, bias)
        y.backward(torch.ones_like(y))


def main(arch: int) -> None:
    """All the others for one architecture."""
    pretend(arch)
    for m in (1, 16):
        step(m, "decode", torch.float32)
        step(m, "decode", torch.bfloat16)
    for kernel in ("fused", "dequantize"):
        step(24, kernel, torch.float32)
        step(300, kernel, torch.bfloat16, bias=False)
        step(64, kernel, torch.float32, p=0.1)
    step(24, "fused", torch.float32, k=192, n=130)
    step(24, "dequantize", torch.float32, k=130, n=70)
    for m, adapter in ((24, torch.bfloat16), (200, torch.float32)):
        step(m, "fused", adapter, k=192, n=131)
        step(m, "dequantize", adapter, k=131, n=77)
        step(m, "dequantize", adapter, p=0.1, gap=1)
    step(16, "decode", torch.float32, k=192, n=131)
    mixed(torch.float32, 0.1)
    mixed(torch.bfloat16, 0.0)
    mixed(torch.float32, 0.1, k=131, n=77)
    for base, adapter in (
        ("nf4", torch.float32),
        ("nf4", torch.bfloat16),
        ("dense", torch.float32),
        ("dense", torch.bfloat16),
    ):
        decomposed(adapter, base)
        decomposed(adapter, base, k=131, n=77)


if __name__ == "__main__":
    (experts if sys.argv[2:] == ["experts"] else main)(int(sys.argv[1]))
