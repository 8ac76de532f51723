"""Who is compared: the bare product, fastlora, and the packages of `bench.compare.packages`.

torch           the bare bf16 product, x Wᵀ and dy W, no LoRA at all: the floor
fastlora-fp32   ours, fp32 adapters
fastlora-bf16   ours, bf16 adapters; also stands for the plain `nf4_dequantize`, which has no adapters
"""

import functools

import torch
from torch import Tensor

from bench.compare.layers import BareProduct, Expansion, LoraLayer, Provider
from bench.compare.packages import BF16, FP32, PEERS, adapters, dense_linear, with_adapters
from bench.measure.operands import (
    DEQUANTIZE,
    KERNELS,
    SCALING,
    Operands,
)
from fastlora.ops.nf4 import NF4Weight


def _build_torch(operands: Operands) -> list[LoraLayer]:
    return [BareProduct(weight) for weight in operands.dense]


def _build_fastlora(operands: Operands, dtype: torch.dtype) -> list[LoraLayer]:
    from fastlora.layers.lora_linear import LoRALinear
    from fastlora.layers.nf4_linear import NF4Linear

    p = operands.problem
    if p.kernel == DEQUANTIZE:
        return _build_expansions(operands, dtype)

    def layer(weight: Tensor | NF4Weight) -> LoraLayer:
        base = NF4Linear(weight) if isinstance(weight, NF4Weight) else dense_linear(weight)
        module = LoRALinear(base, p.R, SCALING * p.R, p.dropout, adapter_dtype=dtype).train()
        return with_adapters(module, operands, LoraLayer)

    return [layer(weight) for weight in operands.weights]


def _build_expansions(operands: Operands, dtype: torch.dtype) -> list[LoraLayer]:
    from fastlora.ops.linear import nf4_dequantize

    p = operands.problem
    a, b = adapters(operands, dtype)
    update = (a, b, SCALING) if p.R else ()
    return [Expansion(functools.partial(nf4_dequantize, weight, p.dtype, *update), a, b) for weight in operands.packed]


PROVIDERS = (
    Provider("torch", _build_torch, None, checked=False),
    *PEERS,
    Provider(
        "fastlora-fp32",
        functools.partial(_build_fastlora, dtype=FP32),
        FP32,
        kernels=KERNELS,
        ranks="update",
    ),
    Provider("fastlora-bf16", functools.partial(_build_fastlora, dtype=BF16), BF16, kernels=KERNELS),
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
