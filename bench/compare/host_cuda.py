"""The cost of a call on the CUDA path, with no GPU or with an idle one: see `bench.compare.host`, which runs this.

Without a GPU every launch ends in a stand-in that asks each tensor for its pointer (`bench.measure.pretend`), and
torch's products run on the CPU at a size with next to no arithmetic: 4 tokens, K = 64, N = 128, r = 16. The kernels are
those of many tokens, launched in as many parts as 4,096 tokens of a layer 4096 x 4096 are. What the driver takes for a
launch is not in it. On a GPU the layer is 4096 x 4096, and the calls are real.

fastlora-fp32, fastlora-bf16      `LoRALinear` with adapters of this dtype
peft-sped-up                      peft's layer after `fastlora.replace_linear`, adapters in fp32
peft                              peft's own layer, adapters in fp32, over a dense weight
torch-function                    three products in a bare autograd Function, over a dense weight, adapters in bf16
empty-function                    the floor: an autograd Function of the same tensors that computes nothing

forward         what backward needs is recorded
both            forward and backward
recompute       forward, and then forward and backward, as under checkpointing
reentrant, non-reentrant, selective     the same by `torch.utils.checkpoint`; selective: fastlora keeps its outputs

A goal is met or missed by NF4 with adapters in fp32, beside the Function of three products with 4 us added for each
call of a library that it would make on CUDA, its expansion of NF4 (three calls) included.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint

import fastlora
from bench.compare.call_cost import (
    Candidate,
    Cost,
    Counts,
    EmptyFunction,
    ThreeProducts,
    measure,
    one_thread,
    record,
    table,
)
from bench.measure.record import RESULTS
from bench.measure.timing import device_name

RANK, TOKENS = 16, 4
K, N = 64, 128
AS_FOR = 4096  # tokens, K and N that the launches are cut for
LIBRARY_US = 4.0  # of a call on CUDA that it does not have on a CPU
EXPANSION_CALLS = 3  # of bitsandbytes' expansion of NF4 with nested scales
MODES = ("forward", "both", "recompute", "reentrant", "non-reentrant", "selective")
PROVIDERS = ("fastlora-fp32", "fastlora-bf16", "peft-sped-up", "peft", "torch-function", "empty-function")
_FREE = ("view", "t", "transpose", "detach", "alias", "as_strided", "slice", "select", "expand", "unsqueeze", "empty",
         "empty_strided", "empty_like", "new_empty", "promote_types", "result_type", "view_as", "unbind", "narrow",
         "split", "split_with_sizes", "permute", "mT")  # fmt: skip
_BESIDE = "cpu/host-cuda-path.csv"  # where there is no GPU
_MAYBE = ("to", "contiguous", "reshape")


def run(rounds: int, calls: int, out: Path | None) -> int:
    """Measure with and without dropout, print the tables and the goals, append to the CSV."""
    device = prepare()
    place = device_name(device).lower().replace(" ", "-") + "/host.csv" if device.type == "cuda" else _BESIDE
    with one_thread():
        for dropout in (0.0, 0.1):
            candidates = make_candidates(device, dropout)
            work = [(c, mode, action) for c in candidates for mode, action in actions(c).items()]
            counts = {(c.kernel, c.provider, mode): count(action) for c, mode, action in work}
            costs = measure(work, rounds, calls)
            k, n = candidates[0].leaves[0].shape[1], candidates[0].dy.shape[1]
            print(f"\none linear {k} x {n}, {TOKENS} tokens, dropout {dropout:g}, launches for {device.type}")
            print(table(costs, MODES, PROVIDERS))
            print(_counts(counts))
            if not dropout:
                print("\n".join(goals(costs, counts)))
            print(record(costs, out or RESULTS / place, device, (TOKENS, k, n, RANK), dropout))
    return 0


def _counts(counts: dict[tuple[str, str, str], Counts]) -> str:
    columns = "Triton launches", "library calls", "allocations"
    lines = [f"{'kernel':<13}{'provider':<16}{'mode':<15}" + "".join(f"{column:>17}" for column in columns)]
    for (kernel, provider, mode), found in counts.items():
        if mode in ("forward", "both"):
            lines.append(f"{kernel:<13}{provider:<16}{mode:<15}" + "".join(f"{number:>17}" for number in found))
    return "\n".join(lines)


def prepare() -> torch.device:
    """The device that is measured: a GPU if there is one, else a CPU that passes for one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from fastlora.kernels import choice, lora

    from bench.measure.pretend import pretend

    pretend(90)
    plan, reads_twice = lora.plan, lora.reads_twice
    lora.plan = lambda op, m, length, *rest, **more: plan(op, AS_FOR, AS_FOR, *rest, **more)
    lora.reads_twice = lambda n, *rest: reads_twice(AS_FOR, *rest)
    choice._choices = lambda *_: ([choice.ANY_M], [choice.Choice("dequantize")])
    return torch.device("cpu")


