"""What a provider gives the bench: a layer for each copy of the weight, and the facts about itself.

forward     y with what backward needs recorded, as training runs it
backward    dx, dA and dB from a recorded y
both        one after the other
decode      y with nothing recorded, for a few tokens
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.operands import DEQUANTIZE, LINEAR_KERNELS, MODES, Operands, Problem, missing


class LoraLayer:
    """A provider's layer: `call` maps x [M, K] to y [M, N]; gradients go to x and to the adapters."""

    grad = True

    def __init__(self, call: Callable[[Tensor], Tensor], lora_a: Tensor, lora_b: Tensor) -> None:
        self.call, self.lora_a, self.lora_b = call, lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:
        """y [M, N]; what backward needs is recorded."""
        return self.call(x)

    def backward(self, y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """(dx [M, K], d_lora_a [R, K], d_lora_b [N, R]) from a recorded y, which is used up."""
        return torch.autograd.grad(y, (x, self.lora_a, self.lora_b), dy)

    def both(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """(y, dx, d_lora_a, d_lora_b)."""
        y = self.forward(x)
        return y, *self.backward(y, x, dy)

    def decode(self, x: Tensor) -> Tensor:
        """y [M, N], nothing recorded."""
        with torch.no_grad():
            return self.call(x)


class ServingLayer(LoraLayer):
    """Only forward, nothing recorded."""

    grad = False

    def forward(self, x: Tensor) -> Tensor:
        """y [M, N]."""
        return self.decode(x)


class Expansion(ServingLayer):
    """A weight [N, K] made dense, with or without the update; the x that `call` gets is ignored."""

    def __init__(self, expand: Callable[[], Tensor], lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__(lambda _: expand(), lora_a, lora_b)


class BareProduct(LoraLayer):
    """The floor: the products with W that every LoRA linear needs."""

    grad = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ, [M, N]."""
        return F.linear(x, self.weight)

    def backward(self, y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """(dy W [M, K],)."""
        return (dy @ self.weight,)

    def decode(self, x: Tensor) -> Tensor:
        """x Wᵀ, [M, N]."""
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class Provider:
    """An entry of the comparison.

    Args:
        build: operands -> one layer for each copy of the weight.
        adapter_dtype: dtype of A and B; None where there are none.
        modes: which of MODES it takes part in, for a linear kernel; `nf4_dequantize` has only forward.
        needs: packages that it needs for a kernel.
        fits: a further condition: problem -> "" or why it cannot take part.
        checked: whether its result is judged before it is timed; the floor is the baseline itself.
        least_m: fewest tokens it is timed at.
        ranks: whether it takes part with an update (R > 0), without (R = 0), or both; only for `nf4_dequantize`.
    """

    name: str
    build: Callable[[Operands], list[LoraLayer]]
    adapter_dtype: torch.dtype | None
    modes: tuple[str, ...] = MODES
    kernels: tuple[str, ...] = LINEAR_KERNELS
    needs: Callable[[str], tuple[str, ...]] = lambda kernel: ()
    fits: Callable[[Problem], str] = lambda problem: ""
    checked: bool = True
    least_m: int = 1
    ranks: str = "both"

    def modes_for(self, kernel: str) -> tuple[str, ...]:
        """The modes it takes part in, for a kernel."""
        return ("forward",) if kernel == DEQUANTIZE else self.modes

    def takes_part(self, problem: Problem) -> bool:
        """Whether there is anything to compare; whether it can run here is what `unavailable` says."""
        if problem.kernel == DEQUANTIZE and self.ranks != "both" and (self.ranks == "update") != (problem.R > 0):
            return False
        return problem.kernel in self.kernels

    def unavailable(self, problem: Problem) -> str | None:
        """Why it cannot take part on this machine; None where it can."""
        reasons = (missing(name) for name in self.needs(problem.kernel))
        return next((reason for reason in reasons if reason), None) or self.fits(problem) or None
