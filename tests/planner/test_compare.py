"""Methods side by side on a tiny model: what is measured is what it says, and what is asked wrongly is refused."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.planner import compare
from fastlora.training import run as runs
from tests.support.runs import QUIET, make_base, recipe

TEXT = " ".join(f"w{i % 7}" for i in range(400))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _values(base: Path, **more):
    return {
        "model_name_or_path": str(base), "train_file": str(base / "train.jsonl"), "eval_file": str(base / "eval.jsonl"),
        "r": 4, "bf16": False, "use_cpu": True, "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4,
        **more,
    }  # fmt: skip


def test_every_method_is_measured_on_the_same_data(base: Path, tmp_path: Path) -> None:
    rows = compare.compare(_values(base), compare.METHODS, TEXT, tmp_path / "out", 1, QUIET)
    assert [row.method for row in rows] == list(compare.METHODS)
    dense = {row.loss_before for row in rows if row.method in ("lora", "houlsby", "full")}
    assert len(dense) == 1  # the same base before
    for row in rows:
        assert row.steps == 3
        assert row.step_seconds > 0
        assert row.latency > 0
        assert row.memory_is == "forecast"
        assert 0 <= row.exact <= 1
        assert row.file == (tmp_path / "out" / f"{row.method}-0" / compare_file(row.method)).stat().st_size
    assert {row.method for row in rows if row.latency_merged is not None} == {"lora", "full"}
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == list(compare.METHODS)
    assert json.loads((tmp_path / "out" / "compare.json").read_text())[0]["loss"] == rows[0].loss
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def compare_file(method: str) -> str:
    return {"full": "model.safetensors", "houlsby": "adapter.safetensors"}.get(method, "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_held_out_loss_exact_answers_and_general_loss_are_what_plain_torch_gives(
    base: Path, tmp_path: Path, method: str
) -> None:
    options = {"r": 16} if method != "lora" else {}
    made = recipe(base, tmp_path, method=method, eval_file=str(base / "eval.jsonl"), **options)
    run = runs.prepare(made, QUIET)
    run.model.eval()
    front, examples = run.method.virtual_tokens, run.eval_set
    losses, exact = [], 0
    for i in range(len(examples)):
        part = slice(*examples.offsets[i : i + 2])
        ids, labels = (torch.from_numpy(t[part].astype("int64")) for t in (examples.tokens, examples.labels))
        with torch.no_grad():
            logits = run.model(input_ids=ids[None]).logits[0, front:-1]
        wanted = labels[1:] != -100
        losses += F.cross_entropy(logits[wanted], labels[1:][wanted], reduction="none").tolist()
        exact += bool((logits.argmax(-1)[wanted] == labels[1:][wanted]).all())
    loss, share = compare._held_out(run)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert share == exact / len(examples)
    ids = run.tokenizer(TEXT, return_tensors="pt")["input_ids"][0][:128]
    one = " ".join(TEXT.split()[:128])
    with torch.no_grad():
        logits = run.model(input_ids=ids[None]).logits[0, front:-1]
    assert compare._general(run, one) == pytest.approx(float(F.cross_entropy(logits, ids[1:])), rel=1e-5)


def test_repeats_have_a_spread(base: Path, tmp_path: Path) -> None:
    rows = compare.compare(_values(base), ["prompt"], TEXT, tmp_path / "out", 2, QUIET)
    mean, by = compare.spread(rows, "loss")
    assert by > 0
    assert mean == pytest.approx((rows[0].loss + rows[1].loss) / 2)
    assert compare.spread(rows[:1], "loss")[1] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["ia3"]}, "methods: ia3; there are lora"),
        ({"methods": []}, "methods: none"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"general": " "}, "the text is empty"),
        ({"values": {"eval_file": None}}, "needs examples that are held out"),
        ({"values": {"max_step": 3}}, "unknown key"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_runs(
    base: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    asked = {"methods": ["lora"], "general": TEXT, "out": tmp_path / "out", "repeats": 1, "console": QUIET, **changes}
    asked["values"] = {**_values(base), **changes.get("values", {})}
    with pytest.raises(ValueError, match=said):
        compare.compare(**asked)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_not_written_into(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not empty"):
        compare.compare(_values(base), ["lora"], TEXT, base, 1, Console(quiet=True))


def test_the_command_prints_a_table(base: Path, tmp_path: Path) -> None:
    made = tmp_path / "mine.yaml"
    made.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in _values(base).items()))
    general = tmp_path / "general.txt"
    general.write_text(TEXT)
    words = [
        "compare",
        str(made),
        "--methods",
        "prompt,lora",
        "--general",
        str(general),
        "--out",
        str(tmp_path / "out"),
    ]
    found = CliRunner().invoke(app, [*words, "--rate", "prompt=0.05"])
    assert found.exit_code == 0, found.output
    assert "what tutorials print, not measured here" in found.output
    said = (tmp_path / "out" / "runs" / "prompt-0" / "recipe.yaml").read_text()
    assert "learning_rate: 0.05" in said
    wrong = CliRunner().invoke(app, [*words, "--rate", "ia3=1"])
    assert wrong.exit_code == 3
    assert "ia3 is no method" in wrong.output
