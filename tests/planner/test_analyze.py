"""Singular values of updates, and adapters cut to a lower rank, which peft opens."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app
from fastlora.planner import analyze
from tests.methods.models import batch, tiny

peft = pytest.importorskip("peft")


def _adapter(folder, **options):
    model = tiny("llama")
    base = copy.deepcopy(model)
    fastlora.replace_linear(model, **{"r": 8, "lora_alpha": 16, **options})
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    fastlora.save_adapter(model, folder)
    return base, model


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 4}}]
)
def test_the_singular_values_are_those_of_the_dense_update(options, tmp_path):
    _, model = _adapter(tmp_path, **options)
    found = {update.name: update for update in analyze.analyze(tmp_path).updates}
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        a, b = (dict(layer.named_parameters())[f"lora_{letter}.default.weight"].detach() for letter in "AB")
        dense = layer.scaling["default"] * (b.double() @ a.double())
        wanted = torch.linalg.svdvals(dense)[: found[name].r]
        torch.testing.assert_close(torch.tensor(found[name].values, dtype=torch.float64), wanted, rtol=1e-6, atol=1e-9)
        assert found[name].norm == pytest.approx(float(dense.norm()), rel=1e-6)


def test_the_effective_rank_counts_equal_directions():
    one, four = (analyze.Update("x", 8, 1.0, values) for values in ([3.0] + [0.0] * 7, [2.0] * 4 + [0.0] * 4))
    assert one.effective_rank == pytest.approx(1)
    assert four.effective_rank == pytest.approx(4)
    assert (four.kept(2), one.kept(1)) == (0.5, 1.0)
    assert analyze.Update("x", 8, 1.0, [0.0] * 8).effective_rank == 0


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}]
)
def test_a_cut_adapter_is_the_nearest_of_its_rank_and_peft_opens_it(options, tmp_path):
    base, model = _adapter(tmp_path / "whole", **options)
    analyze.truncate(tmp_path / "whole", tmp_path / "cut", 3)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "cut")
    for name, layer in ((n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")):
        a, b = (dict(layer.named_parameters())[f"lora_{letter}.default.weight"].detach() for letter in "AB")
        dense = layer.scaling["default"] * (b.double() @ a.double())
        u, s, vh = torch.linalg.svd(dense)
        nearest = (u[:, :3] * s[:3]) @ vh[:3]
        found = theirs.base_model.model.get_submodule(name).get_delta_weight("default").double()
        torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-6)
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "cut")
    given = batch(base)
    torch.testing.assert_close(ours.eval()(**given).logits, theirs.eval()(**given).logits, rtol=1e-4, atol=1e-5)


def test_cut_to_its_own_rank_nothing_changes(tmp_path):
    base, model = _adapter(tmp_path / "whole")
    analyze.truncate(tmp_path / "whole", tmp_path / "same", 8)
    again = fastlora.load_adapter(base, tmp_path / "same")
    given = batch(base)
    torch.testing.assert_close(again.eval()(**given).logits, model.eval()(**given).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_is_refused(tmp_path):
    _adapter(tmp_path / "whole")
    for r in (0, 9):
        with pytest.raises(ValueError, match="the rank must be 1 to 8"):
            analyze.truncate(tmp_path / "whole", tmp_path / "cut", r)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="exists already"):
        analyze.truncate(tmp_path / "whole", tmp_path / "whole", 2)
    dora = peft.get_peft_model(tiny("llama"), peft.LoraConfig(use_dora=True, target_modules=["q_proj"], r=4))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA: its magnitudes"):
        analyze.truncate(tmp_path / "dora", tmp_path / "cut", 2)
    prompt = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompt.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING has no A and B"):
        analyze.analyze(tmp_path / "prompt")


def test_the_command_prints_draws_and_cuts(tmp_path):
    _adapter(tmp_path / "whole")
    words = ["analyze", str(tmp_path / "whole"), "--truncate", "4", "--out", str(tmp_path / "cut")]
    found = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "map.png")])
    assert found.exit_code == 0, found.output
    assert "rank 4 keeps" in found.output
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 4
    held = json.loads(CliRunner().invoke(app, ["analyze", str(tmp_path / "whole"), "--json"]).stdout)
    assert len(held["layers"]) == 14
    assert 0 < held["kept"]["1"] < held["kept"]["4"] < 1
    for wrong in (["--truncate", "4"], ["--plot", "map.pdf"]):
        assert CliRunner().invoke(app, ["analyze", str(tmp_path / "whole"), *wrong]).exit_code == 3
