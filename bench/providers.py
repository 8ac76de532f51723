"""Who is compared: one LoRA linear, y = x Wᵀ + scaling · (x Aᵀ) Bᵀ, by each of several packages.

    torch           the bare bf16 product, x Wᵀ and dy W, no LoRA at all: the floor
    peft-fp32       peft with fp32 adapters (its default), base nn.Linear or bitsandbytes' Linear4bit, in train mode
    peft-bf16       the same with bf16 adapters
    peft-eval       peft as it serves: eval mode, no gradients, bf16 adapters. On a CPU with AVX512_BF16 bitsandbytes
                    then repacks the weight into another, lossier format: a different kernel from the one that trains
    fastlora-fp32   ours, fp32 adapters
    fastlora-bf16   ours, bf16 adapters

All work on the same tensors: one weight (the 4-bit codes are shared, not quantized anew), and adapters whose values are
bf16 numbers, so that fp32 and bf16 adapters are the same function and one oracle judges both.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.nf4 import NF4Weight, quantize

KERNELS = ("bf16_linear", "nf4_linear")
MODES = ("forward", "both")
SCALING = 2.0


@dataclass(frozen=True)
class Problem:
    """One LoRA linear [N, K] with rank R; `kernel` names its base."""

    kernel: str
    K: int
    N: int
    R: int
    device: torch.device
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16


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
        """[N, K], fp64: what the base weight stands for, before any rounding to bf16."""
        return (self.packed[0].dequantize(torch.float32) if self.packed else self.dense[0]).double()


def make_operands(problem: Problem, dense_copies: int = 1, packed_copies: int = 1) -> Operands:
    """Draw the tensors: W and A from N(0, 1/K), B from N(0, 1/R), so that the update is as large as the base."""
    p = problem
    generator = torch.Generator().manual_seed(p.K * 31 + p.N)

    def normal(rows: int, cols: int, variance: float) -> Tensor:
        values = torch.randn(rows, cols, generator=generator) * variance**0.5
        return values.to(p.dtype).to(p.device)

    weight = normal(p.N, p.K, 1 / p.K)
    lora_a, lora_b = normal(p.R, p.K, 1 / p.K).float(), normal(p.N, p.R, 1 / p.R).float()
    packed: list[NF4Weight] = []
    if p.kernel == "nf4_linear":
        first = quantize_by_bitsandbytes(weight) if missing("bitsandbytes") is None else quantize(weight)
        packed = [_clone(first) for _ in range(packed_copies)]
        weight = first.dequantize(p.dtype)
    dense = [weight.clone() for _ in range(dense_copies)]
    return Operands(p, dense, packed, lora_a, lora_b)


def draw_inputs(problem: Problem, m: int, grad: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [M, K] and dy [M, N] from N(0, 1), in the problem's dtype; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(m, n, generator=generator).to(problem.dtype) for n in (problem.K, problem.N))
    return x.to(problem.device).requires_grad_(grad), dy.to(problem.device)


def quantize_by_bitsandbytes(weight: Tensor) -> NF4Weight:
    """NF4 with nested scales, by bitsandbytes: its rivals are to work on its own codes."""
    from bitsandbytes.nn import Params4bit

    parameter: Any = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return NF4Weight.from_bnb(parameter.to(weight.device))


def _clone(weight: NF4Weight) -> NF4Weight:
    parts = ("codes", "absmax", "absmax2", "code2", "offset")
    return replace(weight, **{name: part.clone() for name in parts if (part := getattr(weight, name)) is not None})


class LoraLayer:
    """A provider's layer: `call` maps x [M, K] to y [M, N]; gradients go to x and to the adapters."""

    grad = True

    def __init__(self, call: Callable[[Tensor], Tensor], lora_a: Tensor, lora_b: Tensor) -> None:
        self.call, self.lora_a, self.lora_b = call, lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:
        """y [M, N]; what backward needs is recorded."""
        return self.call(x)

    def both(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """(y [M, N], dx [M, K], d_lora_a [R, K], d_lora_b [N, R])."""
        y = self.call(x)
        return y, *torch.autograd.grad(y, (x, self.lora_a, self.lora_b), dy)


class ServingLayer(LoraLayer):
    """Forward alone, nothing recorded."""

    grad = False

    def forward(self, x: Tensor) -> Tensor:
        """y [M, N]."""
        with torch.no_grad():
            return self.call(x)


class BareProduct(LoraLayer):
    """The floor: the products with W that no LoRA linear can do without."""

    grad = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ, [M, N]."""
        return F.linear(x, self.weight)

    def both(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """(x Wᵀ [M, N], dy W [M, K])."""
        return F.linear(x, self.weight), dy @ self.weight


@dataclass(frozen=True)
class Provider:
    """An entry of the comparison.

    Args:
        build: operands -> one layer for each copy of the weight.
        modes: which of MODES it takes part in.
        adapter_dtype: dtype of A and B, or None for the floor, which has none and is not checked.
        needs: packages it cannot do without, for a kernel.
    """

    name: str
    build: Callable[[Operands], list[LoraLayer]]
    adapter_dtype: torch.dtype | None
    modes: tuple[str, ...] = MODES
    kernels: tuple[str, ...] = KERNELS
    needs: Callable[[str], tuple[str, ...]] = lambda kernel: ()

    def unavailable(self, kernel: str) -> str | None:
        """Why it cannot take part on this machine; None where it can."""
        return next((reason for name in self.needs(kernel) if (reason := missing(name))), None)


def missing(package: str) -> str | None:
    """None where the package can be imported, else a line that says it is not there."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _build_torch(operands: Operands) -> list[LoraLayer]:
    return [BareProduct(weight) for weight in operands.dense]


def _build_fastlora(operands: Operands, dtype: torch.dtype) -> list[LoraLayer]:
    from fastlora.linear import LoRALinear, NF4Linear

    p = operands.problem

    def layer(weight: Tensor | NF4Weight) -> LoraLayer:
        base = NF4Linear(weight) if isinstance(weight, NF4Weight) else _linear(weight)
        module = LoRALinear(base, p.R, SCALING * p.R, p.dropout, adapter_dtype=dtype).train()
        return _with_adapters(module, operands, LoraLayer)

    return [layer(weight) for weight in operands.weights]


def _build_peft(operands: Operands, dtype: torch.dtype, serving: bool = False) -> list[LoraLayer]:
    import peft

    p = operands.problem
    bases: OrderedDict[str, nn.Module] = OrderedDict()
    for i, weight in enumerate(operands.weights):
        if isinstance(weight, Tensor):
            bases[f"copy{i}"] = _linear(weight)
        else:
            bases[f"copy{i}"] = _linear4bit(_clone(weight) if serving else weight, p.dtype)
    config = peft.LoraConfig(
        r=p.R, lora_alpha=int(SCALING * p.R), lora_dropout=p.dropout, target_modules=list(bases), bias="none"
    )
    model = peft.inject_adapter_in_model(config, nn.Sequential(bases)).train(not serving)
    for name in bases:
        for adapter in (getattr(model, name).lora_A, getattr(model, name).lora_B):
            adapter.to(p.device, dtype)
    if not serving:
        return [_with_adapters(getattr(model, name), operands, LoraLayer) for name in bases]
    layers = [_with_adapters(getattr(model, name), operands, ServingLayer) for name in bases]
    for layer in layers:
        layer.forward(torch.zeros(1, p.K, dtype=p.dtype, device=p.device))  # the one call that repacks the weight
    return layers


def _with_adapters(module: Any, operands: Operands, kind: type[LoraLayer]) -> LoraLayer:
    """Set A and B of a LoRA module, which both packages call by the same names."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(operands.lora_a)
        b.copy_(operands.lora_b)
    return kind(module, a, b)


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _linear4bit(weight: NF4Weight, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    n, k = weight.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    layer.weight = weight.to_bnb()
    return layer


def _peft_needs(kernel: str) -> tuple[str, ...]:
    return ("peft", "bitsandbytes") if kernel == "nf4_linear" else ("peft",)


FP32, BF16 = torch.float32, torch.bfloat16
PROVIDERS = (
    Provider("torch", _build_torch, None),
    Provider("peft-fp32", lambda operands: _build_peft(operands, FP32), FP32, needs=_peft_needs),
    Provider("peft-bf16", lambda operands: _build_peft(operands, BF16), BF16, needs=_peft_needs),
    Provider(
        "peft-eval",
        lambda operands: _build_peft(operands, BF16, serving=True),
        BF16,
        modes=("forward",),
        kernels=("nf4_linear",),
        needs=_peft_needs,
    ),
    Provider("fastlora-fp32", lambda operands: _build_fastlora(operands, FP32), FP32),
    Provider("fastlora-bf16", lambda operands: _build_fastlora(operands, BF16), BF16),
)


def find_providers(names: list[str] | None = None) -> tuple[Provider, ...]:
    """The providers of these names, or all.

    Raises:
        ValueError: no provider of that name.
    """
    known = {provider.name: provider for provider in PROVIDERS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"no provider called {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names) if names else PROVIDERS
