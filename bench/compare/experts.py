"""Compare adapters on a stack of experts between packages: one mixture-of-experts layer, forward and backward.

    peft           its ParamWrapper, with the experts' forward that transformers chooses
    fastlora       the same layer after replace_linear
    fastlora-nf4   the same over stacks packed in NF4, which peft cannot compute
    fastlora-torch, fastlora-nf4-torch   on CUDA, where those two run products of our own: torch's grouped_mm instead

bf16, fp32 adapters as peft has them by default. Layers are timed in turn; `bench.measure.timing` says how. In the CSV,
kernel is experts_E{experts}_top{chosen}, M the tokens, K the hidden and N the intermediate size of an expert. A result
that differs from peft's by more than 2% is an error.
"""

import argparse
import contextlib
import copy
from typing import Any, NamedTuple
from unittest import mock

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fastlora
from bench.compare.whole_layers import add_layer_arguments, forward_and_backward, open_recorder, require_close
from bench.measure.record import Point
from bench.measure.timing import interleave
from fastlora.ops import grouped_cuda

SUMMARY = "adapters on stacks of experts against peft"
RANK = 16
PARAMETERS = ("gate_up_proj", "down_proj")
PROVIDERS = ("peft", "fastlora", "fastlora-nf4")
BY_TORCH = "-torch"


class Stack(NamedTuple):
    """A layer of `experts` experts; each token goes to `chosen` of them."""

    experts: int
    chosen: int
    hidden: int
    intermediate: int
    tokens: tuple[int, ...]

    @property
    def kernel(self) -> str:
        return f"experts_E{self.experts}_top{self.chosen}"


STACKS = {
    "cpu": (Stack(32, 4, 1024, 768, (16, 512)), Stack(8, 2, 1024, 3584, (16, 512))),
    "cuda": (Stack(128, 8, 2048, 768, (16, 512, 4096)), Stack(8, 2, 4096, 14336, (16, 512, 4096))),
    "quick": (Stack(4, 2, 64, 64, (8,)),),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench experts`."""
    add_layer_arguments(parser, "experts", 8.0, "layer and M")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and append to the CSV; returns the exit status."""
    device = torch.device(arguments.device)
    recorder = open_recorder(arguments, "experts")
    table = Table(title="milliseconds (median), a layer of experts, forward + backward", title_justify="left")
    shown = [*PROVIDERS, *(f"{name}{BY_TORCH}" for name in PROVIDERS[1:] if device.type == "cuda")]
    for name in ("layer", "tokens", *shown, "x peft"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for stack in STACKS["quick" if arguments.quick else arguments.device]:
        layers = build(stack, device)
        for m in stack.tokens:
            points = measure(stack, layers, m, device, arguments.budget)
            recorder.write(points)
            ms = {point.provider: point.p50 for point in points}
            layer = f"{stack.experts} x {stack.hidden} x {stack.intermediate}, top {stack.chosen}"
            figures = [f"{ms[provider]:.4g}" if provider in ms else "-" for provider in shown]
            table.add_row(layer, str(m), *figures, f"{ms['peft'] / ms['fastlora']:.2f}")
    Console(width=120).print(table)
    print(f"appended to {recorder.path}")
    return 0


def build(stack: Stack, device: torch.device) -> dict[str, Any]:
    """Provider -> its layer, all with the same values; over NF4 only where bitsandbytes is installed."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=stack.hidden, moe_intermediate_size=stack.intermediate, num_experts=stack.experts
    )
    config._experts_implementation = "grouped_mm"
    holder = nn.Module()
    with device:
        holder.experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.02)
    targets = [f"experts.{name}" for name in PARAMETERS]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, target_modules=[], target_parameters=targets, init_lora_weights=False), holder
    )
    for name, parameter in holder.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            nn.init.normal_(parameter, std=0.02)
        else:
            parameter.requires_grad_(False)
    layers = {"peft": holder, "fastlora": fastlora.replace_linear(copy.deepcopy(holder))}
    with contextlib.suppress(ImportError):
        layers["fastlora-nf4"] = fastlora.replace_linear(fastlora.quantize_experts(copy.deepcopy(holder)))
    found: dict[str, Any] = {provider: layer.experts for provider, layer in layers.items()}
    if device.type == "cuda":
        found |= {f"{name}{BY_TORCH}": ByTorch(layer) for name, layer in found.items() if name != "peft"}
    return found


class ByTorch(nn.Module):
    """A layer whose stacks are multiplied by torch, not by the Triton kernels; the same parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        """What the layer gives; its backward is by torch too."""
        with mock.patch.object(grouped_cuda, "refusal", return_value="torch's grouped_mm is asked for"):
            result: Tensor = self.layer(*args)
        return result


def measure(stack: Stack, layers: dict[str, Any], m: int, device: torch.device, budget_s: float) -> list[Point]:
    """A point for each provider at m tokens."""
    generator = torch.Generator(device).manual_seed(1)
    x, dy = (torch.randn(m, stack.hidden, device=device, generator=generator).bfloat16() for _ in range(2))
    x.requires_grad_()
    weights, chosen = torch.rand(m, stack.experts, device=device, generator=generator).topk(stack.chosen)
    weights = weights.bfloat16()
    _require_same_results(layers, x, chosen, weights)

    calls = {name: forward_and_backward(layer, x, dy, chosen, weights) for name, layer in layers.items()}
    times = interleave(calls, device, budget_s, min_rounds=5)
    sizes = (m, stack.hidden, stack.intermediate, RANK)
    return [Point(stack.kernel, name, "both", "time", *sizes, *times[name]) for name in layers]


def _require_same_results(layers: dict[str, Any], x: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Raise RefusedError unless stacks of the same values give the same result."""
    same = [("peft", "fastlora"), ("fastlora", f"fastlora{BY_TORCH}"), ("fastlora-nf4", f"fastlora-nf4{BY_TORCH}")]
    with torch.no_grad():
        found = {name: layer(x, chosen, weights) for name, layer in layers.items()}
    for theirs, ours in same:
        if ours in found:
            require_close(ours, found[ours], theirs, found[theirs])
