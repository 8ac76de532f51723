"""Recipes, data files and files of runs that are damaged in any way: read right, or refused in one line."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastlora.training import checkpoint, data, plots
from fastlora.training import recipe as recipes
from fastlora.training.loop import train
from tests.support import fuzz
from tests.support.runs import QUIET, recipe

TEMPLATE = (
    "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
ROWS: list[list[dict[str, Any]]] = [
    [{"text": "a b é"}, {"text": "c", "id": 1}],
    [{"prompt": "a", "completion": " b"}, {"prompt": "", "completion": "c"}],
    [
        {"messages": MESSAGES, "tools": [{"name": "x"}], "chat_template_kwargs": {"think": True}},
        {"messages": MESSAGES, "tools": json.dumps([{"name": "x"}])},
    ],
]


def test_recipes(tmp_path: Path) -> None:
    needed = {"model_name_or_path": "m", "train_file": "t", "eval_file": "e"}
    path = tmp_path / "r.yaml"

    def attempt(rng: random.Random) -> None:
        values = {**needed, **recipes.read(rng.choice(("demo", "qlora")))}
        if rng.random() < 0.5:
            recipes.from_mapping(fuzz.altered(values, rng))
        content = yaml.safe_dump(values, sort_keys=False).encode()
        path.write_bytes(fuzz.damaged(content, rng))
        override = fuzz.damaged(f"{rng.choice(list(values))}=[1, a]".encode(), rng).decode(errors="replace")
        found = recipes.load(path, [override] if rng.random() < 0.2 else [])
        path.write_text(found.to_yaml())
        assert recipes.load(path) == found

    fuzz.check_each("recipes", attempt)


def test_data_files(tmp_path: Path) -> None:
    words = ["<end>", "<unk>", "a", "b", "c"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )

    def attempt(rng: random.Random) -> None:
        rows = rng.choice(ROWS)
        if rng.random() < 0.5:
            rows = [fuzz.altered(row, rng) for row in rows]
        try:
            content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        except ValueError:  # an integer of thousands of digits, which json does not write
            content = b'{"text": ' + b"9" * 5000 + b"}"
        name = rng.choice(("t.jsonl", "t.json", "t.jsonl.gz"))
        if name == "t.json":
            content = b"[" + b",".join(content.splitlines()) + b"]"
        if rng.random() < 0.7:
            content = fuzz.damaged(content, rng)
        if name.endswith(".gz"):
            content = gzip.compress(content)
            content = fuzz.damaged(content, rng) if rng.random() < 0.5 else content
        (tmp_path / name).write_bytes(content)
        made = recipe(tmp_path, tmp_path / "run", train_file=str(tmp_path / name), max_length=8)
        found = data.load(made, tokenizer)
        assert found is not None
        assert len(found.tokens) == len(found.labels) == found.offsets[-1]
        assert ((found.labels == data.IGNORED) | (found.labels == found.tokens)).all()
        assert found.tokens.max() < len(words)

    fuzz.check_each("data files", attempt)


def test_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = "".join(plots.as_json({"step": step, "loss": 1 / step, "eval_loss": float("nan")}) + "\n" for step in (1, 2))

    def attempt(rng: random.Random) -> None:
        path.write_bytes(fuzz.damaged(rows.encode(), rng))
        path.write_text(checkpoint.metrics_until(path, 2))
        assert all(record["step"] <= 2 for record in plots.read_metrics(path))

    fuzz.check_each("metrics", attempt)


def test_states_of_checkpoints(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path / "run", save_steps=1, max_steps=1)
    train(made, console=QUIET)
    path = tmp_path / "run" / "checkpoint-1" / checkpoint.STATE_FILE
    whole = path.read_bytes()

    def attempt(rng: random.Random) -> None:
        state = json.dumps(fuzz.altered(json.loads(whole), rng)).encode() if rng.random() < 0.5 else whole
        path.write_bytes(fuzz.damaged(state, rng) if state == whole or rng.random() < 0.3 else state)
        _, found, _ = checkpoint.newest(tmp_path / "run")
        recipes.check_resumable(found["recipe"], made)
        assert (found["step"], found["processes"]) == (1, len(found["sha256"]) - 3)

    fuzz.check_each("states of checkpoints", attempt)
