"""Launch what the CUDA path launches, for a GPU that is not there: every kernel is bound, specialized and compiled.

`python tests/launches.py 90` prints a line a compiled kernel: its name, bytes of shared memory. The launchers run as
they are, on CPU tensors in bf16; only Triton's driver is a stand-in, and launching ends where the machine code is
made. So a wrong argument, option or configuration shows here and not first on a GPU. Results are not looked at.
"""

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ["FASTLORA_BACKEND"] = "triton"

import torch
import triton
from fastlora.kernels import choice, decode, fused
from fastlora.kernels import nf4 as nf4_kernel
from fastlora.kernels.choice import Choice
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastlora import dispatch, dora, mixed_path, nf4, triton_path
from fastlora.operands import Base, Lora, Needs

ALL = Needs(True, True, True)


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(arch: int) -> None:
    """Make this process take the CPU for a GPU of an architecture, and launches end with the machine code."""
    capability = divmod(arch, 10)
    triton.runtime.driver.set_active(Driver(arch))
    run = JITFunction.run
    seen = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            print(self.fn.__name__, kernel.metadata.shared, flush=True)
        return kernel

    JITFunction.run = compile_only
    dispatch._no_triton = lambda *_: ""
    choice.gpu_of = lambda device: ("unknown", capability)
    fused._device = lambda index: (capability, 132)
    nf4_kernel.lookup = decode.lookup = lambda *_: "shfl"


def step(
    m: int, kernel: str, adapter: torch.dtype, p: float = 0.0, bias: bool = True, k: int = 512, n: int = 768
) -> None:
    """Forward and backward at m tokens, by a kernel both ways where it can do both."""
    weight = nf4.quantize(torch.randn(n, k))
    base = Base(*weight.tensors(), n, k, weight.blocksize)
    seed = torch.tensor([7]) if p else None
    r = 40 if m > 64 else 16
    lora = Lora(torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter), 2.0, p, seed)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    _, h = triton_path.forward_by(Choice(kernel), x, base, lora, dy[0] if bias else None, True)
    backward = "fused" if kernel == "decode" else kernel
    triton_path.backward_by(Choice(backward), dy, x, h, base, lora, ALL)


def mixed(adapter: torch.dtype, p: float, k: int = 512, n: int = 768) -> None:
    """Forward and backward of a batch whose samples have different adapters, with biases."""
    rows = mixed_path.rows_of((0, 1, -1, 0), 40, ((2.0, p), (1.0, 0.0)), torch.device("cpu"), False)
    base = Base(torch.randn(n, k).bfloat16(), None, None, None, None, n, k, 0)
    a, b = torch.randn(2, 16, k).to(adapter).requires_grad_(), torch.randn(2, n, 16).to(adapter).requires_grad_()
    x = torch.randn(160, k).bfloat16().requires_grad_()
    mixed_path.linear(x, base, a, b, torch.randn(3, n), True, rows).sum().backward()


def decomposed(adapter: torch.dtype, base: str, k: int = 512, n: int = 768, m: int = 300) -> None:
    """DoRA forward and backward, twice, so that the norms of the first call are kept."""
    dense, kept = torch.randn(n, k), dora.KeptNorms()
    weight = nf4.quantize(dense) if base == "nf4" else dense.bfloat16()
    a, b = torch.randn(16, k).to(adapter).requires_grad_(), torch.randn(n, 16).to(adapter).requires_grad_()
    x, magnitude = torch.randn(m, k).bfloat16().requires_grad_(), torch.ones(n, requires_grad=True)
    bias = torch.zeros(n).bfloat16().requires_grad_()
    for _ in range(2):
        norms = kept.of(weight, a, b, 2.0)
        dora.dora_linear(x, weight, a, b, 2.0, magnitude, norms, bias).sum().backward()


def main(arch: int) -> None:
    """All of it for one architecture."""
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
    mixed(torch.float32, 0.1)
    mixed(torch.bfloat16, 0.0)
    for base, adapter in (
        ("nf4", torch.float32),
        ("nf4", torch.bfloat16),
        ("dense", torch.float32),
        ("dense", torch.bfloat16),
    ):
        decomposed(adapter, base)


if __name__ == "__main__":
    main(int(sys.argv[1]))
