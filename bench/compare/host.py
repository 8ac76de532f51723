"""The cost of a call: the CPU time of one small LoRA linear, which is nearly all Python's and autograd's own.

K = 64, N = 128, r = 8, one token, one thread. At this size the arithmetic takes about a microsecond, so what is
measured is the way to it: modules, checks, autograd's bookkeeping, allocation.

fastlora-fp32, fastlora-bf16   `LoRALinear` with adapters of this dtype
peft                           peft's own layer, adapters in fp32
peft-sped-up                   the same layer after `fastlora.replace_linear`
empty-function                 the floor: an autograd Function of the same four tensors that computes nothing
torch-function                 torch's products (three forward, five backward) in a bare autograd Function, on a dense
                               weight, adapters in the dtype of x

`forward` records what backward needs; `both` is forward and backward. Every round times a block of calls of each
candidate by the thread's CPU clock, in a new random order; the median over rounds is reported, with the 20th and 80th
percentile. A second table counts the functions of fastlora that are entered before the first product.

`--device cuda` measures the CUDA path, with a GPU or without one: see `bench.compare.host_cuda`.
"""

import argparse
import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastlora
from bench.compare import host_cuda
from bench.compare.call_cost import Candidate, EmptyFunction, ThreeProducts, measure, one_thread, record, table
from bench.measure.record import RESULTS

