"""Peak memory counted by fake tensors: the same as of a step that is computed, and as an H100 measured."""

import argparse
import csv
import json
import os
import subprocess
import sys

import pytest

from bench.compare import count
from bench.measure.record import RESULTS, ROOT
from fastlora.ops import linear

ASKED = argparse.Namespace(samples=2, length=64, micro_batches=2, r=16)
H100 = RESULTS / "nvidia-h100-80gb-hbm3"
_LINEAR = """
import json, sys
from bench.measure.unlaunched import unlaunched
unlaunched(90)
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.compare import count
from bench.measure.tracker import Tracker
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
peaks = {}
for k, n in ((4096, 4096), (4096, 12288), (12288, 4096)):
    with torch.device("meta"):
        layer = LoRALinear(NF4Linear(count.packed(n, k)), 16)
    with FakeTensorMode():
        count.give_memory(layer)
        x, dy = (torch.zeros(4096, size, dtype=torch.bfloat16) for size in (k, n))
        leaves = x.requires_grad_(), *layer.adapter()[:2]
        with Tracker() as tracker:
            tracker.hold([*layer.parameters(), *layer.buffers(), x, dy], None)
            torch.autograd.grad(layer(x), leaves, dy)
    peaks[f"{k} {n}"] = tracker.peak / 1e6
print(json.dumps(peaks))
"""
_STEP = """
import argparse
from bench.measure.unlaunched import unlaunched
unlaunched(90)
from bench.compare import count
from fastlora.ops import loss
loss._rows_at_a_time = lambda *_: 410  # as when it was measured
asked = argparse.Namespace(samples=2, length=2048, micro_batches=1, r=16)
for provider in count.PROVIDERS:
    found = count.count("qwen3-0.6b", provider, "full", asked)
    print(provider, (found.peak - found.before) / 1e6)
"""


@pytest.mark.parametrize(
    ("provider", "policy"),
    [
        ("fastlora", "none"),
        ("fastlora", "selective"),
        ("fastlora", "full"),
        ("peft-lean", "none"),
        ("peft-lean", "full"),
    ],
)
def test_a_fake_step_holds_what_a_computed_one_holds(provider, policy, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    monkeypatch.setattr(linear, "seen_by_others", lambda *_: False)  # so that what is inside the operator is seen
    fake, real = (count.count("tiny", provider, policy, ASKED, fake) for fake in (True, False))
    assert fake.before == real.before
    assert fake.saved == pytest.approx(real.saved, rel=0.02)
    assert fake.peak == pytest.approx(real.peak, rel=0.02)
    for part in {*fake.at_peak} | {*real.at_peak}:
        assert fake.at_peak.get(part, 0) == pytest.approx(real.at_peak.get(part, 0), rel=0.02, abs=2**14), part


def test_a_linear_holds_what_an_h100_measured():
    peaks = json.loads(_run("-c", _LINEAR))
    for shape, peak in peaks.items():
        k, n = shape.split()
        case = {"kernel": "nf4_linear", "provider": "fastlora-fp32", "mode": "both", "M": "4096", "K": k, "N": n}
        assert peak == pytest.approx(_measured("kernels.csv", **case, R="16", dropout="0"), rel=0.01)


@pytest.mark.slow
def test_a_step_holds_what_an_h100_measured():
    for line in _run("-c", _STEP).splitlines():
        provider, peak = line.split()
        case = {"kernel": "train_0.6b_nf4", "provider": provider, "mode": "step-checkpointed"}
        assert float(peak) == pytest.approx(_measured("train.csv", **case), rel=0.01)


def test_the_command_says_what_a_step_holds_and_marks_it_as_counted(tmp_path):
    out = tmp_path / "counted.csv"
    shown = _run(
        "-m", "bench", "count", "--model", "tiny", "--length", "64", "--providers", "fastlora", "--out", str(out)
    )
    assert "NF4 weights" in shown
    assert "counted, not measured" in shown
    rows = list(csv.DictReader(out.open()))
    assert {row["provider"] for row in rows} == {"counted-fastlora"}
    assert {row["metric"] for row in rows} == {"peak_memory"}
    peaks = {row["mode"]: float(row["p50"]) for row in rows}
    assert peaks["step-none"] > peaks["step-selective"] > peaks["step-full"] >= peaks["step-min"] > 0


def _run(*words: str) -> str:
    """What a process of its own prints: for a GPU's memory fastlora takes fake tensors for a GPU's, for good."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def _measured(file: str, **cells: str) -> float:
    """MB."""
    cells["metric"] = "peak_memory"
    with (H100 / file).open() as lines:
        rows = [row for row in csv.DictReader(lines) if cells.items() <= row.items()]
    return float(rows[-1]["p50"])
