"""Whether remembered launches are those that Triton would have made: `python -m tests.support.remembered CASES`.

Random calls of low-rank kernels, the expansion of NF4, DoRA's kernels, norms, rotary embedding, gated activations,
cross-entropy: all shapes, ranks, dtypes, strides, addresses, dropout, segments. Each is followed by calls that differ
from it in one of these. Each is launched twice, once by what the calls before it have left and once through Triton,
with the stand-in for a driver of `bench.measure.pretend`. Both must have the same kernel, grid and arguments.
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastlora.kernels import cross_entropy, dora, gated, lora, nf4, rms_norm, rotary
from fastlora.kernels.launch import Launcher
from fastlora.kernels.segments import Segments
from torch import Tensor

from bench.measure.pretend import launches, pretend
from fastlora.ops.nf4 import quantize

ARCH = 90
MODULES = cross_entropy, dora, gated, lora, nf4, rms_norm, rotary
LAUNCHERS = [value for module in MODULES for value in vars(module).values() if isinstance(value, Launcher)]
SIZES, RANKS = (1, 16, 130), (1, 16, 40)


class Case:
    """Named decisions at random; those of one name can be taken again, to see whether that alone is noticed."""

    def __init__(self, seed: int, again: str = "") -> None:
        self.seed, self.again = seed, again
        self.names: list[str] = []

    def pick(self, name: str, options: Sequence[Any]) -> Any:
        """One of the options."""
        self.names.append(name)
        return random.Random(f"{self.seed} {name} {name == self.again}").choice(options)

    def matrix(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Contiguous, a slice of a wider one, transposed, a column repeated, or at an odd address."""
        kind = self.pick(name, ("plain", "odd", "slice", "transposed", "repeated"))
        if kind == "slice":
            return torch.zeros(rows, 2 * columns, dtype=dtype)[:, ::2]
        if kind == "transposed":
            return torch.zeros(columns, rows, dtype=dtype).t()
        if kind == "repeated":
            return torch.zeros(rows, 1, dtype=dtype).expand(rows, columns)
        return torch.zeros(rows * columns + 1, dtype=dtype)[kind == "odd" :][: rows * columns].view(rows, columns)

    def call(self) -> Callable[[], object]:
        """A call, the same whenever it is repeated."""
        m, k, n = self.pick("m", (*SIZES, 4096)), self.pick("k", SIZES), self.pick("n", SIZES)
        r, dtype = self.pick("r", RANKS), self.pick("dtype", (torch.bfloat16, torch.float16, torch.float32))
        adapter = self.pick("adapter", (torch.float32, dtype))
        dropout = self.pick("dropout", (lora.Dropout(), lora.Dropout(0.25, torch.tensor([3]))))
        x, dy, h = self.matrix("x", m, k, dtype), self.matrix("dy", m, n, dtype), torch.zeros(m, r)
        a, b = self.matrix("a", r, k, adapter), self.matrix("b", n, r, adapter)
        scaling = self.pick("scaling", (1.0, 2.0, 0.3))
        kinds = ("shrink", "expand", "gradients", "fill", "segments", "norm", "rotary", "gated", "dora", "loss")
        kind = kinds[self.seed % len(kinds)]
        if kind == "dora":
            return self.dora(m, k, n, dy, a, b, scaling)
        if kind == "norm":
            weight, offset = torch.zeros(k, dtype=adapter), self.pick("offset", (0.0, 1.0))
            dx, rstd = self.matrix("dx", m, k, self.pick("dx dtype", (dtype, torch.float32))), torch.zeros(m)
            if self.pick("back", (True, False)):
                return lambda: rms_norm.backward(dx, x, weight, rstd, offset)
            return lambda: rms_norm.forward(x, weight, scaling, offset, self.pick("y dtype", (dtype, torch.float32)))
        if kind == "rotary":
            samples, size = self.pick("samples", (1, 2)), self.pick("size", (16, 24))
            q, keys = (self.matrix(name, m, size * heads, dtype) for name, heads in (("q", 3), ("keys", 2)))
            angles = torch.zeros(self.pick("angle rows", (1, samples)), m, size, dtype=adapter)
            shared, back = self.pick("shared", (False, True)), self.pick("back", (True, False))
            angles = angles[..., : size // 2] if shared else angles
            heads = [t.contiguous().view(1, m, -1, size).expand(samples, -1, -1, -1) for t in (q, keys)]
            return lambda: rotary.rotate(*heads, angles, angles, shared, back)
        if kind == "gated":
            gate, up = self.matrix("gate", m, n, dtype), self.matrix("up", m, n, dtype)
            act, back = self.pick("act", gated.ACTIVATIONS), self.pick("back", (True, False))
            return lambda: gated.backward(dy, gate, up, act) if back else gated.forward(gate, up, act)
        if kind == "loss":
            width = self.pick("width", (n, 2 * n))
            z, dz = torch.zeros(m, width, dtype=dtype)[:, :n], torch.zeros(m, n, dtype=adapter)
            labels, factor = torch.zeros(m, dtype=torch.int64), torch.ones(())
            cap, smoothing, ignored = (
                self.pick(name, options)
                for name, options in (("cap", (0.0, 30.0)), ("smoothing", (0.0, 0.1)), ("ignored", (-100, 16)))
            )
            dz = self.pick("no dz", (dz, None))
            return lambda: cross_entropy.cross_entropy(z, labels, scaling, cap, smoothing, ignored, factor, dz)
        if kind == "shrink":
            return lambda: lora.shrink(x, a, dropout, scaling)
        if kind == "expand":
            bias = self.pick("bias", (None, torch.zeros(n, dtype=dtype), torch.zeros(n)))
            return lambda: lora.expand(h, b, scaling, dtype, dropout, bias)
        if kind == "gradients":
            needs = self.pick("needs", ((x, h, True), (x, h, False), (None, h, True), (x, None, False)))
            return lambda: lora.gradients(dy, *needs[:2], a, b, scaling, dropout, needs[2])
        if kind == "fill":
            blocks, nested = self.pick("blocks", (64, 128)), self.pick("nested", (True, False))
            weight = quantize(torch.ones(n, k, dtype=dtype), blocks, nested)
            out = torch.zeros(n, k + self.pick("row", (0, 8, 1)), dtype=dtype)[:, :k]
            pair = self.pick("merge", ((a, b), (None, None)))
            return lambda: nf4.fill(weight, out, *pair, scaling)
        adapters = self.pick("adapters", (1, 2, 3))
        ends, facts = torch.linspace(m / adapters, m, adapters).int(), torch.zeros(adapters, 4)
        owner, facts = self.pick("owner", (None, torch.arange(adapters).int())), self.pick("facts", (None, facts))
        segments = Segments(ends, adapters, owner, facts)
        stack = torch.zeros(adapters, r, k, dtype=adapter)
        return lambda: lora.shrink(x, stack, lora.Dropout(), scaling, segments=segments)

    def dora(self, m: int, k: int, n: int, dy: Tensor, a: Tensor, b: Tensor, scaling: float) -> Callable[[], object]:
        """A call of one of DoRA's kernels."""
        which = self.pick("which", ("refresh", "norms", "scales", "rescale", "backward"))
        changed, factor = torch.zeros(1, dtype=torch.int32), torch.zeros(n)
        if which == "refresh":
            return lambda: dora.refresh(a.contiguous(), torch.zeros_like(a).contiguous(), changed)
        z, result = self.matrix("z", m, n, dy.dtype), self.pick("result", (dy.dtype, torch.float32))
        if which == "rescale":
            bias = self.pick("bias", (None, torch.zeros(n, dtype=dy.dtype), torch.zeros(n)))
            return lambda: dora.rescale(z, factor, bias, result)
        if which == "backward":
            needs = self.pick("needs", ((z, factor, True), (None, factor, False), (z, None, True)))
            return lambda: dora.rescale_backward(dy, *needs, result)
        blocks, nested = self.pick("blocks", (64, 128)), self.pick("nested", (True, False))
        whole = 128 if which == "scales" else k
        packed = quantize(torch.ones(n, whole), blocks, nested)
        if which == "scales":
            return lambda: dora.scaled_absmax(packed, factor)
        weight = self.pick("weight", (packed, self.matrix("w", n, k, dy.dtype)))
        return lambda: dora.row_norms(changed, weight, a, b, scaling, factor)


def made(action: Callable[[], object]) -> list[tuple[Any, ...]]:
    """What a call launches. Addresses of what it allocates differ from call to call: only their alignment is kept."""
    launches.kept = []
    action()
    found = []
    for function, grid, arguments in launches.kept:
        plain = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        found.append(
            (function, grid, [each % 16 if isinstance(each, int) and each > 1 << 24 else each for each in plain])
        )
    launches.kept = None
    return found


def compare(action: Callable[[], object], what: str) -> int:
    """Launch by memory and through Triton; the number of launches that were the same. Memory is as before."""
    remembered = made(action)
    kept = [dict(launcher._known) for launcher in LAUNCHERS]
    for launcher in LAUNCHERS:
        launcher.forget()
    by_triton = made(action)
    assert remembered == by_triton, f"{what}: {remembered}, but Triton launches {by_triton}"
    for launcher, known in zip(LAUNCHERS, kept, strict=True):
        launcher._known.update(known)
    return len(by_triton)


def main(cases: int) -> None:
    """Print how many launches were compared, and the kinds remembered."""
    pretend(ARCH)
    compared = 0
    for seed in range(cases):
        first = Case(seed)
        first.call()()
        sizes = [name for name in ("m", "k", "n", "r") if name in first.names]
        names = random.Random(seed).sample(sorted(set(first.names) - set(sizes)), 6)
        for again in ("", *sizes, *names):
            action = Case(seed, again).call()
            compared += compare(action, f"case {seed}, {again or 'repeated'}")
    print(compared, sum(len(launcher._known) for launcher in LAUNCHERS))


if __name__ == "__main__":
    main(int(sys.argv[1]))
