"""The packages that fastlora is compared with, each through its public functions.

    peft-fp32      peft with fp32 adapters (its default), base nn.Linear or bitsandbytes' Linear4bit, in train mode
    peft-bf16      the same with bf16 adapters
    peft-eval      peft as it serves: eval mode, no gradients, bf16 adapters. On a CPU with AVX512_BF16 bitsandbytes
                   then repacks the weight into another, lossier format, and training and serving use different kernels
    bitsandbytes   only the base product, without LoRA, by its own 4-bit kernel (`decode`), and its dequantization
                   (`nf4_dequantize`)
    unsloth        its autograd function `LoRA_W`, as its attention output projection applies it, bf16 adapters
    lorafusion     `fused_linear_lora` over a dense weight, bf16 adapters
    compile        `fastlora.reference` through torch.compile, dynamic shapes, bf16 adapters

All work on the same tensors; the 4-bit codes are shared, not quantized again.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.compare.layers import Expansion, LoraLayer, Provider, ServingLayer
from bench.measure.operands import DEQUANTIZE, SCALING, Operands, Problem, clone, error_line
from fastlora import reference
from fastlora.ops.nf4 import NF4Weight

FP32, BF16 = torch.float32, torch.bfloat16
TRAINING_MODES = ("forward", "backward", "both")
COMPILE_FROM_M = 32  # below, only launches would be timed, and M = 1 would be compiled separately


def dense_linear(weight: Tensor) -> nn.Module:
    """nn.Linear over a weight [N, K], frozen, without copying it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def with_adapters(module: Any, operands: Operands, kind: type[LoraLayer]) -> LoraLayer:
    """Set A and B of a LoRA module; peft and fastlora use the same names for them."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(operands.lora_a)
        b.copy_(operands.lora_b)
    return kind(module, a, b)


def adapters(operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as leaves of their own."""
    return tuple(t.to(dtype, copy=True).requires_grad_() for t in (operands.lora_a, operands.lora_b))  # type: ignore[return-value]


