"""Keys of other tools: each is answered by what it means here, never by a key that merely looks like it."""

import dataclasses
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from fastlora.training.foreign_keys import ALIASES, MEANINGS
from fastlora.training.recipe import Recipe, from_mapping

OURS = {field.name for field in dataclasses.fields(Recipe)}


def said(key: str) -> str:
    with pytest.raises(ValueError, match="unknown key") as error:
        from_mapping({"model_name_or_path": "m", "train_file": "t", key: True})
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("packing", "'packing': padding_free puts"),
        ("report_to", "'report_to': a run writes metrics.jsonl and loss.png into output_dir"),
        ("eval_strategy", "eval_steps says after how many steps"),
        ("resume_from_checkpoint", "--resume"),
        ("fp16", "bf16: true"),
        ("hub_private_repo", "a field of transformers' TrainingArguments that fastlora's recipes do not have"),
        ("use_dora", "a field of peft's LoraConfig that fastlora's recipes do not have"),
    ],
)
def test_a_key_is_answered_by_its_meaning(key: str, meaning: str) -> None:
    assert meaning in said(key)


@pytest.mark.parametrize("config", [TrainingArguments, LoraConfig, "trl"])
def test_no_field_of_theirs_is_taken_for_a_misspelling(config: Any) -> None:
    if config == "trl":
        config = pytest.importorskip("trl").SFTConfig
    for name in {field.name for field in dataclasses.fields(config)} - OURS - ALIASES.keys():
        assert "did you mean" not in said(name)
        assert name in MEANINGS or f"a field of {'transformers' if config is TrainingArguments else ''}" in said(name)


def test_the_tables_hold_no_key_of_ours_and_lead_to_keys_that_exist() -> None:
    assert not (MEANINGS.keys() | ALIASES.keys()) & OURS
    assert not MEANINGS.keys() & ALIASES.keys()
    assert set(ALIASES.values()) <= OURS
