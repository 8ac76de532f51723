"""Counts of trained parameters: linear by linear, and backwards, from a printed count to what gives it."""

from collections.abc import Iterator
from typing import NamedTuple

from fastlora.memory import adapters
from fastlora.memory.shape import ModelShape

SETS = {  # names that are printed together
    "all-linear": (),
    "q_proj,v_proj": ("q_proj", "v_proj"),
    "q_proj,k_proj,v_proj,o_proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "q_proj,k_proj,v_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_proj,up_proj,down_proj": ("gate_proj", "up_proj", "down_proj"),
    "q_proj": ("q_proj",),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 100, 128, 160, 192, 256)
_BOTTLENECKS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_TOKENS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 30, 32, 40, 50, 64, 100, 128)


class Row(NamedTuple):
    """A linear's part. formula: with its figures."""

    name: str
    formula: str
    values: int


def rows(shape: ModelShape, r: int, targets: str, dora: bool = False) -> list[Row]:
    """LoRA's trained values, a row for each kind of linear, of all layers.

    Raises:
        ValueError: a name that the model does not have.
    """
    found = []
    for linear in adapters.targeted(shape, targets):
        each = r * (linear.n + linear.k) + (linear.n if dora else 0)
        copies = f" x {linear.copies} experts" if linear.copies > 1 else ""
        more = f" + {linear.n}" if dora else ""
        formula = f"{shape.layers} layers{copies} x ({r} x ({linear.n} + {linear.k}){more})"
        found.append(Row(linear.name, formula, shape.layers * linear.copies * each))
    if adapters.HEAD in targets.split(","):
        magnitudes = shape.vocabulary if dora else 0
        formula = f"{r} x ({shape.vocabulary} + {shape.hidden})" + (f" + {magnitudes}" if dora else "")
        found.append(Row(adapters.HEAD, formula, r * (shape.vocabulary + shape.hidden) + magnitudes))
    return found


def explain(shape: ModelShape, count: int) -> list[str]:
    """What gives exactly this many trained values, each as options of a command."""
    return [said for said, values in _all(shape) if values == count]


def _all(shape: ModelShape) -> Iterator[tuple[str, int]]:
    names = {linear.name for linear in shape.linears}
    for said, members in SETS.items():
        if not set(members) <= names:
            continue
        for head in ("", f",{adapters.HEAD}"):
            if head and said == "all-linear":
                said = ",".join(dict.fromkeys(linear.name for linear in shape.linears))
            for dora in (False, True):
                for r in RANKS:
                    values = adapters.lora(shape, r, said + head, dora)
                    yield f"LoRA, rank {r}, {said + head}{', DoRA' if dora else ''}", values
    for size in _BOTTLENECKS:
        yield f"Houlsby adapters of {size}", adapters.houlsby(shape, size)
    for tokens in _TOKENS:
        yield f"a prefix of {tokens} tokens", adapters.prefix(shape, tokens)
        yield f"a prompt of {tokens} tokens", adapters.prompt(shape, tokens)
    yield "every parameter", shape.parameters
