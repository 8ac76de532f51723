"""The shape of a causal language model, from its config.json: which linears, norms and tables it has, and how large.

Nothing of transformers is loaded. `tests/memory/test_shape.py` builds each family with transformers on the meta device
and compares every parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYOUT = {  # model_type -> what differs from Llama
    "llama": "",
    "mistral": "",
    "qwen2": "qkv_bias",
    "qwen3": "qk_norm",
    "smollm3": "tied_by_default",
    "granite": "",
    "gemma": "gelu tied_by_default",
    "gemma2": "gelu tied_by_default four_norms softcap",
    "gemma3_text": "gelu tied_by_default four_norms qk_norm",
    "phi3": "joined",
    "mixtral": "experts",
    "qwen3_moe": "experts qk_norm",
    "gpt_oss": "experts expert_bias all_bias sinks router_bias",
    "gpt_bigcode": "gpt",
}


@dataclass(frozen=True)
class Linear:
    """A weight [n, k] of a layer. copies: of an expert, how many there are; at: the module that calls it."""

    name: str
    n: int
    k: int
    bias: bool = False
    copies: int = 1
    at: str = "self_attn"

    @property
    def weights(self) -> int:
        """Values of the weight, of all copies."""
        return self.n * self.k * self.copies

    @property
    def values(self) -> int:
        """Values of weight and bias, of all copies."""
        return (self.n * self.k + (self.n if self.bias else 0)) * self.copies


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal layers.

    Attributes:
        hidden, intermediate: features of the residual and inside the MLP (of one expert, where there are experts).
        linears: of one layer, in the order of their use, the router of experts left out.
        norms: values of a layer's norms; head_norms: of those over q and k, which are among them.
        others: values of a layer that are neither: a router, sinks.
        flags: the words of `LAYOUT`.
        positions: rows of a learned table of positions.
        experts, active: experts of a layer, and how many take a token.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    linears: tuple[Linear, ...]
    norms: int
    head_norms: int
    others: int
    flags: frozenset[str]
    positions: int = 0
    experts: int = 0
    active: int = 0

    @property
    def q_features(self) -> int:
        """Features of q."""
        return self.heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Features of k, and of v."""
        return self.kv_heads * self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies a gate with what it gates."""
        return "gpt" not in self.flags

    @property
    def embeddings(self) -> int:
        """Values of the tables of words and positions."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def head(self) -> int:
        """Values of lm_head that are not the embedding's."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def final_norm(self) -> int:
        """Values of the norm before lm_head."""
        return self.hidden * (2 if "gpt" in self.flags else 1)

    @property
    def in_linears(self) -> int:
        """Weights of the layers' linears, which are what quantization takes."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        biases = self.layers * sum(linear.values - linear.weights for linear in self.linears)
        rest = self.layers * (self.norms + self.others) + self.final_norm
        return self.in_linears + biases + rest + self.embeddings + self.head


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config describes.

    Args:
        config: config.json of a causal model, or of a model with `text_config`.

    Raises:
        ValueError: a family that is not in `LAYOUT`, or a size that is missing or no positive whole number.
    """
    config = {**config, **(config.get("text_config") or {})}
    family = str(config.get("model_type", ""))
    if family not in LAYOUT:
        known = ", ".join(sorted(LAYOUT))
        raise ValueError(f"model_type {family or '(missing)'}: its shape is not known here; known are {known}")
    flags = frozenset(LAYOUT[family].split())
    return _gpt(config, flags) if "gpt" in flags else _llama(config, family, flags)


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config: {name} must be a positive whole number, not {value!r}")
            return value
    if default is None:
        raise ValueError(f"config: {names[0]} is missing")
    return default


def _llama(config: Mapping[str, Any], family: str, flags: frozenset[str]) -> ModelShape:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    head_dim = _size(config, "head_dim", default=max(1, hidden // heads))
    experts = _size(config, "num_local_experts", "num_experts") if "experts" in flags else 0
    inner = (
        _size(config, "moe_intermediate_size", "intermediate_size") if experts else _size(config, "intermediate_size")
    )
    q, kv = heads * head_dim, kv_heads * head_dim
    every = bool(config.get("attention_bias", "all_bias" in flags))
    if family == "qwen2":
        every = False
    qkv, mlp_bias = every or "qkv_bias" in flags, bool(config.get("mlp_bias", False)) or "expert_bias" in flags
    at = "mlp.experts" if experts else "mlp"
    copies = experts or 1
    if "joined" in flags:
        attention = [Linear("qkv_proj", q + 2 * kv, hidden, qkv), Linear("o_proj", hidden, q, every)]
    else:
        inputs = [Linear(name, n, hidden, qkv) for name, n in zip(ATTENTION, (q, kv, kv), strict=False)]
        attention = [*inputs, Linear("o_proj", hidden, q, every)]
    up = [Linear(name, inner, hidden, mlp_bias, copies, at) for name in MLP[:2]]
    if "joined" in flags or experts:
        up = [Linear("gate_up_proj", 2 * inner, hidden, mlp_bias, copies, at)]
    down = Linear("down_proj", hidden, inner, mlp_bias, copies, at)
    head_norms = 2 * head_dim if "qk_norm" in flags else 0
    router = experts * hidden + (experts if "router_bias" in flags else 0)
    return ModelShape(
        family,
        hidden,
        inner,
        _size(config, "num_hidden_layers"),
        heads,
        kv_heads,
        head_dim,
        _size(config, "vocab_size"),
        bool(config.get("tie_word_embeddings", "tied_by_default" in flags)),
        (*attention, *up, down),
        hidden * (4 if "four_norms" in flags else 2) + head_norms,
        head_norms,
        router + (heads if "sinks" in flags else 0),
        flags,
        0,
        experts,
        _size(config, "num_experts_per_tok") if experts else 0,
    )


def _gpt(config: Mapping[str, Any], flags: frozenset[str]) -> ModelShape:
    hidden, heads = _size(config, "n_embd"), _size(config, "n_head")
    inner, head_dim = _size(config, "n_inner", default=4 * hidden), max(1, hidden // heads)
    kv_heads = 1 if config.get("multi_query", True) else heads
    linears = (
        Linear("c_attn", hidden + 2 * kv_heads * head_dim, hidden, True, at="attn"),
        Linear("c_proj", hidden, hidden, True, at="attn"),
        Linear("c_fc", inner, hidden, True, at="mlp"),
        Linear("c_proj", hidden, inner, True, at="mlp"),
    )
    return ModelShape(
        "gpt_bigcode", hidden, inner, _size(config, "n_layer"), heads, kv_heads, head_dim, _size(config, "vocab_size"),
        bool(config.get("tie_word_embeddings", True)), linears, 4 * hidden, 0, 0, flags, _size(config, "n_positions"),
    )  # fmt: skip
