"""Whole training micro-steps: forward, backward and recomputation of a model, in fastlora and in peft.

    peft           peft's layers over bitsandbytes' 4-bit ones, or over `nn.Linear`; adapters fp32, autocast in bf16, as
                   Trainer with bf16=True runs them
    peft-sped-up   the same model after `fastlora.replace_linear`
    fastlora       the plain model after `fastlora.replace_linear`, its weights in NF4 or in bf16
    speed-up       the same after `fastlora.speed_up`: norms, rotary embedding and SwiGLU too
    speed-up-kept  the same, whose checkpoints keep the linears' outputs (`fastlora.keep_linears`)
    graphed        the same again, replayed by `fastlora.GraphedStep`; on CUDA only

    qwen3-8b-4     four decoder layers of Qwen3-8B, without a head
    qwen3-0.6b     Qwen3-0.6B whole, with its loss

Random weights and NF4 codes, the same for all; LoRA of rank 16 on all seven linears of a layer, B not zero; gradient
checkpointing. Outputs and gradients of adapters are first compared with peft's in fp32 over the same weights. The first
provider may be `BROKEN` off, the others `CLOSE` times as far as it; "off" is that of the worst tensor. Then they are
timed in turn. Rows of the CSV, kernel `step_MODEL_BASE` (MODEL-kept without checkpointing), K and N the sizes of its
MLP:

    time, mode step           milliseconds from the call to the device being done
    host, mode step           microseconds of wall time until everything is queued. Where the step takes no longer, the
                              host is the limit; where it does, waiting for room in the device's queue is part of it
    time, mode kernels        milliseconds of the device's kernels, added up by torch's profiler
    launches                  kernels, copies and fills
    peak_memory, mode step    most memory held in a step, above the model's own; not for a graph, which holds its own
    peak_memory, mode model   the model's own
    tokens_per_s              tokens of a step over its time

NF4 comes before bf16. Rows are written as they are measured. After --limit seconds no case begins, and the one left out
is named.
"""

import argparse
import csv
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import fastlora
from bench.compare.whole_models import RANK, TARGETS, default_dtype, plain_name, to_nf4
from bench.measure.operands import error_line, missing
from bench.measure.record import RESULTS, Point, Recorder
from bench.measure.timing import device_name, spread

