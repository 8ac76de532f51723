"""`bench train`: what it measures, what it writes, and when it fails."""

import argparse

import pytest
import torch

pytest.importorskip("peft")
from bench.cli import main
from bench.compare import train
from bench.measure import smollm2
from bench.measure.rows import read


def asked(*words):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--length", "16", "--steps", "3", *words])


def bench_of(*words):
    bench = train.Bench("tiny", asked(*words), torch.device("cpu"))
    bench.train()
    return bench


@pytest.mark.parametrize(("base", "share"), [("bf16", "0.5"), ("nf4", "1")])
def test_all_start_from_the_same_loss_and_follow_the_exact_run(base, share, tmp_path, capsys):
    """Over NF4, `peft` has the casts of prepare_model_for_kbit_training; fastlora has none, and is as exact."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    path, theirs = tmp_path / "train.csv", {"bf16": "peft-lean", "nf4": "peft"}[base]
    options = ("--base", base, "--providers", theirs, "in-place", "fastlora", "--share", share, "--lr", "2e-3")
    status = main(["train", "--device", "cpu", "--length", "16", "--steps", "4", "--out", str(path), *options])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert "losses: fastlora's are within" in shown
    rows = read([path])
    falls = {row.provider: row.p50 for row in rows if row.metric == "loss_fall"}
    assert falls.keys() == {"exact", theirs, "in-place", "fastlora"}
    assert falls["exact"] > 0.5
    assert falls["fastlora"] == pytest.approx(falls["exact"], rel=0.02)
    timed = {row.provider for row in rows if row.metric == "time"}
    assert timed == {"floor", theirs, "in-place", "fastlora"}
    assert {row.mode for row in rows if row.metric == "time"} == {"step" if share == "1" else "step-0.5"}


def test_the_ladder_has_the_rungs_that_run_here(capsys):
    bench = bench_of("--ladder", "--base", "bf16", "--checkpointing", "full", "--steps", "1", "--no-exact")
    assert list(bench.losses) == ["peft-lean", "linears", "loss", "kept"]
    first = [found[0] for found in bench.losses.values()]
    assert first == pytest.approx([first[0]] * 4, rel=1e-3)
    assert bench.report() is False


def test_losses_that_fall_short_fail_the_run(capsys):
    bench = bench_of("--providers", "fastlora", "--base", "bf16")
    bench.losses["fastlora"][-1] += 0.1 * bench.fall("exact")
    assert bench.report() is True
    assert "BEHIND: fastlora's fall is" in capsys.readouterr().out
    bench.losses["fastlora"][-1] = float("nan")
    assert bench.report() is True
    assert "NOT FINITE: fastlora" in capsys.readouterr().out


def test_a_provider_that_fails_leaves_the_others(monkeypatch, capsys):
    own = train.Bench.model

    def model(self, provider):
        if provider == "in-place":
            raise MemoryError("no room")
        return own(self, provider)

    monkeypatch.setattr(train.Bench, "model", model)
    bench = bench_of("--providers", "in-place", "fastlora", "--base", "bf16", "--no-exact", "--steps", "1")
    assert list(bench.times) == ["fastlora"]
    assert "in-place left out" in capsys.readouterr().out


def test_generate_says_how_far_all_agree_with_fp32(tmp_path, capsys):
    path = tmp_path / "generate.csv"
    options = ("--base", "bf16", "--samples", "2", "--prompt", "8", "--new", "4", "--rounds", "1")
    status = main(["generate", "--device", "cpu", "--out", str(path), *options])
    shown = capsys.readouterr().out
    assert status == 0, shown
    rows = read([path])
    assert {row.provider for row in rows} == {"peft-lean", "in-place", "fastlora"}
    assert all(row.p50 > 0 and row.M == 2 for row in rows)
    assert shown.count("%") == 3
    with pytest.raises(SystemExit):
        main(["generate", "--new", "0", "--out", str(path)])


@pytest.mark.parametrize("words", [("--steps", "0"), ("--share", "0"), ("--length", "1")])
def test_options_that_make_no_run_are_named(words, tmp_path):
    with pytest.raises(ValueError, match="must be above 0"):
        train.run(asked(*words, "--out", str(tmp_path / "x.csv")))


def test_a_model_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_SMOLLM2", str(tmp_path))
    with pytest.raises(ValueError, match=r"SmolLM2: .*(not installed: pip install gguf|is not there: python -m)"):
        smollm2.load(torch.float32)