SUMMARY = "the CPU time of a call: LoRALinear and peft's layer, and the way to the first product"
M, K, N, RANK = 1, 64, 128, 8
MODES = ("forward", "both")
_PROVIDERS = ("fastlora-fp32", "fastlora-bf16", "peft", "peft-sped-up", "empty-function", "torch-function")
_PRODUCTS = ("linear", "matmul", "mm", "addmm", "addmm_", "bmm", "__matmul__", "__rmatmul__")  # of torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench host`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=31, help="blocks timed of each candidate and mode (31)")
    parser.add_argument("--calls", type=int, default=200, help="calls in a block (200)")
    parser.add_argument("--steps", action="store_true", help="also list the functions entered before the first product")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV to append to (in bench/results)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and append to the CSV; returns the exit status.

    Raises:
        ValueError: fewer than one round or call.
    """
    if arguments.rounds < 1 or arguments.calls < 1:
        raise ValueError("--rounds and --calls must be at least 1")
    if arguments.device == "cuda":
        return host_cuda.run(arguments.rounds, arguments.calls, arguments.out)
    with one_thread():
        candidates = make_candidates()
        work = [(c, mode, _forward(c) if mode == "forward" else _both(c)) for c in candidates for mode in MODES]
        costs = measure(work, arguments.rounds, arguments.calls)
        ways = {
            f"{c.kernel} {c.provider}": way(c.call, c.leaves[0]) for c in candidates if "-function" not in c.provider
        }
        print(table(costs, MODES, _PROVIDERS))
        print(_ways(ways, arguments.steps))
        print(record(costs, arguments.out or RESULTS / "cpu" / "host.csv", torch.device("cpu"), (M, K, N, RANK)))
    return 0


def make_candidates() -> list[Candidate]:
    """Every layer that is timed, all over one weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * K**-0.5
    dense, wide = (_linear(weight.to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    packed = fastlora.NF4Linear(fastlora.quantize(dense.weight.detach()))
    found = []
    for kernel, base, dtype in (
        ("bf16_linear", dense, torch.bfloat16),
        ("nf4_linear", packed, torch.bfloat16),
        ("fp32_linear", wide, torch.float32),
    ):
        for adapter_dtype in dict.fromkeys((torch.float32, dtype)):
            layer = fastlora.LoRALinear(copy.deepcopy(base), RANK, 2 * RANK, adapter_dtype=adapter_dtype)
            name = "fastlora-fp32" if adapter_dtype is torch.float32 else "fastlora-bf16"
            found.append(_candidate(kernel, name, layer, dtype))
    found += _peft_candidates(dense)
    for kernel, base in (("bf16_linear", dense), ("fp32_linear", wide)):
        found += _functions(kernel, base.weight.detach())
    return found


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(K, N, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _candidate(kernel: str, provider: str, layer: Any, dtype: torch.dtype) -> Candidate:
    """A module with peft's names for its adapters, in train mode, B not zero."""
    layer.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_(std=RANK**-0.5)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    return Candidate(kernel, provider, layer, (x, a, b), torch.randn(M, N, dtype=dtype))


def _peft_candidates(dense: nn.Linear) -> list[Candidate]:
    """peft's layer as it is and sped up; none where peft is not installed."""
    try:
        import peft
    except ImportError:
        return []
    holder: Any = nn.Module()
    holder.linear = copy.deepcopy(dense)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["linear"])
    peft.inject_adapter_in_model(config, holder)
    sped_up: Any = fastlora.replace_linear(copy.deepcopy(holder))
    found = [
        _candidate("bf16_linear", "peft", holder.linear, torch.bfloat16),
        _candidate("bf16_linear", "peft-sped-up", sped_up.linear, torch.bfloat16),
    ]
    found[1].call(found[1].leaves[0])
    if sped_up.linear.fastlora_calls.stepped_back:
        raise RuntimeError(f"the layer steps back to peft: {sped_up.linear.fastlora_calls.last_reason}")
    return found


def _functions(kernel: str, weight: Tensor) -> list[Candidate]:
    """The two bare autograd Functions over a dense weight, adapters in its dtype."""
    dtype = weight.dtype
    found = []
    for provider, function in (("empty-function", EmptyFunction), ("torch-function", ThreeProducts)):
        x, a, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((M, K), (RANK, K), (N, RANK)))
        grads = tuple(torch.zeros_like(leaf) for leaf in (x, a, b))

        def call(x: Tensor, function: Any = function, a: Tensor = a, b: Tensor = b, grads: Any = grads) -> Tensor:
            return function.apply(x, weight, a, b, grads)

        found.append(Candidate(kernel, provider, call, (x, a, b), torch.randn(M, N, dtype=dtype)))
    return found


def _forward(candidate: Candidate) -> Callable[[], object]:
    call, x = candidate.call, candidate.leaves[0]
    return lambda: call(x)


def _both(candidate: Candidate) -> Callable[[], object]:
    call, leaves, dy = candidate.call, candidate.leaves, candidate.dy
    x, grad = leaves[0], torch.autograd.grad
    return lambda: grad(call(x), leaves, dy)


def way(call: Callable[[Tensor], Tensor], x: Tensor) -> list[tuple[str, str]]:
    """(file, function) of fastlora and its kernels, in the order entered, up to the first product of one forward.

    A product is one of torch's, or a call of fastlora's compiled library with operands. Where the library is not in
    use and torch computes, the way ends at torch's first product.
    """
    call(x)
    entered: list[tuple[str, str]] = []
    arrived = False

    def arrive() -> None:
        nonlocal arrived
        arrived = True

    def note(frame: FrameType, event: str, _: Any) -> None:
        place = _place(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if event == "call" and place and not arrived and (name == "<lambda>" or name[0] != "<"):
            entered.append((place, name))

    with _watched_library(arrive), _WatchedProducts(arrive):
        sys.setprofile(note)
        try:
            call(x)
        finally:
            sys.setprofile(None)
    return entered


def _place(file: str) -> str:
    """A file of fastlora or its kernels by its path in the source; "" for any other."""
    package = Path(fastlora.__file__).parent
    for root in (package / "kernels", package.parent / "kernels", package):
        if Path(file).is_relative_to(root):
            return str(Path(root.name) / Path(file).relative_to(root))
    return ""


class _WatchedProducts(TorchFunctionMode):
    """Says when Python calls one of torch's products."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        super().__init__()
        self.arrive = arrive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            self.arrive()
        return func(*args, **kwargs or {})


@contextmanager
def _watched_library(arrive: Callable[[], None]) -> Iterator[None]:
    """Says when Python calls a function with operands of fastlora's library; sys.setprofile does not see ctypes."""
    replaced: list[tuple[Any, str, Any]] = []

    def watched(function: Any) -> Callable[..., Any]:
        def called(*operands: Any) -> Any:
            arrive()
            return function(*operands)

        return called

    for library in [one for one in gc.get_objects() if type(one) is ctypes.CDLL and "fastlora" in str(one._name)]:
        for name, function in list(vars(library).items()):
            if name.startswith("fastlora_") and getattr(function, "argtypes", None):
                replaced.append((library, name, function))
                setattr(library, name, watched(function))
    try:
        yield
    finally:
        for library, name, function in replaced:
            setattr(library, name, function)


def _ways(ways: dict[str, list[tuple[str, str]]], in_full: bool) -> str:
    lines = ["", "Python of fastlora before the first product, one forward"]
    lines.append(f"{'layer':<29}{'files':>6}{'functions':>11}{'calls':>7}")
    for layer, entered in ways.items():
        files = {file for file, _ in entered}
        lines.append(f"{layer:<29}{len(files):>6}{len(set(entered)):>11}{len(entered):>7}")
        if in_full:
            lines += [f"    {file} {function}" for file, function in entered]
    return "\n".join(lines)
