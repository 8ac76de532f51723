"""The term "adapters": how many values each method trains, counted from shapes.

    LoRA      r (n + k) a linear [n, k]; DoRA n more                  arXiv:2106.09685, arXiv:2402.09353
    Houlsby   two a layer: 2 hidden b + b + hidden each                arXiv:1902.00751
    prefix    a key and a value a layer and virtual token, kv features each       arXiv:2101.00190
    prompt    hidden a virtual token                                  arXiv:2104.08691
    full      every parameter

An expert stack [experts, n, k] counts as many pairs as it has experts, as peft's `target_parameters` makes them.
"""

from collections.abc import Collection

from fastlora.memory.shape import Linear, ModelShape

METHODS = ("lora", "qlora", "full", "houlsby", "prefix", "prompt", "inference")
HEAD = "lm_head"


def targeted(shape: ModelShape, targets: Collection[str] | str) -> list[Linear]:
    """The linears of a layer that are meant; `all-linear` means all of them, and not the head.

    Raises:
        ValueError: a name that the model does not have; the message lists those that it has.
    """
    if targets == "all-linear":
        return list(shape.linears)
    names = {linear.name for linear in shape.linears}
    wanted = set(targets.split(",") if isinstance(targets, str) else targets)
    if missing := sorted(wanted - names - {HEAD}):
        raise ValueError(
            f"targets: {', '.join(missing)} not in this model, which has {', '.join(sorted(names))}, {HEAD}"
        )
    return [linear for linear in shape.linears if linear.name in wanted]


def lora(shape: ModelShape, r: int, targets: Collection[str] | str = "all-linear", dora: bool = False) -> int:
    """Trained values of LoRA."""
    a_layer = sum((r * (each.n + each.k) + (each.n if dora else 0)) * each.copies for each in targeted(shape, targets))
    wanted = targets.split(",") if isinstance(targets, str) else targets
    head = r * (shape.vocabulary + shape.hidden) + (shape.vocabulary if dora else 0) if HEAD in wanted else 0
    return shape.layers * a_layer + head


def houlsby_module(hidden: int, bottleneck: int) -> int:
    """Values of one adapter: down, up and their biases."""
    return 2 * hidden * bottleneck + bottleneck + hidden


def houlsby(shape: ModelShape, bottleneck: int) -> int:
    """Trained values of Houlsby adapters after attention and after the MLP."""
    return 2 * shape.layers * houlsby_module(shape.hidden, bottleneck)


def prefix(shape: ModelShape, tokens: int, projection: int = 0) -> int:
    """Trained values of prefix tuning. projection: hidden features of its MLP in training; 0: none."""
    width = 2 * shape.layers * shape.kv_features
    if not projection:
        return tokens * width
    return tokens * shape.hidden + (shape.hidden + 1) * projection + (projection + 1) * width


def prompt(shape: ModelShape, tokens: int) -> int:
    """Trained values of prompt tuning."""
    return tokens * shape.hidden
