"""Whole training micro-steps: forward, backward and recomputation of a model, in fastlora and in peft.

    peft           peft's layers over bitsandbytes' 4-bit ones, or over `nn.Linear`; adapters fp32, autocast in bf16, as
                   Trainer with bf16=True runs them
    peft-sped-up   the same model after `fastlora.replace_linear`
    fastlora       the plain model after `fastlora.replace_linear`, its weights in NF4 or in bf16

    qwen3-8b-4     four decoder layers of Qwen3-8B, without a head
    qwen3-0.6b     Qwen3-0.6B whole, with its loss

Random weights, the same for all; LoRA of rank 16 on all seven linears of a layer, B not zero; gradient checkpointing.
Each case is first run once by every provider and compared with peft: outputs and gradients of adapters. Then they are
timed in turn. Rows of the CSV, kernel `step_MODEL_BASE`, K and N the sizes of its MLP:

    time, mode step       milliseconds from the call to the device being done
    host, mode step       microseconds until everything is queued; where the step takes no longer, the host is the limit
    time, mode kernels    milliseconds of the device's kernels, added up by torch's profiler
    launches              kernels, copies and fills
    peak_memory           most memory held in a step, above the model's own
    tokens_per_s          tokens of a step over its time

Rows are written as they are measured. After --limit seconds the rest is left out, and named.
"""

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import fastlora
from bench.measure.operands import error_line, missing
from bench.measure.record import RESULTS, Point, Recorder
from bench.measure.timing import device_name, spread

SUMMARY = "whole training steps of Qwen3: fastlora against peft, wall time, host, device, memory"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
PROVIDERS = ("peft", "fastlora", "peft-sped-up")
TOKENS = (4096, 2048, 1024)
SEQUENCE = 2048  # tokens of a sample at most
ROUNDS, WARM_UP = 7, 2
CLOSE = 0.08  # of the norm: two ways to round in bf16 differ by 2% to 4%
KERNELS_LISTED = 40


class Model(NamedTuple):
    """A model to build: transformers' config, and whether it has its head and loss."""

    sizes: dict[str, Any]
    whole: bool


_HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MODELS = {
    "qwen3-8b-4": Model({"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 4, **_HEADS}, False),
    "qwen3-0.6b": Model(
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936, **_HEADS}
        | {"num_attention_heads": 16},
        True,
    ),
}
_TOY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
_TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class Case(NamedTuple):
    """One model over one base, for so many tokens."""

    model: str
    base: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.model} {self.base} {self.tokens} tokens"


