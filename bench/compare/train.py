"""Training of whole models by LoRA over NF4 or bf16: tokens/s, and whose losses follow the exact run.

    peft        peft and bitsandbytes as their documentation has it: `prepare_model_for_kbit_training`, autocast in bf16
    peft-lean   the same without `prepare_model_for_kbit_training`, whose casts to fp32 cost memory
    in-place    peft-lean's model after `fastlora.speed_up`
    liger       peft-lean's model with Liger-Kernel; on CUDA
    fastlora    `replace_linear` and `speed_up`
    exact       fp32 throughout over the same values, by plain torch; its losses are the truth. Not timed

`--ladder` adds the parts of `speed_up` one at a time: linears, norm, rotary, mlp, loss, group, then kept
(`keep_linears`, with checkpointing). Parts that run their own code on this device have no rung.

All start from the same A, with B zero, and take AdamW steps on one batch. The steps of all providers alternate, so a
machine that slows down slows all. "of floor" is the time of the bare bf16 products of a step and of its attention,
measured alone, over the step's; the recomputation that checkpointing asks for is in both. "peak MB" is what a step
takes above the model; on a CPU it is counted tensor by tensor in one more step, without what an operator takes inside
itself. "fall" is how far the loss fell, "of exact" its share of the exact run's fall; a provider that falls short of
peft's fails the run.

tiny and llama-57m have random weights, as have 0.6b to 70b (Qwen3 and Llama-3 by their sizes), whose losses say little;
smollm2 is real, and its batch is text (`python -m bench.measure.smollm2` fetches it).
"""

import argparse
import gc
import inspect
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from bench.compare.whole_models import RANK, TARGETS, default_dtype, plain_name, to_nf4
from bench.measure import smollm2
from bench.measure.operands import error_line, missing
from bench.measure.record import COUNTED, RESULTS, Point, Recorder
from bench.measure.timing import device_name, spread
from bench.measure.tracker import Tracker, unseen

SUMMARY = "training of whole models: tokens/s and losses, beside peft and the exact run"
PROVIDERS = ("peft", "peft-lean", "in-place", "liger", "fastlora")
PARTS = ("norm", "rotary", "mlp", "loss", "group")
RUNGS = ("linears", *PARTS, "kept")
_LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' class, and what its config has
    "tiny": ("Llama", {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, **_LLAMA}),
    "llama-20m": ("Llama", {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, **_LLAMA}),
    "llama-57m": ("Llama", {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9, **_LLAMA}),
    "smollm2": ("Llama", {}),
    "0.6b": ("Qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}),
    "1.7b": ("Qwen3", {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}),
    "4b": ("Qwen3", {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}),
    "8b": ("Qwen3", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}),
    "70b": ("Llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}),
}
_HEADS = {"0.6b": 16, "1.7b": 16, "4b": 32, "8b": 32, "70b": 64}
NEAR = 0.02  # of the exact run's fall: what two right runs may differ by, as rounding leads them apart


class Runner(NamedTuple):
    """A provider's model and optimizer, and one step of them, which returns the loss before the update."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: Callable[[], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench train`."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["tiny"], metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048 if on_cuda else 256, help="tokens of a sample")
    parser.add_argument("--share", type=float, default=1.0, help="of the tokens that are targets")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--checkpointing", choices=("none", "full", "kept"), default="none", help="kept: of fastlora")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument(
        "--ladder", action="store_true", help="add the parts of speed_up one at a time, after peft-lean"
    )
    parser.add_argument("--no-exact", action="store_true", help="no run in fp32, for models too large for it")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to append to (bench/results/DEVICE/train.csv)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; 1 where fastlora's losses fall short.

    Raises:
        ValueError: no CUDA device where one is asked for, or a model that is not there.
    """
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if not (arguments.steps > 0 and 0 < arguments.share <= 1 and arguments.samples > 0 and arguments.length > 1):
        raise ValueError("--steps and --samples must be above 0, --length above 1, --share in (0, 1]")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    place = "cpu" if device.type == "cpu" else device_name(device).lower().replace(" ", "-")
    recorder = Recorder(arguments.out or RESULTS / place / "train.csv", device_name(device))
    failed = False
    for name in arguments.model:
        bench = Bench(name, arguments, device)
        bench.train()
        recorder.write(bench.rows())
        failed |= bench.report()
        del bench
        gc.collect()
    print(f"rows appended to {recorder.path}")
    return int(failed)


