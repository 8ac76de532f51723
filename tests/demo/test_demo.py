"""The demo: its recipe, its questions, and a run of a few steps from end to end."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from fastlora.demo import demo, stdlib_data

STEPS = 6


def test_recipe_takes_overrides_and_keeps_its_data_in_the_run(tmp_path: Path) -> None:
    recipe = demo.recipe_with_data([f"output_dir={tmp_path}/run", "max_steps=3"])
    assert recipe.max_steps == 3
    assert recipe.quantize == "nf4"
    assert recipe.target_modules == "all-linear"
    assert recipe.r == 16
    assert recipe.train_file == f"{tmp_path}/run/data/train.jsonl"
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        demo.recipe_with_data(["max_step=3"])


def test_nothing_evaluated_was_trained_on() -> None:
    train, held_out = (stdlib_data.instruction_pairs(half) for half in (False, True))
    assert len(train) > 1000
    assert len(held_out) > 100
    assert not {pair.module for pair in train} & {pair.module for pair in held_out}
    assert not {pair.completion for pair in train} & {pair.completion for pair in held_out}


def test_questions_are_spread_over_the_held_out_modules() -> None:
    pairs = demo._questions(stdlib_data.instruction_pairs(held_out=True))
    assert len({pair.module for pair in pairs}) == len(pairs) == demo.QUESTIONS
    assert all(stdlib_data.is_held_out(pair.module) for pair in pairs)


@pytest.mark.slow
def test_a_short_demo_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    overrides = [f"output_dir={out}", f"max_steps={STEPS}", "eval_steps=null"]
    console = Console(record=True, width=120, file=(tmp_path / "log").open("w"))
    demo.run(overrides, console=console)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert summary["peft_largest_difference"] <= demo.SAME_LOGITS * summary["peft_largest_logit"]
    assert summary["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert 0.01 < summary["trainable_parameters"] / summary["all_parameters"] < 0.1
    assert 1 < summary["perplexity_plain_source_before"] < 1000
    text = console.export_text()
    for said in ("linear layers replaced", "held-out loss", "has it forgotten?", "the same adapter in peft"):
        assert said in text
    assert text.count("reference answer") == text.count("model, before") == text.count("model, after") == demo.QUESTIONS

    demo.run(overrides, resume=True, console=console)  # of a run that is at its end: the same numbers again
    again = json.loads((out / "summary.json").read_text())
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}

    marker = (out / "metrics.jsonl").read_text()
    demo.run([*overrides[:1], "max_steps=1", *overrides[2:]], console=console)
    assert "is now in" in console.export_text()
    assert (tmp_path / "demo.previous" / "metrics.jsonl").read_text() == marker
    assert len(list(tmp_path.glob("demo*"))) == 2


def test_a_directory_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "data").mkdir()
    (out / "data" / "train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="already holds a run"):
        demo.run([f"output_dir={out}"], console=Console(quiet=True))
    assert (out / "adapter_config.json").read_text() == "{}"
    assert (out / "data" / "train.jsonl").read_text() == "mine"
    assert not (out / "recipe.yaml").exists()
