"""`python -m bench options`: every option is measured over both bases, and a wrong or slower path is refused."""

import pytest
import torch

from bench.cli import main
from bench.measure.rows import read

options = pytest.importorskip("bench.compare.options")


@pytest.mark.filterwarnings("ignore")
def test_every_option_over_both_bases(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "options.csv"
    assert main(["options", "--device", "cpu", "--quick", "--budget", "0.05", "--out", str(out)]) == 0
    rows = read([out])
    expected = {f"option_{what}_{base}" for what in options.OPTIONS for base in options.BASES}
    assert {row.kernel for row in rows} == expected
    assert len(rows) == 2 * len(expected)
    assert "mixed_8" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch):
    layers = options.build(options.OPTIONS["plain"], "bf16", 64, 96, torch.device("cpu"))
    layers["fastlora"].scaling["default"] *= 3
    with pytest.raises(options.RefusedError, match="off peft's; nothing is timed"):
        options.measure("plain", "bf16", layers, 8, torch.device("cpu"), 0.05)


def test_a_layer_that_steps_back_is_not_timed():
    layers = options.build(options.OPTIONS["plain"], "bf16", 64, 96, torch.device("cpu"))
    layers["fastlora"].base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(options.RefusedError, match="steps back to peft: the base layer has hooks"):
        options.measure("plain", "bf16", layers, 8, torch.device("cpu"), 0.05)


def test_the_others_are_measured_beside_one_that_is_refused(tmp_path, monkeypatch, capsys):
    real = options._require_same_results

    def check(layers, x, samples):
        if samples:
            raise options.RefusedError("no")
        real(layers, x, samples)

    monkeypatch.setattr(options, "_require_same_results", check)
    monkeypatch.setattr(options, "BASES", ("bf16",))
    out = tmp_path / "options.csv"
    words = ["options", "--device", "cpu", "--quick", "--budget", "0.05", "--option", "mixed_2", "plain"]
    assert main([*words, "--out", str(out)]) == 1
    assert {row.kernel for row in read([out])} == {"option_plain_bf16"}
    assert "mixed_2 over bf16, 8 tokens: no" in capsys.readouterr().out
