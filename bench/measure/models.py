"""Models that people fine-tune: their linear layers as (in_features, out_features), and the sizes of whole decoders.

Source: the `config.json` of meta-llama/Meta-Llama-3-8B and -70B, Qwen/Qwen2.5-7B, Qwen/Qwen3-8B and -0.6B,
mistralai/Mistral-7B-v0.3.
"""

from typing import NamedTuple

MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "llama-3-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "qwen2.5-7b": ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
    "mistral-7b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}


def model_shapes(names: list[str]) -> tuple[tuple[int, int], ...]:
    """The shapes of these models, each once.

    Raises:
        ValueError: an unknown model.
    """
    for name in names:
        if name not in MODEL_SHAPES:
            raise ValueError(f"no model called {name!r}; there are {', '.join(MODEL_SHAPES)}")
    return tuple(dict.fromkeys(shape for name in names for shape in MODEL_SHAPES[name]))


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x14336" -> (4096, 14336), in_features and out_features.

    Raises:
        ValueError: not two positive integers with an x between them.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--shapes takes in_features x out_features such as 4096x14336, not {text!r}")
    return int(parts[0]), int(parts[1])


class Decoder(NamedTuple):
    """A decoder's sizes, by the names of transformers' configs shortened."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    heads: int
    kv_heads: int
    vocab: int  # 0: without a head
    head_norms: bool  # of queries and keys
    head_dim: int = 128

    @property
    def groups(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The linears of a layer, (in_features, out_features), those that read the same x together."""
        h, i, q, kv = self.hidden, self.inner, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return ((h, q), (h, kv), (h, kv)), ((q, h),), ((h, i), (h, i)), ((i, h),)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """The same, one after another."""
        return tuple(shape for group in self.groups for shape in group)


DECODERS = {
    "qwen3-8b": Decoder(4096, 12288, 36, 32, 8, 151936, True),
    "qwen3-8b-4": Decoder(4096, 12288, 4, 32, 8, 0, True),  # four of its layers, as `bench.compare.steps` measures them
    "qwen3-0.6b": Decoder(1024, 3072, 28, 16, 8, 151936, True),
    "llama-3-8b": Decoder(4096, 14336, 32, 32, 8, 128256, False),
}