class Bench:
    """One model: its providers built, their steps taken in turn."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.name, self.asked, self.device = name, arguments, device
        with default_dtype(torch.bfloat16), device:
            self.source, tokenizer = smollm2.load(torch.bfloat16) if name == "smollm2" else (_random(name), None)
        self.source.to(device)
        self.config = self.source.config
        shape = arguments.samples, arguments.length
        self.ids = _text(tokenizer, *shape) if tokenizer else torch.randint(0, self.config.vocab_size, shape)
        self.labels = self.ids.clone()
        self.labels[:, : round(arguments.length * (1 - arguments.share))] = -100
        self.ids, self.labels = self.ids.to(device), self.labels.to(device)
        self.losses: dict[str, list[float]] = {}
        self.times: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.floor = _floor(self.config, self.labels, arguments.checkpointing == "full", device)

    def train(self) -> None:
        """The exact run, then all others step by step in turn."""
        if not self.asked.no_exact:
            exact = self._runner("exact")
            self.losses["exact"] = [exact.step() for _ in range(self.asked.steps + 1)]
            del exact
        runners = {}
        for provider in self.providers():
            gc.collect()
            try:
                runners[provider] = self._runner(provider)
                self.losses[provider], self.times[provider] = [], []
            except Exception as error:  # out of memory, or a package's own: the others go on
                print(f"{self.name} {provider} left out: {error_line(error)}", flush=True)
        order = random.Random(0)
        for number in range(self.asked.steps + 1):
            for provider in order.sample(list(runners), len(runners)):
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                began = time.perf_counter()
                self.losses[provider].append(runners[provider].step())
                if number:  # the first one compiles
                    self.times[provider].append(time.perf_counter() - began)
                if self.device.type == "cuda":
                    self.peaks[provider] = torch.cuda.max_memory_allocated() - held
        if self.device.type == "cpu":
            self.peaks = {provider: counted_peak(runner) for provider, runner in runners.items()}

    def providers(self) -> list[str]:
        """Those that were asked for and can run here; a line says why others cannot."""
        if self.asked.ladder:
            found, kept = ["peft-lean", *RUNGS], self.asked.checkpointing != "none"
            probe: Any = fastlora.replace_linear(_random("tiny").to(self.device), r=2, target_modules=TARGETS)
            fastlora.speed_up(probe)
            idle = {row.part for row in probe.fastlora_report.parts if not row.sped_up}
            found = [name for name in found if name not in idle and (kept or name != "kept")]
        else:
            found = list(self.asked.providers)
        packed = self.asked.base == "nf4"
        absent = {name: missing("bitsandbytes") for name in ("peft", "peft-lean", "in-place") if packed}
        absent["liger"] = missing("liger_kernel") or (None if self.device.type == "cuda" else "no CUDA device")
        for name in found:
            if reason := absent.get(name):
                print(f"{self.name} {name}: {reason}")
        return [name for name in found if not absent.get(name)]

    def _runner(self, provider: str) -> Runner:
        model = self.model(provider)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.asked.lr, weight_decay=0.0)
        casts = provider in ("peft", "peft-lean", "in-place", "liger")

        def step() -> float:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=casts):
                loss = model(input_ids=self.ids, labels=self.labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()  # type: ignore[no-any-return]

        return Runner(model, optimizer, step)

    def model(self, provider: str) -> Any:
        """A provider's model with its adapters, B zero, in training mode."""
        config = type(self.config)(**self.config.to_dict())
        config._attn_implementation = "sdpa"
        with default_dtype(torch.bfloat16), torch.device("meta"):
            model: Any = type(self.source)(config)
        model = model.to_empty(device=self.device)
        model.load_state_dict(self.source.state_dict())
        for buffers, theirs in zip(model.buffers(), self.source.buffers(), strict=True):
            buffers.copy_(theirs)
        model.tie_weights()
        model.requires_grad_(False)
        options: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS}
        packed, ours = self.asked.base == "nf4", provider == "fastlora" or provider in RUNGS
        if ours:
            fastlora.replace_linear(model, **options, quantize="nf4" if packed else None)
            if provider != "linears":
                last = len(PARTS) if provider not in PARTS else PARTS.index(provider) + 1
                fastlora.speed_up(model, **{part: place < last for place, part in enumerate(PARTS)})
        else:
            model = self._by_peft(model, provider, packed, options)
        self._checkpoint(model, provider)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters(), key=lambda item: plain_name(item[0])):
                if "lora_A" in name:
                    p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * (3 / p.shape[1]) ** 0.5)
        return model.train()

    def _by_peft(self, model: Any, provider: str, packed: bool, options: dict[str, Any]) -> Any:
        import peft

        if packed:
            to_nf4(model, expand=provider == "exact")
        if provider == "exact":
            model.float()
        if provider == "peft":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if provider == "liger":
            from liger_kernel.transformers import monkey_patch

            monkey_patch._apply_liger_kernel_to_instance(model)
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        if provider == "in-place":
            fastlora.speed_up(model)
        return model

    def _checkpoint(self, model: Any, provider: str) -> None:
        if self.asked.checkpointing == "none" or provider == "exact":
            return
        kept = (self.asked.checkpointing == "kept" and provider in ("fastlora", "in-place")) or provider == "kept"
        context = {"context_fn": fastlora.keep_linears} if kept else {}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **context})
        model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.ids.numel()

    def fall(self, provider: str) -> float:
        """How far the loss fell, in nats."""
        found = self.losses[provider]
        return found[0] - found[-1]

    def rows(self) -> list[Point]:
        """What was measured, as rows of the CSV."""
        at = (self.tokens, self.config.hidden_size, self.config.intermediate_size, RANK)
        case = f"train_{self.name}_{self.asked.base}"
        mode = {"none": "step", "full": "step-checkpointed", "kept": "step-kept"}[self.asked.checkpointing]
        mode += f"-{self.asked.share:g}" if self.asked.share < 1 else ""
        found = [Point(case, "floor", mode, "time", *at, self.floor * 1e3)]
        for name, times in self.times.items():
            middle = statistics.median(times)
            found.append(
                Point(
                    case, name, mode, "time", *at, *spread([t * 1e3 for t in times]), share_of_floor=self.floor / middle
                )
            )
            found.append(Point(case, name, mode, "tokens_per_s", *at, self.tokens / middle))
            if name in self.peaks:
                counted = "" if self.device.type == "cuda" else COUNTED
                found.append(Point(case, counted + name, mode, "peak_memory", *at, self.peaks[name] / 1e6))
        after = f"{self.asked.steps} steps at {self.asked.lr:g}"
        return [*found, *(Point(case, name, after, "loss_fall", *at, self.fall(name)) for name in self.losses)]

    def report(self) -> bool:
        """Print the table; True where one of fastlora's is too far from the exact run, or a loss is no number."""
        asked, theirs = self.asked, next((name for name in ("peft", "peft-lean") if name in self.times), None)
        print(
            f"\n{self.name}, {asked.base}, {asked.samples} x {asked.length} tokens, {asked.share:.0%} of them targets, "
            f"checkpointing {asked.checkpointing}, rate {asked.lr:g}, {asked.steps} steps; floor "
            f"{self.floor * 1e3:.1f} ms"
        )
        heading = ("provider", "ms", "tokens/s", "of peft", "of floor", "peak MB", "first", "last", "fall", "of exact")
        print(f"{heading[0]:<12}" + "".join(f"{title:>10}" for title in heading[1:]))
        for name, found in self.losses.items():
            times = self.times.get(name)
            middle = statistics.median(times) if times else math.nan
            cells = [f"{middle * 1e3:.1f}", f"{self.tokens / middle:.0f}"] if times else ["-", "-"]
            cells.append(f"{statistics.median(self.times[theirs]) / middle:.2f}" if times and theirs else "-")
            cells.append(f"{self.floor / middle:.2f}" if times else "-")
            cells.append(f"{self.peaks[name] / 1e6:.0f}" if name in self.peaks else "-")
            cells += [f"{found[0]:.4f}", f"{found[-1]:.4f}", f"{self.fall(name):.4f}"]
            cells.append(f"{self.fall(name) / self.fall('exact'):.1%}" if "exact" in self.losses else "-")
            print(f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells))
        return self._verdict(theirs)

    def _verdict(self, theirs: str | None) -> bool:
        broken = [name for name, found in self.losses.items() if not all(map(math.isfinite, found))]
        if broken:
            print(f"NOT FINITE: {', '.join(broken)}")
            return True
        if "exact" not in self.losses:
            return False
        exact = self.fall("exact")
        off = {name: abs(self.fall(name) / exact - 1) for name in self.times}
        ours = [name for name in off if name not in ("peft", "peft-lean", "liger")]
        allowed = max(NEAR, off[theirs] if theirs else 0.0)
        behind = [name for name in ours if off[name] > allowed]
        for name in behind:
            print(f"BEHIND: {name}'s fall is {off[name]:.1%} off the exact run's; {allowed:.1%} are allowed")
        if ours and not behind:
            print(
                f"losses: fastlora's are within {max(off[name] for name in ours):.1%} of the exact run's fall", end=""
            )
            print(f", {theirs}'s within {off[theirs]:.1%}" if theirs else "")
        return bool(behind)


