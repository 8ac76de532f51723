"""A tiny model with data, and recipes for runs of it."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastlora.training import plots
from fastlora.training.recipe import Recipe, from_mapping

WORDS = 60
QUIET = Console(quiet=True)


def make_base(root: Path) -> Path:
    """A random Llama of two layers, a tokenizer with one token a word, and sentences of unequal length."""
    words = ["<end>", *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(root)
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root)
    generator = random.Random(0)
    for name, count in (("train", 22), ("eval", 6)):
        rows = []
        for _ in range(count):
            said = [f"w{generator.randrange(WORDS)}" for _ in range(generator.randint(2, 20))]
            rows.append({"prompt": said[0], "completion": " " + " ".join(said[1:])})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe(base: Path, out: Path, **values: Any) -> Recipe:
    return from_mapping(
        {
            "model_name_or_path": str(base),
            "train_file": str(base / "train.jsonl"),
            "output_dir": str(out),
            "r": 4,
            "bf16": False,
            "use_cpu": True,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "save_steps": None,
            **values,
        }
    )


def lines(out: Path, key: str = "loss") -> list[dict[str, float]]:
    return [record for record in plots.read_metrics(out / "metrics.jsonl") if key in record]


def losses(out: Path) -> list[tuple[float, float]]:
    return [(record["step"], record["loss"]) for record in lines(out)]
