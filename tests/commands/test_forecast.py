"""`fastlora forecast`: what it prints, and how it ends."""

import json

import pytest
from typer.testing import CliRunner

from fastlora.cli import app


def _run(*words):
    return CliRunner().invoke(app, ["forecast", *words])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["llama-3-70b", "--method", "qlora", "--gpu", "a100-80gb"], 0, "fits on a100-80gb"),
        (["llama-3-70b", "--method", "lora", "--gpu", "rtx-4090"], 1, "does not fit on rtx-4090"),
        (["llama-3-8b", "--method", "lora", "--gpu", "rtx-4090", "--seq", "4096", "--batch", "4"], 2, "uncertain on"),
        (["llama-3-8b"], 0, "in all, between"),
        ([], 3, "name a model"),
        (["llama-3-8b", "--optimizer", "lion"], 3, "optimizer must be one of"),
    ],
)
def test_the_exit_status_is_the_answer(words, status, said):
    found = _run(*words)
    assert found.exit_code == status, found.output
    assert said in found.output


def test_json_has_every_term_in_bytes():
    found = json.loads(_run("llama-3-8b", "--gpu", "24gb", "--json").stdout)
    names = [
        f"{name}_bytes"
        for name in (
            "weights",
            "adapters",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "scratch",
            "batch",
            "workspaces",
            "context",
            "slack",
        )
    ]
    assert sum(found[name] for name in names) == found["total_bytes"]
    assert found["fits"] is True
    assert found["trained_parameters"] == 41_943_040


def test_explain_shows_formulas_with_their_figures_and_the_largest_tensors():
    shown = _run("llama-3-8b", "--explain", "--runtime", "peft-lean", "--checkpointing", "none").stdout
    assert "6,979,321,856 weights / 2 + 109,051,904 scales" in shown
    assert "log-softmax = " in shown
    assert "bytes x 2,048 tokens" in shown


def test_time_and_price_are_marked_as_predicted():
    shown = _run("llama-3-8b", "--gpu", "a100-80gb", "--tokens", "1e7", "--price", "2").stdout
    assert shown.count("predicted: ") == 2
    assert "at 2 an hour and device" in shown
    assert "time: unknown" in _run("llama-3-8b", "--gpu", "24gb", "--tokens", "1e7").stdout
