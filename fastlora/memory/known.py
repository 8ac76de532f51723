"""Shapes of well-known models, from their published config.json, for a name where no config is at hand."""

import re

from fastlora.memory.shape import ModelShape, shape_of

_COLUMNS = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "num_local_experts",
    "num_experts_per_tok",
]
_TABLE = """
llama-2-7b           llama       4096 11008 32 32 32 128  32000 0 0 0
llama-2-13b          llama       5120 13824 40 40 40 128  32000 0 0 0
llama-2-70b          llama       8192 28672 80 64  8 128  32000 0 0 0
llama-3-8b           llama       4096 14336 32 32  8 128 128256 0 0 0
llama-3-70b          llama       8192 28672 80 64  8 128 128256 0 0 0
llama-3.1-8b         llama       4096 14336 32 32  8 128 128256 0 0 0
llama-3.1-70b        llama       8192 28672 80 64  8 128 128256 0 0 0
llama-3.1-405b       llama      16384 53248 126 128 8 128 128256 0 0 0
llama-3.2-1b         llama       2048  8192 16 32  8  64 128256 1 0 0
llama-3.2-3b         llama       3072  8192 28 24  8 128 128256 1 0 0
llama-3.3-70b        llama       8192 28672 80 64  8 128 128256 0 0 0
tinyllama-1.1b       llama       2048  5632 22 32  4  64  32000 0 0 0
smollm2-135m         llama        576  1536 30  9  3  64  49152 1 0 0
smollm2-360m         llama        960  2560 32 15  5  64  49152 1 0 0
smollm2-1.7b         llama       2048  8192 24 32 32  64  49152 1 0 0
deepseek-coder-1.3b  llama       2048  5504 24 16 16 128  32256 0 0 0
powerlm-3b           granite     2304  9216 40 36 36  64  49152 1 0 0
mistral-7b           mistral     4096 14336 32 32  8 128  32000 0 0 0
mistral-7b-v0.1      mistral     4096 14336 32 32  8 128  32000 0 0 0
mistral-7b-v0.3      mistral     4096 14336 32 32  8 128  32768 0 0 0
mistral-nemo         mistral     5120 14336 40 32  8 128 131072 0 0 0
mistral-small-24b    mistral     5120 32768 40 32  8 128 131072 0 0 0
mixtral-8x7b         mixtral     4096 14336 32 32  8 128  32000 0 8 2
mixtral-8x22b        mixtral     6144 16384 56 48  8 128  32768 0 8 2
qwen2.5-0.5b         qwen2        896  4864 24 14  2  64 151936 1 0 0
qwen2.5-1.5b         qwen2       1536  8960 28 12  2 128 151936 1 0 0
qwen2.5-3b           qwen2       2048 11008 36 16  2 128 151936 1 0 0
qwen2.5-7b           qwen2       3584 18944 28 28  4 128 152064 0 0 0
qwen2.5-14b          qwen2       5120 13824 48 40  8 128 152064 0 0 0
qwen2.5-32b          qwen2       5120 27648 64 40  8 128 152064 0 0 0
qwen2.5-72b          qwen2       8192 29568 80 64  8 128 152064 0 0 0
qwen3-0.6b           qwen3       1024  3072 28 16  8 128 151936 1 0 0
qwen3-1.7b           qwen3       2048  6144 28 16  8 128 151936 1 0 0
qwen3-4b             qwen3       2560  9728 36 32  8 128 151936 1 0 0
qwen3-8b             qwen3       4096 12288 36 32  8 128 151936 0 0 0
qwen3-14b            qwen3       5120 17408 40 40  8 128 151936 0 0 0
qwen3-32b            qwen3       5120 25600 64 64  8 128 151936 0 0 0
qwen3-30b-a3b        qwen3_moe   2048   768 48 32  4 128 151936 0 128 8
qwen3-235b-a22b      qwen3_moe   4096  1536 94 64  4 128 151936 0 128 8
gemma-2b             gemma       2048 16384 18  8  1 256 256000 1 0 0
gemma-7b             gemma       3072 24576 28 16 16 256 256000 1 0 0
gemma-2-2b           gemma2      2304  9216 26  8  4 256 256000 1 0 0
gemma-2-9b           gemma2      3584 14336 42 16  8 256 256000 1 0 0
gemma-2-27b          gemma2      4608 36864 46 32 16 128 256000 1 0 0
gemma-3-1b           gemma3_text 1152  6912 26  4  1 256 262144 1 0 0
gemma-3-4b           gemma3_text 2560 10240 34  8  4 256 262208 1 0 0
gemma-3-12b          gemma3_text 3840 15360 48 16  8 256 262208 1 0 0
gemma-3-27b          gemma3_text 5376 21504 62 32 16 128 262208 1 0 0
phi-3-mini           phi3        3072  8192 32 32 32  96  32064 0 0 0
phi-3-medium         phi3        5120 17920 40 40 10 128  32064 0 0 0
phi-4                phi3        5120 17920 40 40 10 128 100352 0 0 0
gpt-oss-20b          gpt_oss     2880  2880 24 64  8  64 201088 0 32 4
gpt-oss-120b         gpt_oss     2880  2880 36 64  8  64 201088 0 128 4
"""


def _rows() -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for line in _TABLE.strip().splitlines():
        name, family, *sizes = line.split()
        found[name] = dict(zip(_COLUMNS, [family, *map(int, sizes)], strict=True))
    found["santacoder"] = {
        "model_type": "gpt_bigcode", "n_embd": 2048, "n_inner": 8192, "n_layer": 24, "n_head": 16, "vocab_size": 49280,
        "n_positions": 2048,
    }  # fmt: skip
    return found


CONFIGS = _rows()


def known_config(name: str) -> dict[str, object] | None:
    """The config of a model by its name: `meta-llama/Meta-Llama-3-8B-Instruct` is llama-3-8b.

    A known name fits if all its words are in `name` in their order; of several the longest. None if none fits.
    """
    words = re.split(r"[-_]", name.lower().rpartition("/")[2])
    fitting = [known for known in CONFIGS if _in_order(known.split("-"), words)]
    return CONFIGS[max(fitting, key=len)] if fitting else None


def _in_order(wanted: list[str], words: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in wanted)


def known_shape(name: str) -> ModelShape | None:
    """The shape of a model by its name."""
    config = known_config(name)
    return None if config is None else shape_of(config)
