"""The peak memory of a training step of a whole model, counted without a GPU.

A model is built from its config with fake tensors, in bf16, its linears in NF4 with adapters in fp32. One step runs
(forward, backward, AdamW) while `bench.measure.tracker` counts what is allocated and freed, and says what is held at
the peak. Nothing is measured: rows are called counted-NAME and go to a file of their own.

    fastlora    NF4 linears with adapters, after `speed_up`; its launchers run as on a GPU of sm_90, unlaunched
    peft-lean   a model of peft over bitsandbytes, under autocast: a product with the expanded weight, a clone of its
                result, two products in bf16 and a sum; the rest is transformers' own code

    none        nothing is recomputed             selective   all but products and attention
    full        every layer, weights kept for its backward
    min         every layer, whose inputs wait on the host, and the loss 128 rows at a time

The optimizer's moments exist before the step, as from the second step on. Attention is torch's flash attention. Counted
besides tensors: cuBLAS's workspaces, which torch takes from its allocator, 32 MiB on sm_90 for each of the threads of
forward and backward. Not counted: the CUDA context, what the allocator cannot use, and the up to 1 MB by which it
gives out a larger block than asked for.

What an H100 measured is within 1% of the count: linears, and a step of Qwen3-0.6B by each provider, with the loss in
parts of 410 rows as it was then (tests/bench/compare/test_count.py).

"saved" is what a layer holds for backward: bytes a token, and the share of what peft-lean's holds without
checkpointing.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from bench.compare.whole_models import RANK, TARGETS, default_dtype
from bench.measure.record import COUNTED, RESULTS, Point, Recorder
from bench.measure.tracker import Tracker
from fastlora.layers import between, causal_loss
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model import checkpointing
from fastlora.ops import group, loss, operands
from fastlora.ops.nf4 import NF4Weight

SUMMARY = "the peak memory of a whole model's step, counted without a GPU; marked as counted"
PROVIDERS = ("fastlora", "peft-lean")
POLICIES = ("none", "selective", "full", "min")
_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256}
_QWEN = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' class, and what its config has
    "tiny": (
        "Llama",
        {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 2048},
    ),
    "llama3-8b": (
        "Llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, **_LLAMA},
    ),
    "llama3-70b": (
        "Llama",
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, **_LLAMA},
    ),
    "qwen3-0.6b": (
        "Qwen3",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "tie_word_embeddings": True, **_QWEN},
    ),
    "qwen3-8b": (
        "Qwen3",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, **_QWEN},
    ),
}  # fmt: skip
GOALS = {"llama3-8b": (6.5, 5.0), "llama3-70b": (44.0, 40.0)}  # GB: with a policy, and at the least; 2048 tokens, r 16
SHARE = 0.65  # of what peft-lean saves, at most, by "selective"
_ARCH = 90
_WORKSPACES = 2 * 2**25  # bytes: `getChosenWorkspaceSize` of ATen/cuda/CublasHandlePool.cpp
_BLOCKSIZE, _RUN = 64, 256  # of NF4's scales, as `fastlora.quantize` has them


class Counted(NamedTuple):
    """Bytes of a step."""

    peak: int
    at_peak: dict[str, int]  # by what they are
    before: int  # held when the step begins
    saved: int  # by a layer for backward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench count`."""
    named = ", ".join(MODELS)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama3-8b"], metavar="NAME", help=named)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--micro-batches", type=int, default=1, help="of --samples each, before an optimizer step")
    parser.add_argument("--r", type=int, default=RANK)
    parser.add_argument("--out", type=Path, default=RESULTS / "counted.csv", metavar="FILE", help="CSV to append to")


def run(arguments: argparse.Namespace) -> int:
    """Count, print and write.

    Raises:
        ValueError: a number that cannot be.
    """
    if min(arguments.samples, arguments.micro_batches, arguments.r) < 1 or arguments.length < 2:
        raise ValueError("--samples, --micro-batches and --r must be at least 1, --length at least 2")
    from bench.measure.unlaunched import unlaunched

    unlaunched(_ARCH)
    recorder = Recorder(arguments.out, f"sm_{_ARCH} by count")
    for name in arguments.model:
        found: dict[tuple[str, str], Counted] = {}
        for provider in arguments.providers:
            for policy in arguments.policies:
                if provider == "fastlora" or policy in ("none", "full"):
                    found[provider, policy] = count(name, provider, policy, arguments)
        recorder.write(_rows(name, found, arguments))
        _show(name, found, arguments)
        _judge(name, found, arguments)
    print(f"counted, not measured: rows appended to {recorder.path}")
    return 0


def count(name: str, provider: str, policy: str, asked: Any, fake: bool = True) -> Counted:
    """One model's step.

    Args:
        asked: samples, length, micro_batches, r.
        fake: by fake tensors; else the step is computed, on the CPU.
    """
    model = build(name, provider, policy, asked.r)
    with FakeTensorMode() if fake else nullcontext():
        give_memory(model)
        return step(model, provider, policy, asked)


