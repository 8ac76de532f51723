"""`bench steps`: toy models on the CPU go the way of the large ones."""

import csv

import pytest

from bench.cli import main
from bench.compare import steps

pytest.importorskip("peft")
pytest.importorskip("transformers")


def run(tmp_path, capsys, *options):
    out = tmp_path / "steps.csv"
    status = main(["steps", "--device", "cpu", "--quick", "--tokens", "24", "--out", str(out), *options])
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    return status, rows, capsys.readouterr().out


def test_every_provider_takes_the_step_of_peft(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    status, rows, shown = run(tmp_path, capsys)
    assert status == 0, shown
    timed = {(row["kernel"], row["provider"]) for row in rows if row["metric"] == "time"}
    kernels = {f"step_{model}_{base}" for model in steps.MODELS for base in ("nf4", "bf16")}
    assert timed == {(kernel, provider) for kernel in kernels for provider in steps.PROVIDERS}
    for row in rows:
        if row["metric"] == "host":
            assert float(row["p50"]) > 0
    assert len(rows) == 3 * len(timed)  # time, host, tokens a second


def test_a_step_that_is_off_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "CLOSE", 1e-9)
    options = ("--models", "qwen3-8b-4", "--bases", "bf16", "--providers", "peft", "fastlora")
    status, rows, shown = run(tmp_path, capsys, *options)
    assert status == 1
    assert "WRONG, not timed: qwen3-8b-4 bf16 24 tokens fastlora is" in shown
    assert {row["provider"] for row in rows} == {"peft"}


def test_a_provider_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    model = steps.Bench._model

    def failing(self, provider):
        if provider == "peft":
            raise RuntimeError("out of memory")
        return model(self, provider)

    monkeypatch.setattr(steps.Bench, "_model", failing)
    options = ("--models", "qwen3-0.6b", "--bases", "bf16", "--no-checkpointing")
    status, rows, shown = run(tmp_path, capsys, *options)
    assert status == 1
    assert "peft left out: " in shown
    assert "out of memory" in shown
    assert {row["provider"] for row in rows} == {"fastlora", "peft-sped-up"}


def test_nothing_begins_after_the_limit(tmp_path, capsys):
    status, rows, shown = run(tmp_path, capsys, "--limit", "-1")
    assert (status, rows) == (0, [])
    assert "stopped at the limit before qwen3-8b-4 nf4 24 tokens" in shown
