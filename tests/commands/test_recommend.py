"""`fastlora recommend`: what it prints and writes, and how it ends."""

import pytest
from typer.testing import CliRunner

from fastlora.cli import app


def _run(*words):
    return CliRunner().invoke(app, ["recommend", *words])


def test_a_plan_is_printed_with_its_evidence_and_written_as_a_recipe(tmp_path):
    data, recipe = tmp_path / "data.jsonl", tmp_path / "recipe.yaml"
    data.write_text('{"text": "hello"}\n' * 20)
    words = ("qwen3-0.6b", "--gpu", "rtx-4090", "--data", str(data), "--recipe", str(recipe))
    found = _run(*words)
    assert found.exit_code == 0, found.output
    assert "over 35 models" in found.output
    assert "one epoch: " in found.output
    assert "train_file" in recipe.read_text()
    again = _run(*words)
    assert again.exit_code == 3
    assert "exists already" in again.output


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["llama-3-70b", "--gpu", "24gb"], 1, "nothing fits this card"),
        ([], 3, "name a model"),
        (["llama-3-8b", "--gpu", "abacus"], 3, "'abacus' is not known"),
    ],
)
def test_the_exit_status_is_the_answer(words, status, said):
    found = _run(*words)
    assert found.exit_code == status, found.output
    assert said in found.output
