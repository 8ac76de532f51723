"""What `bench experts` and `bench options` share: a whole layer of peft's and the same layer sped up, timed in turn."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure.record import RESULTS, Recorder
from bench.measure.timing import device_name

CLOSE = 0.02


class RefusedError(ValueError):
    """A layer that is not to be timed: its result is wrong, or peft computes it."""


def add_layer_arguments(parser: argparse.ArgumentParser, command: str, budget_s: float, for_each: str) -> None:
    """Options that both commands have; `for_each` says what the budget is for."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a toy layer")
    parser.add_argument(
        "--budget", type=float, default=budget_s, metavar="S", help=f"seconds for each {for_each} ({budget_s:g})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"CSV to append to (bench/results/DEVICE/{command}.csv)"
    )


def open_recorder(arguments: argparse.Namespace, command: str) -> Recorder:
    """The CSV that the command appends to."""
    out = arguments.out or RESULTS / arguments.device / f"{command}.csv"
    return Recorder(out, device_name(torch.device(arguments.device)))


def forward_and_backward(layer: Any, x: Tensor, dy: Tensor, *others: Any, **named: Any) -> Callable[[int], object]:
    """One call of the layer and its backward, for `interleave`; gradients are dropped after it."""

    def both(serial: int) -> None:
        y = layer(x, *others, **named)
        y.backward(dy.to(y.dtype))
        x.grad = None
        layer.zero_grad()

    return both


def require_close(name: str, ours: Tensor, other: str, theirs: Tensor) -> None:
    """Raise RefusedError where two results differ by more than `CLOSE` of the second's norm."""
    ours, theirs = ours.float(), theirs.float()
    off = ((ours - theirs).norm() / theirs.norm()).item()
    if not off < CLOSE:
        raise RefusedError(f"{name}'s result is {off:.2%} off {other}'s; nothing is timed")
