"""Rules of thumb that people quote, beside a forecast: what each one says of this model, and what it leaves out."""

from typing import NamedTuple

from fastlora.memory.forecast import Setup


class Rule(NamedTuple):
    """A rule, the bytes that it gives, and what it is about."""

    rule: str
    size: float
    leaves_out: str


def rules_for(setup: Setup) -> list[Rule]:
    """The rules that are quoted for a method, with the model's own number of parameters."""
    n = setup.shape.parameters
    if setup.method == "full":
        activations = "activations, logits"
        return [
            Rule("16 bytes a parameter (mixed precision, AdamW)", 16 * n, activations),
            Rule("20 bytes a parameter (the same with fp32 gradients)", 20 * n, activations),
            Rule("14 bytes a parameter (bf16 weights and gradients, AdamW, fp32 copy of part)", 14 * n, activations),
            Rule("4 + 4 + 8 bytes a parameter (fp32)", 16 * n, activations),
            Rule("4 times the fp16 weights", 8 * n, "activations; the moments are fp16 then"),
        ]
    if setup.method == "inference":
        return [Rule("2 bytes a parameter (fp16 weights)", 2 * n, "the cache of keys and values")]
    if setup.quantized:
        return [Rule("0.6 GB a billion parameters, and 2 GB", 0.6 * n + 2e9, "tokens, vocabulary, the runtime")]
    return [Rule("2 GB a billion parameters, and 2 GB", 2 * n + 2e9, "tokens, vocabulary, the runtime")]
