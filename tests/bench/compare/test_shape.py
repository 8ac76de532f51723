"""One kernel and shape: replays, and what an error of a provider or of the device does."""

import pytest
import torch

from bench.compare import shape
from bench.compare.providers import find_providers
from bench.compare.shape import DeviceLostError, Effort, ShapeBench
from bench.measure import cuda, timing
from bench.measure.floors import Rates
from bench.measure.operands import Problem

GPU = torch.device("cuda")


def test_graph_rows_take_the_time_of_a_replay_over_its_calls(monkeypatch):
    class FakeGraph:
        def __init__(self, call, count):
            self.count = count
            assert call(0).shape == (4, 96)

        def __call__(self, serial):
            pass

    problem = Problem("nf4_linear", 128, 96, 4, torch.device("cpu"))
    bench = ShapeBench(problem, find_providers(["torch", "fastlora-bf16"]), Effort(0.0, 1), Rates(1e9, 1e12), set())
    calls = bench.calls(4, 0.0, "decode")
    monkeypatch.setattr(cuda, "Graph", FakeGraph)
    monkeypatch.setattr(
        shape, "interleave", lambda *_: {f"{name}-graph": timing.Spread(8.0, 4.0, 16.0) for name in calls}
    )
    replayed = bench._replay(calls, 4)
    for name, call in calls.items():
        count = len(call.layers)
        assert replayed[name + "-graph"] == (8.0 / count, 4.0 / count, 16.0 / count)


def test_a_graph_that_cannot_be_captured_is_left_out(capsys):
    problem = Problem("nf4_linear", 128, 96, 4, torch.device("cpu"))
    bench = ShapeBench(problem, find_providers(["torch"]), Effort(0.0, 1), Rates(1e9, 1e12), set())
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert bench._replay(bench.calls(4, 0.0, "decode"), 4) == {}
    assert "LEFT OUT: torch-graph, nf4_linear 128x96 r=4 p=0 M=4 decode" in capsys.readouterr().err


def test_a_device_that_answers_no_more_is_told_from_a_provider_that_raises(monkeypatch):
    bench = ShapeBench.__new__(ShapeBench)
    bench.problem = Problem("nf4_linear", 128, 96, 4, GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bench._require_device("unsloth")

    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(DeviceLostError, match=r"after unsloth .* illegal memory access was encountered$"):
        bench._require_device("unsloth")
