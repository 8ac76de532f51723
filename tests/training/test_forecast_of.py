"""The forecast of a recipe, and what a run on a GPU writes beside it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.memory.forecast import forecast
from fastlora.memory.shape import shape_of
from fastlora.training import forecast_of, loop
from tests.support.runs import recipe


def _shape(base: Path):
    return shape_of(AutoConfig.from_pretrained(base).to_dict())


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"quantize": "nf4"}, {"quantized": "nf4-nested", "method": "lora", "runtime": "fastlora"}),
        ({"gradient_checkpointing": True}, {"checkpointing": "full"}),
        ({"gradient_checkpointing": "min"}, {"checkpointing": "offload"}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"targets": ("q_proj", "v_proj")}),
        ({"bf16": True}, {"width": 2, "autocast": False}),
        ({"bf16": True, "speed_up": False}, {"runtime": "peft-lean", "autocast": True}),
        ({"method": "full", "r": 16, "bf16": True}, {"width": 4, "autocast": True}),
        ({"method": "houlsby", "r": 16, "bottleneck": 8}, {"method": "houlsby", "bottleneck": 8}),
        ({"gradient_accumulation_steps": 3}, {"micro_batches": 3}),
    ],
)
def test_a_setup_is_what_the_recipe_says(base: Path, tmp_path: Path, values: dict, wanted: dict) -> None:
    setup = forecast_of.setup_of(recipe(base, tmp_path, **values), _shape(base), tokens=64)
    assert {key: getattr(setup, key) for key in wanted} == wanted
    assert setup.length * setup.batch >= 64
    assert forecast(setup).allocated > 0


def test_a_run_on_a_gpu_writes_what_it_measured(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 2**27)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 2**28)
    made, config = recipe(base, tmp_path, quantize="nf4"), AutoConfig.from_pretrained(base)
    forecast_of.write(tmp_path, made, config, torch.device("cuda"), 1, 64)
    facts = json.loads((tmp_path / "memory.json").read_text())
    assert facts["measured_allocated_bytes"] == 2**27
    assert sum(facts["forecast_terms"].values()) == facts["forecast_allocated_bytes"]
    found = CliRunner().invoke(app, ["forecast", "--calibrate", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "2.00 times that reserved" in found.output
    assert "1 runs, mean" in found.output
    unknown = AutoConfig.for_model("gpt2")
    forecast_of.write(tmp_path / "none", made, unknown, torch.device("cuda"), 1, 64)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", [None, "{", "{}", '{"forecast_allocated_bytes": 1, "measured_allocated_bytes": 0}'])
def test_a_folder_without_measurements_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "memory.json").write_text(text)
    found = CliRunner().invoke(app, ["forecast", "--calibrate", str(tmp_path)])
    assert found.exit_code == 3
    assert "memory.json" in found.output


def test_a_recipe_is_forecast(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe(base, tmp_path / "run", quantize="nf4").to_yaml())
    found = CliRunner().invoke(app, ["forecast", str(path), "--gpu", "t4"])
    assert found.exit_code == 0, found.output
    assert "fits on t4" in found.output
    path.write_text("r: 4\n")
    found = CliRunner().invoke(app, ["forecast", str(path)])
    assert found.exit_code == 3
    assert "model_name_or_path: missing" in found.output


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_a_run_that_runs_out_of_memory_says_what_needs_less(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(loop, "train", fails)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe(base, tmp_path / "run").to_yaml())
    found = CliRunner().invoke(app, ["train", str(path)])
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "ran out of memory" in said
    assert "The forecast was" in said
    assert "gradient_checkpointing: true (" in said