class Runner(NamedTuple):
    """A provider's model, and one step of it: the loss or the hidden states, and the adapters' gradients by name."""

    step: Callable[[], tuple[Tensor, dict[str, Tensor]]]
    held: int  # bytes of the model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench steps`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="toy models")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bases", nargs="+", choices=("nf4", "bf16"), default=["nf4", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M", help="of a micro-step")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing them")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="no case begins later")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to append to (bench/results/DEVICE/steps.csv)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="CSV of the kernels that take most of the time")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; 1 where a provider is wrong or fails.

    Raises:
        ValueError: a number of tokens below 1, or no CUDA device where one is asked for.
    """
    if min(arguments.tokens) < 1:
        raise ValueError("--tokens must be at least 1")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    place = "cpu" if device.type == "cpu" else device_name(device).lower().replace(" ", "-")
    recorder = Recorder(arguments.out or RESULTS / place / "steps.csv", device_name(device))
    cases = [Case(m, b, t) for m in arguments.models for b in arguments.bases for t in arguments.tokens]
    print(f"{'ms a step: wall, queued by the host, device':<60}{'tokens/s':>10}{'of peft':>9}{'peak MB':>9}")
    began, failed = time.monotonic(), False
    for case in cases:
        if time.monotonic() - began > arguments.limit:
            print(f"stopped at the limit before {case}")
            break
        bench = Bench(case, device, arguments.quick, not arguments.no_checkpointing)
        for provider in arguments.providers:
            if reason := _absent(provider, case.base):
                print(f"{case} {provider}: {reason}")
            else:
                failed |= not bench.admit(provider)
        rows = bench.measure()
        recorder.write(rows)
        if arguments.profile is not None:
            bench.write_kernels(arguments.profile)
        del bench
        gc.collect()
    print(f"rows appended to {recorder.path}")
    return 1 if failed else 0


def _absent(provider: str, base: str) -> str:
    return missing("bitsandbytes") or "" if provider.startswith("peft") and base == "nf4" else ""


class Bench:
    """The providers of one case: built, compared with the first of them, timed."""

    def __init__(self, case: Case, device: torch.device, quick: bool, checkpointing: bool) -> None:
        self.case, self.device, self.checkpointing = case, device, checkpointing
        model = MODELS[case.model]
        self.whole = model.whole
        self.config = Qwen3Config(**({"vocab_size": 256} | (_TOY if quick else model.sizes)))
        self.config._attn_implementation = "sdpa"
        self.config.tie_word_embeddings = True
        samples = -(case.tokens // -SEQUENCE)
        generator = torch.Generator(device).manual_seed(0)
        shape = samples, case.tokens // samples
        self.ids = torch.randint(0, self.config.vocab_size, shape, generator=generator, device=device)
        dy = torch.randn(*shape, self.config.hidden_size, generator=generator, device=device)
        self.dy = (dy * 1e-2).bfloat16()
        self.runners: dict[str, Runner] = {}
        self.peaks: dict[str, int] = {}
        self.kernels: dict[str, dict[str, tuple[int, float]]] = {}
        self._first: tuple[str, Tensor, dict[str, Tensor]] | None = None

    def admit(self, provider: str) -> bool:
        """Build a provider and compare its step with the first one's; a line says why where it is left out."""
        try:
            runner = self._runner(provider)
            found, gradients = self._peak(provider, runner)
        except Exception as error:  # out of memory, or a package's own: the others go on
            print(f"{self.case} {provider} left out: {error_line(error)}", flush=True)
            return False
        if self._first is None:
            self._first = provider, found, gradients
        other, expected, theirs = self._first
        names = sorted(theirs)
        worst = max((_off(gradients[n], theirs[n]) for n in names if n in gradients), default=float("inf"))
        off = max(_off(found, expected), worst)
        if sorted(gradients) != names or not off < CLOSE:
            print(f"WRONG, not timed: {self.case} {provider} is {off:.2%} off {other}, {len(gradients)} gradients")
            return False
        self.runners[provider] = runner
        return True

    def _peak(self, provider: str, runner: Runner) -> tuple[Tensor, dict[str, Tensor]]:
        if self.device.type != "cuda":
            return runner.step()
        runner.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = runner.step()
        torch.cuda.synchronize()
        self.peaks[provider] = torch.cuda.max_memory_allocated() - before
        return found

    def _runner(self, provider: str) -> Runner:
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        model = self._model(provider)
        gc.collect()
        held = torch.cuda.memory_allocated() - before if self.device.type == "cuda" else 0
        casts = provider.startswith("peft")
        parameters = [(_plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad]

        def step() -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=casts):
                if self.whole:
                    found = model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
                else:
                    found = model(input_ids=self.ids, use_cache=False).last_hidden_state
            found.backward(None if self.whole else self.dy.to(found.dtype))
            gradients = {name: p.grad for name, p in parameters if p.grad is not None}
            for _, p in parameters:
                p.grad = None
            return found.detach(), gradients

        return Runner(step, held)

    def _model(self, provider: str) -> Any:
        with _default_dtype(torch.bfloat16), self.device:
            model: Any = (Qwen3ForCausalLM if self.whole else Qwen3Model)(self.config)
        generator = torch.Generator(self.device).manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.normal_(std=p.shape[1] ** -0.5, generator=generator)
        model.requires_grad_(False)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
        options: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS}
        packed = self.case.base == "nf4"
        if provider == "fastlora":
            fastlora.replace_linear(model, **options, quantize="nf4" if packed else None)
        else:
            if packed:
                _to_4_bits(model, self.device)
            model = peft.get_peft_model(model, peft.LoraConfig(**options))
            if provider == "peft-sped-up":
                fastlora.replace_linear(model)
        generator = torch.Generator(self.device).manual_seed(2)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters(), key=lambda item: _plain_name(item[0])):
                if "lora_A" in name or "lora_B" in name:
                    p.normal_(std=p.shape[1] ** -0.5 * (0.1 if "lora_B" in name else 1.0), generator=generator)
        return model

    def measure(self) -> list[Point]:
        """Rows of the providers admitted; a line for each is printed."""
        walls: dict[str, list[float]] = {name: [] for name in self.runners}
        hosts: dict[str, list[float]] = {name: [] for name in self.runners}
        for turn in range(WARM_UP + ROUNDS):
            for name, runner in self.runners.items():
                host, wall = self._time(runner)
                if turn >= WARM_UP:
                    hosts[name].append(host)
                    walls[name].append(wall)
        rows = []
        for name in self.runners:
            rows += self._rows(name, walls[name], hosts[name], walls.get("peft"))
        return rows

    def _time(self, runner: Runner) -> tuple[float, float]:
        """(seconds until everything is queued, seconds until it is done) of one step."""
        self._wait()
        began = time.perf_counter()
        runner.step()
        queued = time.perf_counter() - began
        self._wait()
        return queued, time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _rows(self, name: str, walls: list[float], hosts: list[float], theirs: list[float] | None) -> list[Point]:
        sizes = (self.case.tokens, self.config.hidden_size, self.config.intermediate_size, RANK)

        def point(mode: str, metric: str, p50: float, p20: float | None = None, p80: float | None = None) -> Point:
            return Point(f"step_{self.case.model}_{self.case.base}", name, mode, metric, *sizes, p50, p20, p80)

        wall = statistics.median(walls)
        rows = [
            point("step", "time", *spread([each * 1e3 for each in walls])),
            point("step", "host", *spread([each * 1e6 for each in hosts])),
            point("step", "tokens_per_s", self.case.tokens / wall),
        ]
        device = ""
        if self.device.type == "cuda":
            self.kernels[name] = kernels = self._profile(self.runners[name])
            ms = sum(us for _, us in kernels.values()) / 1e3
            rows.append(point("kernels", "time", ms))
            rows.append(point("step", "launches", sum(calls for calls, _ in kernels.values())))
            rows.append(point("step", "peak_memory", self.peaks[name] / 1e6))
            device = f"{ms:.1f}"
        shown = f"{self.case} {name}: {wall * 1e3:.1f}, {statistics.median(hosts) * 1e3:.1f}, {device}"
        share = f"{statistics.median(theirs) / wall:.2f}" if theirs else ""
        peak = f"{self.peaks[name] / 1e6:.0f}" if name in self.peaks else ""
        print(f"{shown:<60}{self.case.tokens / wall:>10.0f}{share:>9}{peak:>9}", flush=True)
        return rows

    def _profile(self, runner: Runner) -> dict[str, tuple[int, float]]:
        """Calls and microseconds of each kernel in one step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            runner.step()
            self._wait()
        found: dict[str, tuple[int, float]] = {}
        for event in profile.events():
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                calls, us = found.get(event.name, (0, 0.0))
                found[event.name] = calls + 1, us + event.device_time
        return found

    def write_kernels(self, path: Path) -> None:
        """Append the kernels that take most of each provider's step."""
        fresh = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow(("model", "base", "tokens", "provider", "us", "calls", "name"))
            for provider, kernels in self.kernels.items():
                for name, (calls, us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:KERNELS_LISTED]:
                    writer.writerow((*self.case, provider, f"{us:.1f}", calls, name[:120]))


def _off(ours: Tensor, theirs: Tensor) -> float:
    """The difference over the norm; NaN becomes infinite."""
    off = ((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-20)).item()
    return off if off == off else float("inf")


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _to_4_bits(model: Any, device: torch.device) -> None:
    """bitsandbytes' layers in the place of the linears that get adapters, with nested scales."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in TARGETS:
            options: dict[str, Any] = {
                "bias": False,
                "compute_dtype": torch.bfloat16,
                "quant_type": "nf4",
                "device": "meta",
            }
            layer: nn.Module = bnb.nn.Linear4bit(module.in_features, module.out_features, **options)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            setattr(model.get_submodule(parent), last, layer.to(device))
