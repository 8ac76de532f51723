"""What the benches of whole models share: the layers adapted, NF4 bases of equal codes, adapters of equal values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import fastlora
from fastlora import reference

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def plain_name(name: str) -> str:
    """The name that a parameter has without peft around the model."""
    return name.removeprefix("base_model.model.")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def to_nf4(model: Any, expand: bool) -> None:
    """The linears that get adapters over fastlora's NF4 codes: bitsandbytes' layers, or the same ones made dense."""
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last not in TARGETS:
            continue
        packed = fastlora.quantize(module.weight.data)
        if expand:  # by plain torch, in fp32
            scales = reference.nf4_scales(*packed.tensors()[1:])
            module.weight.data = reference.nf4_dequantize(packed.codes, scales, packed.shape, packed.blocksize)
            continue
        import bitsandbytes as bnb

        options: dict[str, Any] = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
        layer: nn.Module = bnb.nn.Linear4bit(module.in_features, module.out_features, **options, device="meta")
        layer.weight = packed.to_bnb()
        setattr(model.get_submodule(parent), last, layer)
    model.is_loaded_in_4bit = not expand  # else peft takes its layer for dense weights, which also casts x to fp32
