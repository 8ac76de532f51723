"""`generate` with the adapters on: tokens/s beside peft and bitsandbytes, greedy, with a cache.

The models and providers of `python -m bench train`, with B not zero. Rounds alternate. A run's tokens are new ones; its
time has the prompt's in it. "agree" is the share of tokens that are those of the exact run, in fp32 throughout, up to
the first that differs: two right runs in bf16 part where two tokens are nearly as likely.
"""

import argparse
import gc
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compare import train
from bench.compare.whole_models import RANK, plain_name
from bench.measure.operands import error_line
from bench.measure.record import RESULTS, Point, Recorder
from bench.measure.timing import device_name, spread

SUMMARY = "generate with the adapters on: tokens/s beside peft"
PROVIDERS = ("peft-lean", "in-place", "fastlora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench generate`."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_cuda else "cpu")
    parser.add_argument("--model", choices=train.MODELS, default="tiny", metavar="NAME", help=", ".join(train.MODELS))
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="prompts at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--no-exact", action="store_true", help="no run in fp32, for models too large for it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to append to (bench/results/DEVICE/generate.csv)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; 1 where a provider fails.

    Raises:
        ValueError: no CUDA device where one is asked for, a model that is not there, or no tokens.
    """
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if min(*arguments.samples, arguments.prompt, arguments.new, arguments.rounds) < 1:
        raise ValueError("--samples, --prompt, --new and --rounds must be above 0")
    place = "cpu" if device.type == "cpu" else device_name(device).lower().replace(" ", "-")
    recorder = Recorder(arguments.out or RESULTS / place / "generate.csv", device_name(device))
    bench = train.Bench(arguments.model, _as_train(arguments), device)
    models, failed = {}, False
    for provider in (*([] if arguments.no_exact else ["exact"]), *bench.providers()):
        gc.collect()
        try:
            models[provider] = _with_b(bench.model(provider))
        except Exception as error:  # out of memory, or a package's own: the others go on
            failed = True
            print(f"{arguments.model} {provider} left out: {error_line(error)}", flush=True)
    for samples in arguments.samples:
        ids = bench.ids[:, : arguments.prompt].repeat(samples, 1)
        recorder.write(_measure(arguments, bench, models, ids))
    print(f"rows appended to {recorder.path}")
    return int(failed)


def _as_train(arguments: argparse.Namespace) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    known = parser.parse_args(["--samples", "1", "--length", str(max(2, arguments.prompt))])
    vars(known).update(base=arguments.base, providers=arguments.providers, device=arguments.device)
    return known


def _with_b(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda item: plain_name(item[0])):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.eval()


def _measure(arguments: argparse.Namespace, bench: train.Bench, models: dict[str, Any], ids: Tensor) -> list[Point]:
    options = {"max_new_tokens": arguments.new, "min_new_tokens": arguments.new, "do_sample": False}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    exact = models["exact"].generate(ids, **options) if "exact" in models else None
    timed = [name for name in models if name != "exact"]
    times: dict[str, list[float]] = {name: [] for name in timed}
    agree: dict[str, float] = {}
    order = random.Random(0)
    for number in range(arguments.rounds + 1):
        for name in order.sample(timed, len(timed)):
            began = time.perf_counter()
            found = models[name].generate(ids, **options)
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first one compiles
                times[name].append(time.perf_counter() - began)
            if exact is not None:
                same = (found == exact)[:, ids.shape[1] :].long().cumprod(1)
                agree[name] = same.float().mean().item()
    tokens, at = len(ids) * arguments.new, (len(ids), bench.config.hidden_size, bench.config.intermediate_size, RANK)
    print(f"\n{arguments.model}, {arguments.base}, {len(ids)} x ({arguments.prompt} + {arguments.new}) tokens")
    print(f"{'provider':<12}{'ms':>10}{'tokens/s':>10}{'of peft':>10}{'agree':>10}")
    points = []
    for name in timed:
        middle = statistics.median(times[name])
        share = f"{statistics.median(times['peft-lean']) / middle:.2f}" if "peft-lean" in times else "-"
        said = f"{agree[name]:.0%}" if name in agree else "-"
        print(f"{name:<12}{middle * 1e3:>10.1f}{tokens / middle:>10.1f}{share:>10}{said:>10}", flush=True)
        case = f"generate_{arguments.model}_{arguments.base}"
        points.append(Point(case, name, "generate", "time", *at, *spread([t * 1e3 for t in times[name]])))
        points.append(Point(case, name, "generate", "tokens_per_s", *at, tokens / middle))
    return points
