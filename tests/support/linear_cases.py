"""Operands of one linear layer that several test files use, held against the reference by the tolerance rule."""

import torch
from torch import Tensor

from fastlora import reference
from fastlora.ops import nf4
from fastlora.ops.linear import lora_linear
from fastlora.ops.nf4 import NF4Weight
from tests.support.numerics import assert_as_accurate

SCALING = 2.0


class Case:
    """Random operands of one linear layer, with the oracle and the baseline of the tolerance rule."""

    def __init__(self, m, k, n, r, dtype, adapter_dtype=None, base="dense", bias=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(dtype)

        adapter_dtype = adapter_dtype or dtype
        self.x, self.dy = draw(m, k), draw(m, n)
        self.lora_a = draw(r, k, std=k**-0.5, dtype=adapter_dtype)
        self.lora_b = draw(n, r, std=r**-0.5, dtype=adapter_dtype)
        self.bias = draw(n) if bias else None
        dense = draw(n, k, std=k**-0.5)
        self.weight: Tensor | NF4Weight = dense if base == "dense" else nf4.quantize(dense)
        self.exact_weight = dense if base == "dense" else self.weight.dequantize(torch.float32)

    def leaves(self, dtype=None, requires_grad=True):
        """x, A, B and bias as fresh leaves, in another dtype if one is given."""
        tensors = [self.x, self.lora_a, self.lora_b] + ([self.bias] if self.bias is not None else [])
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_(requires_grad) for t in tensors]

    def reference(self, dtype=None, mask=None):
        """y and the gradients of x, A, B (and bias) by the reference, in `dtype` (default: each tensor's own)."""
        leaves = self.leaves(dtype)
        weight = self.exact_weight.to(dtype or self.x.dtype)
        bias = leaves[3] if self.bias is not None else None
        y = reference.lora_linear(leaves[0], weight, leaves[1], leaves[2], SCALING, bias, mask)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))]

    def ours(self, **options):
        """The same by the operator under test."""
        leaves = self.leaves()
        bias = leaves[3] if self.bias is not None else None
        y = lora_linear(leaves[0], self.weight, leaves[1], leaves[2], SCALING, bias, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def check(self, ours=None, mask=None, **options):
        """Check y and every gradient by the tolerance rule."""
        ours = ours if ours is not None else self.ours(**options)
        results = zip(("y", "dx", "dA", "dB", "dbias"), ours, self.reference(mask=mask), strict=False)
        for (what, got, baseline), oracle in zip(results, self.reference(torch.float64, mask), strict=True):
            assert_as_accurate(got, baseline, oracle, what)


def operator_arguments(base: str, dropout: bool, m: int = 6):
    """Arguments of `fastlora::lora_linear` for torch's own checks of an operator."""
    case = Case(m, 64, 48, 4, torch.float32, base=base, bias=True)
    x, a, b, bias = case.leaves()
    parts = case.weight.tensors() if base == "nf4" else (case.weight, None, None, None, None)
    seed = torch.tensor([5]) if dropout else None
    return (x, bias, *parts, 48, 64 if base == "nf4" else 0, a, b, seed, SCALING, 0.25 if dropout else 0.0, True)