def _linear4bit(weight: NF4Weight, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    n, k = weight.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    layer.weight = weight.to_bnb()
    return layer


def _build_peft(operands: Operands, dtype: torch.dtype, serving: bool = False) -> list[LoraLayer]:
    import peft

    p = operands.problem
    bases: OrderedDict[str, nn.Module] = OrderedDict()
    for i, weight in enumerate(operands.weights):
        if isinstance(weight, Tensor):
            bases[f"copy{i}"] = dense_linear(weight)
        else:
            bases[f"copy{i}"] = _linear4bit(clone(weight) if serving else weight, p.dtype)
    config = peft.LoraConfig(
        r=p.R, lora_alpha=int(SCALING * p.R), lora_dropout=p.dropout, target_modules=list(bases), bias="none"
    )
    model = peft.inject_adapter_in_model(config, nn.Sequential(bases)).train(not serving)
    for name in bases:
        for adapter in (getattr(model, name).lora_A, getattr(model, name).lora_B):
            adapter.to(p.device, dtype)
    if not serving:
        return [with_adapters(getattr(model, name), operands, LoraLayer) for name in bases]
    layers = [with_adapters(getattr(model, name), operands, ServingLayer) for name in bases]
    for layer in layers:
        layer.forward(torch.zeros(1, p.K, dtype=p.dtype, device=p.device))  # the one call that repacks the weight
    return layers


def _peft_needs(kernel: str) -> tuple[str, ...]:
    return ("peft", "bitsandbytes") if kernel == "nf4_linear" else ("peft",)


def _build_bitsandbytes(operands: Operands) -> list[LoraLayer]:
    import bitsandbytes

    def layer(weight: NF4Weight) -> LoraLayer:
        parameter = weight.to_bnb()
        codes, state = parameter.data, parameter.quant_state
        if operands.problem.kernel == DEQUANTIZE:
            expand = functools.partial(bitsandbytes.functional.dequantize_4bit, codes, state)
            return Expansion(expand, operands.lora_a, operands.lora_b)
        product = functools.partial(bitsandbytes.matmul_4bit, B=codes, quant_state=state)
        return ServingLayer(product, operands.lora_a, operands.lora_b)

    return [layer(weight) for weight in operands.packed]


@functools.cache
def _unsloth() -> tuple[Any, str]:
    """(`unsloth.kernels`, "") or (None, why not).

    The package's own `__init__` is not run: it patches transformers and peft for the whole process, which would change
    the other providers. What it sets in the environment is taken back.
    """
    spec = importlib.util.find_spec("unsloth")
    if spec is None:
        return None, "unsloth is not installed"
    environment, loaded = dict(os.environ), "unsloth" in sys.modules
    try:
        os.environ["UNSLOTH_IS_PRESENT"] = "1"
        sys.modules.setdefault("unsloth", importlib.util.module_from_spec(spec))
        return importlib.import_module("unsloth.kernels"), ""
    except Exception as error:  # it probes device, driver and a dozen packages: what fails is the reason
        if not loaded:
            sys.modules.pop("unsloth", None)
        return None, f"unsloth cannot be imported ({error_line(error)})"
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _lora_w() -> Any:
    return importlib.import_module("unsloth.kernels.fast_lora").LoRA_W


def _unsloth_fits(problem: Problem) -> str:
    if problem.device.type != "cuda":
        return "unsloth needs a CUDA device"
    _, reason = _unsloth()
    if not reason and problem.dropout and "dropout_p" not in inspect.signature(_lora_w().forward).parameters:
        return "this unsloth's LoRA_W takes no dropout"
    return reason


def _build_unsloth(operands: Operands) -> list[LoraLayer]:
    kernels, reason = _unsloth()
    if reason:
        raise ImportError(reason)
    dropout = (operands.problem.dropout,) if operands.problem.dropout else ()
    a, b = adapters(operands, BF16)

    def layer(weight: Tensor | NF4Weight) -> LoraLayer:
        base = weight if isinstance(weight, Tensor) else weight.to_bnb()
        state = getattr(base, "quant_state", None)
        if operands.problem.kernel == DEQUANTIZE:
            return Expansion(functools.partial(kernels.fast_dequantize, base, state), a, b)

        def call(x: Tensor) -> Tensor:
            y = _lora_w().apply(x.unsqueeze(0), base, state, a, b, SCALING, *dropout)
            return y.squeeze(0)

        return LoraLayer(call, a, b)

    return [layer(weight) for weight in operands.weights]


def _build_lorafusion(operands: Operands) -> list[LoraLayer]:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    a, b = adapters(operands, BF16)
    p = operands.problem.dropout

    def layer(weight: Tensor) -> LoraLayer:
        def call(x: Tensor) -> Tensor:
            y = fused_linear_lora(
                x=x.unsqueeze(0), linear_w=weight, lora_a=a, lora_b=b, alpha=SCALING, dropout_p=p, seed=42
            )
            return y.squeeze(0)

        return LoraLayer(call, a, b)

    return [layer(weight) for weight in operands.dense]


def _masked_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    mask = (torch.rand_like(x, dtype=torch.float32) >= p).to(x.dtype) / (1 - p) if p else None
    return reference.lora_linear(x, weight, a, b, SCALING, dropout_mask=mask)


def _expanded_reference(parts: tuple[Any, ...], blocksize: int, n: int, k: int) -> Tensor:
    codes, *scales = parts
    return reference.nf4_dequantize(codes, reference.nf4_scales(*scales), (n, k), blocksize)


def _build_compile(operands: Operands) -> list[LoraLayer]:
    p = operands.problem
    a, b = adapters(operands, BF16)
    blocksize = operands.packed[0].blocksize if operands.packed else 0

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return _masked_reference(x, weight, a, b, p.dropout)

    def nf4(x: Tensor, *parts: Tensor | None) -> Tensor:
        weight = _expanded_reference(parts, blocksize, b.shape[0], x.shape[1]).to(x.dtype)
        return _masked_reference(x, weight, a, b, p.dropout)

    def dequantize(*parts: Tensor | None) -> Tensor:
        weight = _expanded_reference(parts, blocksize, b.shape[0], a.shape[1])
        return (weight.addmm(b.float(), a.float(), alpha=SCALING) if p.R else weight).to(p.dtype)

    functions: dict[str, Callable[..., Tensor]] = {"bf16_linear": dense, "nf4_linear": nf4, DEQUANTIZE: dequantize}
    compiled = torch.compile(functions[p.kernel], dynamic=True, fullgraph=True)

    def layer(weight: Tensor | NF4Weight) -> LoraLayer:
        parts = (weight,) if isinstance(weight, Tensor) else weight.tensors()
        if p.kernel == DEQUANTIZE:
            return Expansion(torch.no_grad()(lambda: compiled(*parts)), a, b)
        return LoraLayer(lambda x: compiled(x, *parts), a, b)

    return [layer(weight) for weight in operands.weights]


def _peft(dtype: torch.dtype, serving: bool = False) -> Callable[[Operands], list[LoraLayer]]:
    return functools.partial(_build_peft, dtype=dtype, serving=serving)


PEERS = (
    Provider("peft-fp32", _peft(FP32), FP32, modes=TRAINING_MODES, needs=_peft_needs),
    Provider("peft-bf16", _peft(BF16), BF16, modes=TRAINING_MODES, needs=_peft_needs),
    Provider("peft-eval", _peft(BF16, True), BF16, ("forward", "decode"), needs=_peft_needs),
    Provider(
        "bitsandbytes",
        _build_bitsandbytes,
        None,
        modes=("decode",),
        kernels=("nf4_linear", DEQUANTIZE),
        needs=lambda kernel: ("bitsandbytes",),
        ranks="plain",
    ),
    Provider(
        "unsloth",
        _build_unsloth,
        BF16,
        modes=TRAINING_MODES,
        kernels=("nf4_linear", DEQUANTIZE, "bf16_linear"),
        needs=lambda kernel: ("unsloth", "bitsandbytes"),
        fits=_unsloth_fits,
        ranks="plain",
    ),
    Provider(
        "lorafusion",
        _build_lorafusion,
        BF16,
        modes=TRAINING_MODES,
        kernels=("bf16_linear",),
        needs=lambda kernel: ("lorafusion",),
        fits=lambda problem: "" if problem.device.type == "cuda" else "lorafusion needs a CUDA device",
    ),
    Provider(
        "compile",
        _build_compile,
        BF16,
        modes=TRAINING_MODES,
        kernels=("nf4_linear", DEQUANTIZE, "bf16_linear"),
        least_m=COMPILE_FROM_M,
    ),
)
