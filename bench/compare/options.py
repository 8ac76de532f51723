"""Compare peft's options between packages: one adapted layer, forward and backward, each option on its own.

    peft       the layer as peft computes it
    fastlora   the same layer after replace_linear

bf16, r = 16, over a bf16 and an NF4 base. Adapters are in fp32 as peft has them by default; for DoRA with dropout they
are in bf16, because peft otherwise computes it in fp32, and fastlora leaves that to peft. Layers are timed in turn;
`bench.measure.timing` says how. In the CSV, kernel is option_{what}_{base}, M the tokens. A layer that steps back to
peft has no row. Neither has one whose result differs from peft's by more than 2% (options with dropout are compared
with dropout off): a line says so, the other options are measured, and the command fails in the end.
"""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastlora
from bench.compare.whole_layers import (
    RefusedError,
    add_layer_arguments,
    forward_and_backward,
    open_recorder,
    require_close,
)
from bench.measure.operands import missing
from bench.measure.record import Point
from bench.measure.timing import interleave
from fastlora.ops import nf4

SUMMARY = "peft's options (DoRA, mixed batches, several adapters, ...) against peft, one layer each"
RANK, SAMPLES = 16, 8
PROVIDERS = ("peft", "fastlora")
BASES = ("bf16", "nf4")
SIZES = {"cpu": (2048, 2048, (256, 1024)), "cuda": (4096, 14336, (256, 8192)), "quick": (64, 96, (8,))}  # K, N, tokens


@dataclass(frozen=True)
class Option:
    """A configuration of peft's, how many adapters, and how the layer is called."""

    config: Mapping[str, Any] = field(default_factory=dict)
    adapters: int = 1
    mixed: bool = False
    adapter_dtype: torch.dtype = torch.float32


OPTIONS = {
    "plain": Option(),
    "dropout": Option({"lora_dropout": 0.1}),
    "lora_bias": Option({"lora_bias": True}),
    "dora": Option({"use_dora": True}),
    "dora_dropout": Option({"use_dora": True, "lora_dropout": 0.1}, adapter_dtype=torch.bfloat16),
    "two": Option(adapters=2),
    "two_dropout": Option({"lora_dropout": 0.1}, adapters=2),
    "mixed_2": Option(adapters=2, mixed=True),
    "mixed_8": Option(adapters=8, mixed=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench options`."""
    add_layer_arguments(parser, "options", 3.0, "option, base and M")
    parser.add_argument("--option", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="which to measure (all)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and append to the CSV; returns the exit status."""
    device = torch.device(arguments.device)
    recorder = open_recorder(arguments, "options")
    table = Table(title="milliseconds (median), one layer, forward + backward", title_justify="left")
    for name in ("option", "base", "tokens", *PROVIDERS, "x peft"):
        table.add_column(name, justify="left" if name in ("option", "base") else "right")
    refused: list[str] = []
    k, n, tokens = SIZES["quick" if arguments.quick else arguments.device]
    for base in BASES:
        if base == "nf4" and (reason := missing("bitsandbytes")):
            print(f"nf4: {reason}")
            continue
        for what in arguments.option:
            layers = build(OPTIONS[what], base, k, n, device)
            for m in tokens:
                try:
                    points = measure(what, base, layers, m, device, arguments.budget)
                except RefusedError as error:
                    refused.append(f"{what} over {base}, {m} tokens: {error}")
                    continue
                recorder.write(points)
                ms = [point.p50 for point in points]
                table.add_row(what, base, str(m), *(f"{each:.4g}" for each in ms), f"{ms[0] / ms[1]:.2f}")
    Console(width=120).print(table)
    print("\n".join([*refused, f"appended to {recorder.path}"]))
    return 1 if refused else 0


def build(option: Option, base: str, k: int, n: int, device: torch.device) -> dict[str, Any]:
    """Provider -> its layer, both with the same values, in train mode."""
    torch.manual_seed(0)
    holder: Any = nn.Module()
    linear: Any = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight, std=k**-0.5)
    if base == "nf4":
        import bitsandbytes as bnb

        packed = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        packed.weight = nf4.quantize(linear.weight.detach()).to_bnb()
        linear, holder.is_loaded_in_4bit = packed, True
    holder.linear = linear.to(device)
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["linear"], **option.config}
    names = ["default", *(f"other_{serial}" for serial in range(1, option.adapters))]
    for name in names:
        peft.inject_adapter_in_model(peft.LoraConfig(**config), holder, adapter_name=name)
    for name, parameter in holder.named_parameters():
        if "lora_" not in name:
            continue
        parameter.data = parameter.data.to(option.adapter_dtype)
        if "magnitude" not in name:
            nn.init.normal_(parameter, std=0.2 * k**-0.5)
    holder.linear.set_adapter(names)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ours: Any = fastlora.replace_linear(copy.deepcopy(holder))
    return {"peft": holder.linear.train(), "fastlora": ours.linear.train()}


def measure(
    what: str, base: str, layers: Mapping[str, Any], m: int, device: torch.device, budget_s: float
) -> list[Point]:
    """A point for each provider at m tokens."""
    generator = torch.Generator(device).manual_seed(1)
    k, n = layers["peft"].in_features, layers["peft"].out_features
    shape = (SAMPLES, m // SAMPLES)
    x, dy = (torch.randn(*shape, size, device=device, generator=generator).bfloat16() for size in (k, n))
    x.requires_grad_()
    names = list(layers["peft"].lora_A)
    samples = {"adapter_names": [names[place % len(names)] for place in range(SAMPLES)]} if OPTIONS[what].mixed else {}
    _require_same_results(layers, x, samples)

    calls = {name: forward_and_backward(layer, x, dy, **samples) for name, layer in layers.items()}
    times = interleave(calls, device, budget_s, min_rounds=5)
    dropout = OPTIONS[what].config.get("lora_dropout", 0.0)
    sizes = (m, k, n, RANK)
    kernel = f"option_{what}_{base}"
    return [Point(kernel, name, "both", "time", *sizes, *times[name], dropout=dropout) for name in layers]


def _require_same_results(layers: Mapping[str, Any], x: Tensor, samples: dict[str, Any]) -> None:
    """Raise RefusedError where the results differ, or where the layer would be peft's own."""
    with torch.no_grad():
        drops = [part for layer in layers.values() for part in layer.lora_dropout.values()]
        for part in drops:
            part.eval()
        theirs, ours = (layers[name](x, **samples) for name in PROVIDERS)
        for part in drops:
            part.train()
        layers["fastlora"](x, **samples)
    calls = layers["fastlora"].fastlora_calls
    if calls.stepped_back:
        raise RefusedError(f"the layer steps back to peft: {calls.last_reason}")
    require_close("fastlora", ours, "peft", theirs)