def make_candidates(device: torch.device, dropout: float) -> list[Candidate]:
    """Every layer that is timed, all over one weight."""
    torch.manual_seed(0)
    k, n = (AS_FOR, AS_FOR) if device.type == "cuda" else (K, N)
    weight = torch.randn(n, k) * k**-0.5
    dense = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    dense.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    packed = fastlora.NF4Linear(fastlora.quantize(dense.weight.detach()))
    found = []
    for kernel, base in (("nf4_linear", packed), ("bf16_linear", dense)):
        for provider, dtype in (("fastlora-fp32", torch.float32), ("fastlora-bf16", torch.bfloat16)):
            layer = fastlora.LoRALinear(copy.deepcopy(base), RANK, 2 * RANK, dropout, adapter_dtype=dtype)
            found.append(_candidate(kernel, provider, layer.to(device)))
    found += _peft_candidates(dense, device, dropout)
    if not dropout:
        for provider, function in (("torch-function", ThreeProducts), ("empty-function", EmptyFunction)):
            found.append(_function(provider, function, dense.weight.detach().to(device)))
    return found


def _candidate(kernel: str, provider: str, layer: Any) -> Candidate:
    layer.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(std=RANK**-0.5)
    return Candidate(kernel, provider, layer, *_x_and_dy(a, b))


def _x_and_dy(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    x, dy = (torch.randn(TOKENS, n, dtype=torch.bfloat16, device=a.device) for n in (a.shape[1], b.shape[0]))
    return (x.requires_grad_(), a, b), dy


def _peft_candidates(dense: nn.Linear, device: torch.device, dropout: float) -> list[Candidate]:
    """peft's layer, as it is over a dense weight, and sped up over both, as far as packages are here."""
    try:
        import peft
    except ImportError:
        return []
    found = []
    for kernel, base in (("nf4_linear", _in_4_bits(dense)), ("bf16_linear", dense)):
        if base is None:
            continue
        holder: Any = nn.Module()
        holder.linear = copy.deepcopy(base).to(device)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["linear"]), holder
        )
        for adapter in (holder.linear.lora_A, holder.linear.lora_B):
            adapter.float()
        if kernel == "bf16_linear":
            found.append(_candidate(kernel, "peft", copy.deepcopy(holder).linear))
        sped_up = _candidate(kernel, "peft-sped-up", fastlora.replace_linear(holder).linear)
        sped_up.call(sped_up.leaves[0])
        if holder.linear.fastlora_calls.stepped_back:
            raise RuntimeError(f"the layer steps back to peft: {holder.linear.fastlora_calls.last_reason}")
        found.append(sped_up)
    return found