def counted_peak(runner: Runner) -> int:
    """Bytes that one more step holds at most above model, adapters and moments, counted tensor by tensor."""
    optimizer_states = [t for state in runner.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    with Tracker() as tracker, unseen():
        tracker.hold([*runner.model.parameters(), *runner.model.buffers(), *optimizer_states], None)
        runner.step()
    return tracker.peak


def _random(name: str) -> Any:
    import transformers

    family, sizes = MODELS[name]
    heads = {"num_attention_heads": _HEADS[name], "num_key_value_heads": 8} if name in _HEADS else {}
    vocabulary = {} if "vocab_size" in sizes else {"vocab_size": 151936 if family == "Qwen3" else 128256}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **vocabulary}, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def _text(tokenizer: Any, samples: int, length: int) -> Tensor:
    """Tokens of Python's standard library."""
    text = "".join(inspect.getsource(module) for module in (argparse, random, statistics))
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return tokens.repeat(-(-samples * length // len(tokens)))[: samples * length].view(samples, length)


def _floor(config: Any, labels: Tensor, again: bool, device: torch.device) -> float:
    """Seconds of the bare bf16 products of a step, those of a recomputation included, and of its attention."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    shapes = {(heads * size, hidden): 1, (hidden, heads * size): 1, (groups * size, hidden): 2, (inner, hidden): 2}
    shapes[hidden, inner] = shapes.get((hidden, inner), 0) + 1
    tokens, targets = labels.numel(), int((labels[:, 1:] != -100).sum())
    total = 0.0
    with default_dtype(torch.bfloat16), device:
        for (n, k), count in shapes.items():
            w, x, dy = torch.randn(n, k), torch.randn(tokens, k), torch.randn(tokens, n)
            total += layers * count * ((1 + again) * _seconds(lambda: F.linear(x, w)) + _seconds(lambda: dy @ w))  # noqa: B023
        w, x, dy = (
            torch.randn(config.vocab_size, hidden),
            torch.randn(targets, hidden),
            torch.randn(targets, config.vocab_size),
        )
        total += _seconds(lambda: F.linear(x, w)) + _seconds(lambda: dy @ w)
        samples, length = labels.shape
        q = torch.randn(samples, heads, length, size, requires_grad=True)
        k, v = (torch.randn(samples, groups, length, size, requires_grad=True) for _ in range(2))
        dy = torch.randn_like(q)

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)

        both = _seconds(lambda: torch.autograd.grad(attend(), (q, k, v), dy))
        total += layers * (both + again * _seconds(attend))
    return total


def _seconds(function: Callable[[], object], rounds: int = 5) -> float:
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
