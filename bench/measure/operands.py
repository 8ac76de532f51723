"""The tensors that a comparison works on: one weight, its NF4 codes, and adapters, the same for every provider.

Adapters hold bf16 numbers in fp32, so that fp32 and bf16 adapters are the same function and one oracle judges both. On
a CUDA device everything is drawn there, because an 8192 x 28672 weight takes seconds on a CPU.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora.ops.nf4 import NF4Weight, quantize

LINEAR_KERNELS = ("nf4_linear", "bf16_linear")
DEQUANTIZE = "nf4_dequantize"
KERNELS = ("nf4_linear", DEQUANTIZE, "bf16_linear")
MODES = ("forward", "backward", "both", "decode")
DECODE_MAX_M = 16
SCALING = 2.0


@dataclass(frozen=True)
class Problem:
    """One LoRA linear [N, K] with rank R, or the expansion of its weight; `kernel` names base and operation.

    With `nf4_dequantize`, R = 0 is the bare weight, R > 0 the weight with scaling · B A merged in.
    """

    kernel: str
    K: int
    N: int
    R: int
    device: torch.device
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_nf4(self) -> bool:
        """Whether the base weight is packed."""
        return self.kernel != "bf16_linear"

    def __str__(self) -> str:
        return f"{self.kernel} {self.K}x{self.N} r={self.R} p={self.dropout:g}"


@dataclass(frozen=True)
class Operands:
    """The tensors every provider is built on.

    Args:
        dense: copies of the weight [N, K] in bf16; of an NF4 base, its dequantized values.
        packed: copies of the NF4 base; empty for a bf16 base.
        lora_a: [R, K], fp32 holding bf16 numbers. lora_b: [N, R], the same.
    """

    problem: Problem
    dense: list[Tensor]
    packed: list[NF4Weight]
    lora_a: Tensor
    lora_b: Tensor

    @property
    def weights(self) -> Sequence[Tensor | NF4Weight]:
        """Copies of the base weight as it is stored."""
        return self.packed or self.dense

    @property
    def exact_weight(self) -> Tensor:
        """[N, K], fp64: what the base weight stands for, before any rounding to bf16; by plain torch."""
        return (_expanded(self.packed[0]) if self.packed else self.dense[0]).double()

    def with_dropout(self, p: float) -> "Operands":
        """The same tensors for a problem with another dropout."""
        return replace(self, problem=replace(self.problem, dropout=p))

    def first_copy(self) -> "Operands":
        """The same without the further copies of the weight."""
        return replace(self, dense=self.dense[:1], packed=self.packed[:1])


def make_operands(problem: Problem, dense_copies: int = 1, packed_copies: int = 1) -> Operands:
    """Draw the tensors: W and A from N(0, 1/K), B from N(0, 1/R), so that the update is as large as the base."""
    p = problem
    generator = _generator(p.device, p.K * 31 + p.N)

    def normal(rows: int, cols: int, variance: float) -> Tensor:
        values = torch.randn(rows, cols, generator=generator, device=generator.device) * variance**0.5
        return values.to(p.dtype).to(p.device)

    weight = normal(p.N, p.K, 1 / p.K)
    lora_a, lora_b = normal(p.R, p.K, 1 / p.K).float(), normal(p.N, p.R, 1 / max(p.R, 1)).float()
    packed: list[NF4Weight] = []
    if p.is_nf4:
        first = _quantized(weight)
        packed = [clone(first) for _ in range(packed_copies)]
        weight = _expanded(first).to(p.dtype)
    dense = [weight.clone() for _ in range(dense_copies)]
    return Operands(p, dense, packed, lora_a, lora_b)


def draw_inputs(problem: Problem, m: int, grad: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [M, K] and dy [M, N] from N(0, 1), in the problem's dtype; the same for the same seed and device."""
    generator = _generator(problem.device, seed)
    x, dy = (
        torch.randn(m, n, generator=generator, device=generator.device).to(problem.dtype)
        for n in (problem.K, problem.N)
    )
    return x.to(problem.device).requires_grad_(grad), dy.to(problem.device)


def _expanded(weight: NF4Weight) -> Tensor:
    """[N, K], fp32, without any kernel that is under test."""
    scales = reference.nf4_scales(weight.absmax, weight.absmax2, weight.code2, weight.offset)
    return reference.nf4_dequantize(weight.codes, scales, weight.shape, weight.blocksize)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def _quantized(weight: Tensor) -> NF4Weight:
    """NF4 with nested scales; by bitsandbytes where it works, so that all read the codes that it makes."""
    if missing("bitsandbytes") is None:
        try:
            return quantize_by_bitsandbytes(weight)
        except Exception as error:  # such as a build without this machine's CUDA: one peer fewer
            print(f"bitsandbytes cannot quantize here ({error_line(error)}): fastlora quantizes", file=sys.stderr)
    return quantize(weight)


def quantize_by_bitsandbytes(weight: Tensor) -> NF4Weight:
    """NF4 with nested scales, by bitsandbytes."""
    from bitsandbytes.nn import Params4bit

    parameter: Any = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return NF4Weight.from_bnb(parameter.to(weight.device))


def clone(weight: NF4Weight) -> NF4Weight:
    """The same weight in memory of its own."""
    parts = ("codes", "absmax", "absmax2", "code2", "offset")
    return replace(weight, **{name: part.clone() for name in parts if (part := getattr(weight, name)) is not None})


def missing(package: str) -> str | None:
    """None where the package can be imported, else a line that says it is not installed."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def error_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