def build(name: str, provider: str, policy: str, r: int) -> Any:
    """A provider's model in training mode, on the meta device."""
    facts = _facts(name)
    with default_dtype(torch.bfloat16), torch.device("meta"):
        model = _plain(name)
    model.requires_grad_(False)
    for path, linear in [item for item in model.named_modules() if item[0].rpartition(".")[2] in TARGETS]:
        parent, _, last = path.rpartition(".")
        with torch.device("meta"):
            base = NF4Linear(packed(*linear.weight.shape))
            adapted = (LoRALinear if provider == "fastlora" else _PeftLinear)(base, r)
        setattr(model.get_submodule(parent), last, adapted)
    if provider == "fastlora":
        for module in list(model.modules()):
            for part in between.find_parts(module):
                known: Any = between.facts_of(module, part) if part == "group" else facts[type(module), part]
                between.speed_up(module, part, known)
    with mock.patch.object(checkpointing, "_on_cuda", return_value=True):
        fastlora.checkpoint_layers(model, policy, offload=policy == "min")
    return model.train()


def _plain(name: str, **changed: Any) -> Any:
    import transformers

    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{"tie_word_embeddings": False, **sizes, **changed})
    config._attn_implementation = "sdpa"
    return getattr(transformers, f"{family}ForCausalLM")(config)


def give_memory(model: nn.Module) -> None:
    """Zeros in the place of what is on the meta device; parameters that are tied stay so."""
    found: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (cast(dict[str, Any], module._parameters), module._buffers):
            for name, t in list(tensors.items()):
                if t is not None and t not in found:
                    fresh = torch.zeros(t.shape, dtype=t.dtype)
                    found[t] = nn.Parameter(fresh, t.requires_grad) if isinstance(t, nn.Parameter) else fresh
                tensors[name] = None if t is None else found[t]