SUMMARY = "whole training steps of Qwen3: fastlora against peft, wall time, host, device, memory"
PROVIDERS = ("peft", "fastlora", "peft-sped-up", "speed-up", "speed-up-kept", "graphed")
TOKENS = (4096, 2048, 1024)
SEQUENCE = 2048  # tokens of a sample at most
ROUNDS, LEAST_ROUNDS, WARM_UP = 7, 3, 2
ROUNDS_S = 4.0  # after so long a case has its least rounds only
CLOSE = 1.5  # times the first provider's distance from fp32; over 28 layers right ones are at most 1.15 times as far
BROKEN = 0.15  # of the norm: rounding to bf16 costs the worst gradient 3% over two layers, 6% over 28
KERNELS_LISTED = 40
CELLS = (  # of a line printed: heading, mode, metric, units of the CSV in one of the line's
    ("wall", "step", "time", 1),
    ("host", "step", "host", 1e3),
    ("device", "kernels", "time", 1),
    ("launches", "step", "launches", 1),
    ("tokens/s", "step", "tokens_per_s", 1),
    ("peak MB", "step", "peak_memory", 1),
    ("model MB", "model", "peak_memory", 1),
)
HEADING = f"{'case, ms':<42}" + "".join(f"{cell[0]:>10}" for cell in CELLS) + f"{'of peft':>9}{'off':>8}"


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
    model: Any
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
        ValueError: tokens that are no whole samples, or no CUDA device where one is asked for.
    """
    if any(tokens < 1 or (tokens > SEQUENCE and tokens % SEQUENCE) for tokens in arguments.tokens):
        raise ValueError(f"--tokens must be at least 1, and above {SEQUENCE} a multiple of it")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    place = "cpu" if device.type == "cpu" else device_name(device).lower().replace(" ", "-")
    recorder = Recorder(arguments.out or RESULTS / place / "steps.csv", device_name(device))
    gc.collect()
    gc.freeze()  # of all that was imported: to free a model then takes milliseconds
    try:
        right = _measure(arguments, device, recorder)
    finally:
        gc.unfreeze()
    print(f"rows appended to {recorder.path}")
    return 0 if right else 1


def _measure(arguments: argparse.Namespace, device: torch.device, recorder: Recorder) -> bool:
    """All cases, the most telling first; False where a provider is wrong or fails."""
    cases = [Case(m, b, t) for b in arguments.bases for m in arguments.models for t in arguments.tokens]
    began, right, shown = time.monotonic(), True, [HEADING]
    print(HEADING, flush=True)
    for case in cases:
        if time.monotonic() - began > arguments.limit:
            print(f"stopped at the limit before {case}")
            break
        bench = Bench(case, device, arguments.quick, not arguments.no_checkpointing)
        for provider in arguments.providers:
            if reason := _absent(provider, case.base, device):
                print(f"{case} {provider}: {reason}")
            else:
                bench.admit(provider)
        for rows in bench.measure():
            recorder.write(rows)
        if arguments.profile is not None:
            bench.write_kernels(arguments.profile)
        right &= not bench.failed
        shown += bench.shown
        del bench
        gc.collect()
    print("\n".join(["", *shown]))
    return right


def _absent(provider: str, base: str, device: torch.device) -> str:
    if provider == "graphed" and device.type != "cuda":
        return "no CUDA device"
    return missing("bitsandbytes") or "" if provider.startswith("peft") and base == "nf4" else ""


class Bench:
    """The providers of one case: built, compared with fp32, timed."""

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
        self.off: dict[str, float] = {}
        self.shown: list[str] = []
        self.failed = False
        self._exact: tuple[Tensor, dict[str, Tensor]] | None = None

    def admit(self, provider: str) -> None:
        """Build a provider and compare its step with fp32; a line says why where it is left out."""
        try:
            if self._exact is None:
                self._exact = self._runner("exact").step()
            runner = self._runner(provider)
            found, gradients = self._peak(provider, runner)
            wrong = self._wrong(provider, runner.model, found, gradients)
        except Exception as error:  # out of memory, or a package's own: the others go on
            self._leave_out(provider, error)
            return
        if wrong:
            self.failed = True
            print(f"WRONG, not timed: {self.case} {provider} {wrong}", flush=True)
        else:
            self.runners[provider] = runner

    def _leave_out(self, provider: str, error: Exception) -> None:
        self.failed = True
        self.runners.pop(provider, None)
        print(f"{self.case} {provider} left out: {error_line(error)}", flush=True)

    def _wrong(self, provider: str, model: Any, found: Tensor, gradients: dict[str, Tensor]) -> str:
        """Why a provider is not to be timed; "" where it is."""
        assert self._exact is not None
        expected, exact = self._exact
        if gradients.keys() != exact.keys():
            return f"is wrong: {len(gradients)} gradients, {len(exact)} expected"
        calls = [part.fastlora_calls for part in model.modules() if hasattr(part, "fastlora_calls")]
        if back := [each.last_reason for each in calls if each.stepped_back]:
            return f"is peft itself: {len(back)} layers step back, {back[0]}"
        bound = CLOSE * next(iter(self.off.values())) if self.off else BROKEN
        off = max(_off(found, expected), *(_off(gradients[name], exact[name]) for name in exact))
        if not off <= bound:
            return f"is {off:.2%} off fp32; {bound:.2%} are allowed"
        self.off[provider] = off
        return ""

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
        gc.collect()
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        model = self._model(provider)
        gc.collect()
        held = torch.cuda.memory_allocated() - before if self.device.type == "cuda" else 0
        casts = provider.startswith("peft")
        parameters = [(plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad]

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

        return Runner(self._graphed(model, parameters) if provider == "graphed" else step, model, held)

    def _graphed(self, model: Any, parameters: list[tuple[str, nn.Parameter]]) -> Callable[[], Any]:
        """As `step` in `_runner`; what it returns is overwritten by the next one."""
        found: list[Tensor] = []

        def loss(model: Any, batch: dict[str, Any]) -> Tensor:
            if self.whole:
                return model(**batch, labels=batch["input_ids"], use_cache=False).loss  # type: ignore[no-any-return]
            found[:] = [model(**batch, use_cache=False).last_hidden_state]
            return (found[0] * self.dy).sum()

        graphed = fastlora.GraphedStep(model, loss, warm_up=1)

        def step() -> tuple[Tensor, dict[str, Tensor]]:
            lost = graphed(input_ids=self.ids)
            gradients = {name: p.grad for name, p in parameters if p.grad is not None}
            for _, p in parameters:
                p.grad = None
            return lost if self.whole else found[0].detach(), gradients

        for _ in range(2):
            step()
        if graphed.reasons:
            raise RuntimeError(f"no graph: {', '.join(graphed.reasons.values())}")
        return step

    def _model(self, provider: str) -> Any:
        with default_dtype(torch.bfloat16), self.device:
            model: Any = (Qwen3ForCausalLM if self.whole else Qwen3Model)(self.config)
        generator = torch.Generator(self.device).manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.normal_(std=p.shape[1] ** -0.5, generator=generator)
        model.requires_grad_(False)
        if self.checkpointing:
            context = {"context_fn": fastlora.keep_linears} if provider in ("speed-up-kept", "graphed") else {}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **context})
        model.train()
        model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
        options: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS}
        packed = self.case.base == "nf4"
        if provider in ("fastlora", "speed-up", "speed-up-kept", "graphed"):
            fastlora.replace_linear(model, **options, quantize="nf4" if packed else None)
            if provider != "fastlora":
                fastlora.speed_up(model)
        else:
            if packed:
                to_nf4(model, expand=provider == "exact")
            if provider == "exact":
                model.float()
            model = peft.get_peft_model(model, peft.LoraConfig(**options))
            if provider == "peft-sped-up":
                fastlora.replace_linear(model)
        generator = torch.Generator(self.device).manual_seed(2)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters(), key=lambda item: plain_name(item[0])):
                if "lora_A" in name or "lora_B" in name:
                    p.normal_(std=p.shape[1] ** -0.5 * (0.1 if "lora_B" in name else 1.0), generator=generator)
        return model

    def measure(self) -> Iterator[list[Point]]:
        """Rows of the providers admitted, those of the times first; a line for each provider is printed."""
        walls: dict[str, list[float]] = {name: [] for name in self.runners}
        hosts: dict[str, list[float]] = {name: [] for name in self.runners}
        order, began = random.Random(0), time.monotonic()
        for turn in range(WARM_UP + ROUNDS):
            if turn >= WARM_UP + LEAST_ROUNDS and time.monotonic() - began > ROUNDS_S:
                break
            for name in order.sample(list(self.runners), len(self.runners)):
                try:
                    host, wall = self._time(self.runners[name])
                except Exception as error:
                    self._leave_out(name, error)
                    continue
                if turn >= WARM_UP:
                    hosts[name].append(host)
                    walls[name].append(wall)
        rows = {name: self._times(name, walls[name], hosts[name]) for name in self.runners}
        yield [point for points in rows.values() for point in points]
        for name in rows:
            try:
                rows[name] += (found := self._on_device(name))
                yield found
            except Exception as error:  # its times are kept
                self._leave_out(f"{name}'s device time", error)
            line = self._line(name, rows[name], rows.get("peft"))
            self.shown.append(line)
            print(line, flush=True)

    def _line(self, name: str, rows: list[Point], theirs: list[Point] | None) -> str:
        found = {(point.mode, point.metric): point.p50 for point in rows}
        line = f"{f'{self.case} {name}':<42}"
        for _, mode, metric, unit in CELLS:
            cell = f"{found[mode, metric] / unit:.{metric in ('time', 'host'):d}f}" if (mode, metric) in found else "-"
            line += f"{cell:>10}"
        share = f"{theirs[0].p50 / rows[0].p50:.2f}" if theirs else "-"
        return line + f"{share:>9}{self.off[name]:>8.2%}"

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

    def _times(self, name: str, walls: list[float], hosts: list[float]) -> list[Point]:
        return [
            self._point(name, "step", "time", *spread([each * 1e3 for each in walls])),
            self._point(name, "step", "host", *spread([each * 1e6 for each in hosts])),
            self._point(name, "step", "tokens_per_s", self.case.tokens / statistics.median(walls)),
        ]

    def _on_device(self, name: str) -> list[Point]:
        """The kernels' time, launches, the step's memory and the model's own; nothing on a CPU."""
        if self.device.type != "cuda":
            return []
        self.kernels[name] = kernels = self._profile(self.runners[name])
        found = [
            self._point(name, "kernels", "time", sum(us for _, us in kernels.values()) / 1e3),
            self._point(name, "step", "launches", sum(calls for calls, _ in kernels.values())),
        ]
        if name == "graphed":
            return found
        return [
            *found,
            self._point(name, "step", "peak_memory", self.peaks[name] / 1e6),
            self._point(name, "model", "peak_memory", self.runners[name].held / 1e6),
        ]

    def _point(
        self, name: str, mode: str, metric: str, p50: float, p20: float | None = None, p80: float | None = None
    ) -> Point:
        kernel = f"step_{self.case.model}{'' if self.checkpointing else '-kept'}_{self.case.base}"
        sizes = (self.case.tokens, self.config.hidden_size, self.config.intermediate_size, RANK)
        return Point(kernel, name, mode, metric, *sizes, p50, p20, p80)

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
