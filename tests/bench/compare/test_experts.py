"""`python -m bench experts`: every provider is measured, and a wrong result is refused."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers.models.qwen3_moe")
experts = pytest.importorskip("bench.compare.experts")

from bench.cli import main  # noqa: E402
from bench.measure.rows import read  # noqa: E402


def test_a_layer_is_measured(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "experts.csv"
    assert main(["experts", "--device", "cpu", "--quick", "--budget", "0.1", "--out", str(out)]) == 0
    rows = read([out])
    assert [row.provider for row in rows] == list(experts.PROVIDERS)
    assert {(row.kernel, row.mode, row.M, row.K, row.N, row.R) for row in rows} == {
        ("experts_E4_top2", "both", 8, 64, 64, 16)
    }
    assert all(row.p50 > 0 for row in rows)
    assert "4 x 64 x 64, top 2" in capsys.readouterr().out


def test_a_wrong_layer_is_not_timed():
    class Wrong(nn.Module):
        def forward(self, x, chosen, weights):
            return layers["peft"](x, chosen, weights) * 1.05

    (stack,) = experts.STACKS["quick"]
    layers = experts.build(stack, torch.device("cpu"))
    layers["fastlora"] = Wrong()
    with pytest.raises(ValueError, match="off peft's; nothing is timed"):
        experts.measure(stack, layers, 8, torch.device("cpu"), 0.1)


def test_both_ways_of_a_stack_share_a_layer():
    class Layer(nn.Module):
        def forward(self, x):
            return experts.grouped_cuda.refusal(x, x.view(1, 2, 2), 1, None, None)

    layer = Layer()
    assert "torch's grouped_mm is asked for" in experts.ByTorch(layer)(torch.zeros(2, 2))
    assert "torch's grouped_mm is asked for" not in layer(torch.zeros(2, 2))