def _facts(name: str) -> dict[tuple[type, str], Any]:
    """(class, part) -> what its faster class must know, tried on a small model: a fake one cannot be tried."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 64}
    modules = _plain(name, **small, num_attention_heads=2, num_key_value_heads=1).modules()
    return {(type(m), part): between.facts_of(m, part) for m in modules for part in between.find_parts(m)}


def packed(n: int, k: int) -> NF4Weight:
    """A weight [N, K] of zeros, with nested scales."""
    blocks = -(n * k // -_BLOCKSIZE)
    codes, absmax = (torch.zeros(size, dtype=torch.uint8) for size in (n * k // 2, blocks))
    nested = (torch.zeros(size, dtype=torch.float32) for size in ((-(blocks // -_RUN),), (256,), ()))
    return NF4Weight(codes, absmax, (n, k), torch.bfloat16, _BLOCKSIZE, *nested)


class _PeftLinear(nn.Module):
    """What peft's `Linear4bit` allocates and saves, without dropout. base: holds the NF4."""

    def __init__(self, base: NF4Linear, r: int) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, 2.0
        self.lora_A = nn.Linear(base.in_features, r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        result = _Expanded.apply(x, self.base_layer.out_features).clone()
        return result + self.lora_B(self.lora_A(x)) * self.scaling  # type: ignore[no-any-return]


class _Expanded(torch.autograd.Function):
    """bitsandbytes' `MatMul4Bit`: the weight is expanded each way, and only its codes are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.shape = n, x.shape[-1]
        return x @ x.new_zeros(ctx.shape).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy @ dy.new_zeros(ctx.shape), None


def step(model: Any, provider: str, policy: str, asked: Any) -> Counted:
    """A step of a model, and what it holds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, foreach=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    shape = asked.samples, asked.length
    ids, places = torch.zeros(shape, dtype=torch.int64), torch.arange(asked.samples * (asked.length - 1))
    after: list[int] = []
    with Tracker("activations") as tracker, causal_loss.targets_known(places), _named(tracker, model, after, policy):
        _name_what_is_held(tracker, model, optimizer)
        tracker.hold([ids, places], "batch")
        tracker.add("cuBLAS workspaces", _WORKSPACES)
        before = tracker.total
        for _ in range(asked.micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=provider != "fastlora"):
                found = model(input_ids=ids, labels=ids, use_cache=False).loss
            with tracker.labelled("backward"):
                (found / asked.micro_batches).backward()
            del found
        with tracker.labelled("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        layers = len(model.model.layers)
        return Counted(tracker.peak, tracker.at_peak, before, (after[layers - 1] - after[0]) // (layers - 1))


def _name_what_is_held(tracker: Tracker, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    codes = [t for m in model.modules() if isinstance(m, NF4Linear) for t in m.weight.tensors() if t is not None]
    tracker.hold(codes, "NF4 weights")
    tracker.hold([p for p in model.parameters() if p.requires_grad], "adapters")
    for state in optimizer.state.values():
        tracker.hold([state["step"]], None)  # on the host
        tracker.hold([state["exp_avg"], state["exp_avg_sq"]], "moments")
    rest = {*model.parameters(), *model.buffers()} - {*codes}
    for t in rest:
        if not t.requires_grad:
            tracker.hold([t], f"{str(t.dtype).removeprefix('torch.')} weights")


@contextmanager
def _named(tracker: Tracker, model: Any, after: list[int], policy: str) -> Iterator[None]:
    """Inside, what is recomputed, made for the loss or an expanded weight, or kept as a gradient is named so.

    after: gets what is held after each layer's forward.
    """
    from transformers import masking_utils

    def named(label: str, function: Callable[..., Any], only_in: str = "") -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with tracker.labelled(label if only_in in ("", tracker.label) else tracker.label):
                return function(*args, **options)

        return call

    def recomputing(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return lambda run, *args, **options: checkpoint(named("recomputed", run, "backward"), *args, **options)

    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: after.append(tracker.total))
        if layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = recomputing(layer._gradient_checkpointing_func)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: tracker.hold([p.grad], "gradients"))
    values = dict.fromkeys(loss._VALUES, 0) if policy == "min" else loss._VALUES  # 0: the fewest rows
    with (
        mock.patch.object(operands, "nf4_expand", named("expanded weight", operands.nf4_expand)),
        mock.patch.object(group, "_joined", named("expanded weight", group._joined)),
        mock.patch.object(causal_loss, "linear_cross_entropy", named("loss", causal_loss.linear_cross_entropy)),
        mock.patch.object(loss, "_VALUES", values),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),  # nothing is packed
    ):
        yield


def _mode(policy: str, asked: Any) -> str:
    return f"step-{policy}" + (f"-{asked.micro_batches}x" if asked.micro_batches > 1 else "")


def _rows(name: str, found: dict[tuple[str, str], Counted], asked: Any) -> list[Point]:
    sizes = MODELS[name][1]
    at = asked.samples * asked.length, sizes["hidden_size"], sizes["intermediate_size"], asked.r
    case = f"train_{name}_nf4"
    return [
        Point(case, COUNTED + provider, _mode(policy, asked), "peak_memory", *at, counted.peak / 1e6)
        for (provider, policy), counted in found.items()
    ]


def _show(name: str, found: dict[tuple[str, str], Counted], asked: Any) -> None:
    tokens = asked.samples * asked.length
    print(f"\n{name}, nf4, r={asked.r}, {asked.micro_batches} x {asked.samples} x {asked.length} tokens: GB, counted")
    parts = sorted({part for each in found.values() for part in _large(each)})
    print(f"{'':<20}" + "".join(f"{f'{policy}':>12}" for _, policy in found))
    print(f"{'':<20}" + "".join(f"{provider:>12}" for provider, _ in found))
    for part in parts:
        print(f"{part:<20}" + "".join(f"{each.at_peak.get(part, 0) / 1e9:>12.3f}" for each in found.values()))
    print(f"{'peak':<20}" + "".join(f"{each.peak / 1e9:>12.3f}" for each in found.values()))
    print(f"{'above the start':<20}" + "".join(f"{(each.peak - each.before) / 1e9:>12.3f}" for each in found.values()))
    print(f"{'saved, B/token':<20}" + "".join(f"{each.saved / tokens:>12.0f}" for each in found.values()))
    if plain := found.get(("peft-lean", "none")):
        print(f"{'  of peft-lean':<20}" + "".join(f"{each.saved / plain.saved:>12.2f}" for each in found.values()))


def _judge(name: str, found: dict[tuple[str, str], Counted], asked: Any) -> None:
    """Print which goals hold, and what the least consists of where one does not."""
    ours = {policy: counted for (provider, policy), counted in found.items() if provider == "fastlora"}
    if name not in GOALS or not ours or _asked_for(asked) != (1, 2048, 1, RANK):
        return
    for goal, policies in zip(GOALS[name], (POLICIES, POLICIES[-1:]), strict=True):
        fitting = [policy for policy in policies if policy in ours and ours[policy].peak <= goal * 1e9]
        if fitting:
            print(f"goal {goal:g} GB: met by {fitting[0]}, {ours[fitting[0]].peak / 1e9:.2f}")
            continue
        policy = min((policy for policy in policies if policy in ours), key=lambda p: ours[p].peak, default="")
        if policy:
            least = ours[policy]
            said = ", ".join(f"{part} {least.at_peak[part] / 1e9:.2f}" for part in _large(least))
            print(f"goal {goal:g} GB: MISSED, the least is {least.peak / 1e9:.2f} ({policy}): {said}")
            print(f"    bound: {least.before / 1e9:.2f} are held before the step begins")
    plain = found.get(("peft-lean", "none"))
    if plain and "selective" in ours:
        share = ours["selective"].saved / plain.saved
        print(
            f"goal {SHARE:g} of what peft-lean saves: {'met' if share <= SHARE else 'MISSED'}, {share:.2f} (selective)"
        )


def _large(counted: Counted) -> list[str]:
    """What is at least a thousandth of the peak, the largest first."""
    parts = sorted(counted.at_peak.items(), key=lambda item: -item[1])
    return [part for part, size in parts if size >= counted.peak / 1000]


def _asked_for(asked: Any) -> tuple[int, ...]:
    return asked.samples, asked.length, asked.micro_batches, asked.r
