"""Forecasts as a user asks for them: ranges, verdicts, ways to make a run fit, and models by any name."""

import json
import subprocess
import sys

import pytest

from fastlora.planner import forecast
from fastlora.planner.chart import draw
from fastlora.planner.gpus import CARDS, card
from fastlora.planner.models import resolve
from fastlora.planner.rules import rules_for

GB = 1e9
GIB = 2**30


def test_a_70b_model_in_nf4_fits_an_80_gb_card():
    found = forecast("llama-3-70b", method="qlora", gpu="a100-80gb")
    assert found.fits is True
    assert found.low < found.expected < found.high < found.card.memory
    assert found.ways == []
    assert sum(found.terms.values()) == found.expected


def test_what_does_not_fit_says_what_would():
    found = forecast("llama-3-70b", method="lora", gpu="a100-80gb")
    assert found.fits is False
    assert found.verdict == "does not fit"
    assert "method qlora" in dict(found.ways)
    for change, size in found.ways:
        assert size < found.card.memory, change


def test_several_changes_together_are_tried_when_none_is_enough():
    found = forecast("llama-3-8b", method="qlora", gpu="8gb", length=4096, batch=4, runtime="peft")
    assert found.fits is False
    assert all("," in change for change, _ in found.ways) or found.ways == []


def test_between_the_two_it_is_uncertain():
    found = forecast("llama-3-8b", gpu="80gb")
    edge = forecast("llama-3-8b", gpu=f"{found.expected / GIB:.2f}gb")
    assert edge.verdict == "uncertain"
    assert edge.fits is None


def test_a_runtime_that_was_measured_has_a_narrower_range():
    known, unknown = (forecast("llama-3-8b", runtime=name) for name in ("peft", "torchtune"))
    assert "measured cases" in str(known.evidence)
    assert "no measured run" in str(unknown.evidence)
    assert known.high / known.expected < unknown.high / unknown.expected


def test_stock_peft_needs_more_than_fastlora():
    peft, ours = (forecast("llama-3-8b", runtime=name, length=4096, batch=4).allocated for name in ("peft", "fastlora"))
    assert peft > 2 * ours


def test_models_are_found_by_folder_name_and_size(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve(str(tmp_path)).shape.hidden == 64
    assert "table of known models, llama-3-8b" in resolve("meta-llama/Meta-Llama-3-8B").source
    assert resolve("", "7B").shape.parameters == pytest.approx(7e9, rel=0.02)
    assert resolve("", "350M").shape.parameters == pytest.approx(350e6, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "wonder-9b"}, "no known model"),
        ({"params": "seven"}, "expected a number such as 7B"),
        ({"model": "llama-3-8b", "gpu": "rtx-9999"}, "rtx-9999' is not known; known are t4"),
        ({"model": "llama-3-8b", "method": "ia3"}, "method must be one of"),
        ({"model": "llama-3-8b", "dtype": "int4"}, "dtype must be one of bf16"),
        ({"model": "llama-3-8b", "targets": "wqkv"}, "wqkv not in this model"),
    ],
)
def test_what_is_asked_wrongly_is_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        forecast(**arguments)


def test_a_folder_without_or_with_a_broken_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: No such file"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100 80GB", "a100-80gb"),
        ("h100", "h100-80gb"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
    ],
)
def test_cards_are_found_however_they_are_written(name, known):
    assert card(name) is CARDS[known]


def test_the_rules_of_thumb_give_what_tutorials_print():
    rules = {
        rule.rule.split(" ")[0]: rule.size for rule in rules_for(forecast(params="70B", method="full").forecast.setup)
    }
    assert rules["16"] / 70 / GB == pytest.approx(16, rel=0.01)
    assert pytest.approx(91.3, abs=0.05) == 14 * 7e9 / GIB
    assert pytest.approx(912.7, abs=0.1) == 14 * 70e9 / GIB
    assert {rule.rule for rule in rules_for(forecast(params="7B").forecast.setup)} == {
        "0.6 GB a billion parameters, and 2 GB"
    }


def test_a_chart_is_drawn_as_png_and_svg_and_nothing_else(tmp_path):
    pytest.importorskip("matplotlib")
    found = forecast("llama-3-8b", gpu="rtx-4090")
    for suffix, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        draw(found, tmp_path / f"chart{suffix}")
        assert (tmp_path / f"chart{suffix}").read_bytes().startswith(begin)
    with pytest.raises(ValueError, match=r"a .png or a .svg"):
        draw(found, tmp_path / "chart.pdf")


def test_torch_is_not_loaded():
    heavy = "{'torch', 'triton', 'transformers'}"
    code = "import sys; from fastlora.planner import forecast; forecast('llama-3-8b', gpu='t4'); "
    code += f"print({heavy} & {{*sys.modules}})"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