def _in_4_bits(dense: nn.Linear) -> nn.Module | None:
    """bitsandbytes' layer over the same weight; None without the package."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    options = {"bias": False, "quant_type": "nf4", "compute_dtype": torch.bfloat16}
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, **options)
    layer.weight = bnb.nn.Params4bit(dense.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cuda" if torch.cuda.is_available() else "cpu")


def _function(provider: str, function: Any, weight: Tensor) -> Candidate:
    shapes = (RANK, weight.shape[1]), (weight.shape[0], RANK)
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=weight.device, requires_grad=True) for shape in shapes)
    leaves, dy = _x_and_dy(a, b)
    grads = tuple(torch.zeros_like(leaf) for leaf in leaves)
    return Candidate("bf16_linear", provider, lambda x: function.apply(x, weight, a, b, grads), leaves, dy)


def actions(candidate: Candidate) -> dict[str, Callable[[], object]]:
    """What is timed in each mode. In the last three, gradients of A and B are added up, as in training."""
    call, leaves, dy = candidate.call, candidate.leaves, candidate.dy
    x, grad = leaves[0], torch.autograd.grad

    def recompute() -> object:
        call(x)
        return grad(call(x), leaves, dy)

    def checkpointed(**options: Any) -> Callable[[], object]:
        def step() -> None:
            checkpoint(call, x, **options).backward(dy)
            for leaf in leaves:
                leaf.grad = None

        return step

    found: dict[str, Callable[[], object]] = {
        "forward": lambda: call(x),
        "both": lambda: grad(call(x), leaves, dy),
        "recompute": recompute,
        "reentrant": checkpointed(use_reentrant=True),
        "non-reentrant": checkpointed(use_reentrant=False),
    }
    if candidate.provider.startswith("fastlora") and hasattr(fastlora, "keep_linears"):
        found["selective"] = checkpointed(use_reentrant=False, context_fn=fastlora.keep_linears)
    return found


def count(action: Callable[[], object]) -> Counts:
    """(launches of Triton's, calls of a library that launch a kernel on CUDA, allocations) of one call."""
    action()
    before = _launched()
    with _quiet(), profile(use_kineto=False, profile_memory=True) as found:
        action()
    launched = _launched() - before
    events = [event for event in found.function_events if event.name.startswith("aten::")]
    outermost = [event for event in events if not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))]
    library = sum(_launches(event) for event in outermost)
    return Counts(launched, library, sum(event.self_cpu_memory_usage > 0 for event in events))


def _launches(event: Any) -> bool:
    name = event.name[6:]
    return name not in _FREE and (name not in _MAYBE or _copies(event))


def _copies(event: Any) -> bool:
    """Whether `to`, `contiguous` or `reshape` has copied."""
    return any(child.name == "aten::copy_" or _copies(child) for child in event.cpu_children)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that torch's profiler writes to stderr."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _launched() -> int:
    if torch.cuda.is_available():
        return 0
    from bench.measure.pretend import launches

    return launches.number


def goals(costs: list[Cost], counts: dict[tuple[str, str, str], Counts]) -> list[str]:
    """A line for each goal, with what was found."""
    found = {(c.kernel, c.provider, c.mode): c.p50 for c in costs}
    real = torch.cuda.is_available()

    def ours(mode: str, provider: str = "fastlora-fp32") -> float:
        return found["nf4_linear", provider, mode]

    def theirs(mode: str) -> float:
        calls = {m: counts["bf16_linear", "torch-function", m].library for m in ("forward", "both")}
        if real:  # they are in the time
            calls = dict.fromkeys(calls, 0)
        forward = calls["forward"] + EXPANSION_CALLS
        both = calls["both"] + 2 * EXPANSION_CALLS
        number = {"forward": forward, "both": both}.get(mode, forward + both)
        return found["bf16_linear", "torch-function", mode] + LIBRARY_US * number

    lines = ["", "goals, one NF4 linear with adapters in fp32"]
    lines.append(_goal("forward, us", ours("forward"), theirs("forward")))
    for mode in ("recompute", "reentrant", "non-reentrant"):
        lines.append(_goal(f"{mode}, us", ours(mode), 1.2 * theirs(mode)))
    if ("nf4_linear", "fastlora-fp32", "selective") in found:
        lines.append(_goal("selective, us", ours("selective"), 1.2 * theirs("non-reentrant")))
    if not real:
        launched = {mode: counts["nf4_linear", "fastlora-fp32", mode] for mode in ("forward", "both")}
        total = {mode: each.launches + each.library for mode, each in launched.items()}
        lines.append(_goal("recompute, us, in all", ours("recompute"), 250))
        lines.append(_goal("launches forward", total["forward"], 4))
        lines.append(_goal("launches backward", total["both"] - total["forward"], 6))
    for kernel in ("nf4_linear", "bf16_linear"):
        if (kernel, "peft-sped-up", "recompute") in found:
            for mode in ("forward", "recompute"):
                least = found[kernel, "fastlora-fp32", mode]
                lines.append(_goal(f"in place, {kernel} {mode}, us", found[kernel, "peft-sped-up", mode], 1.15 * least))
    return lines


def _goal(name: str, found: float, limit: float) -> str:
    return f"{'met   ' if found <= limit else 'MISSED'} {name:<42}{found:8.1f}  at most {limit:.1f}"
