"""`python -m bench host`: every layer is timed in both modes, the way to the first product is counted."""

import os
import subprocess
import sys

import pytest
import torch

from bench.cli import main
from bench.compare import host
from bench.measure import record
from bench.measure.rows import read


@pytest.mark.filterwarnings("ignore")
def test_every_layer_in_both_modes(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "host.csv"
    assert main(["host", "--rounds", "2", "--calls", "2", "--steps", "--out", str(out)]) == 0
    rows = read([out])
    assert {row.mode for row in rows} == {"forward", "both"}
    assert {(row.metric, row.unit) for row in rows} == {("host", "us")}
    layers = {(row.kernel, row.provider) for row in rows}
    functions = {(f"{base}_linear", f"{what}-function") for base in ("bf16", "fp32") for what in ("empty", "torch")}
    ours = {(f"{base}_linear", f"fastlora-{adapters}") for base in ("bf16", "nf4") for adapters in ("fp32", "bf16")}
    peft = {("bf16_linear", "peft"), ("bf16_linear", "peft-sped-up")}
    assert layers == functions | ours | peft | {("fp32_linear", "fastlora-fp32")}
    assert len(rows) == 2 * len(layers)
    assert all(row.p50 > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "ops/linear.py lora_linear" in printed
    assert f"appended to {out}" in printed


def test_the_bare_function_computes_the_linear():
    weight = torch.randn(host.N, host.K, dtype=torch.float64)
    (candidate,) = (c for c in host._functions("fp64", weight) if c.provider == "torch-function")
    x, a, b = candidate.leaves
    expected = x @ (weight + 2.0 * b @ a).t()
    torch.testing.assert_close(candidate.call(x), expected)
    got = torch.autograd.grad(candidate.call(x), candidate.leaves, candidate.dy)
    torch.testing.assert_close(got, torch.autograd.grad(expected, candidate.leaves, candidate.dy))


def test_the_way_ends_at_the_first_product():
    candidate = next(c for c in host.make_candidates() if c.kernel == "nf4_linear")
    entered = host.way(candidate.call, candidate.leaves[0])
    assert entered[0] == ("fastlora/layers/lora_linear.py", "forward")
    assert ("fastlora/ops/linear.py", "lora_linear") in entered
    assert host.way(lambda x: x @ x.t(), candidate.leaves[0]) == []


def test_threads_are_as_before(tmp_path):
    before = torch.get_num_threads()
    with host.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_the_cuda_path_is_measured_without_a_gpu(tmp_path):
    """In a process of its own, which takes the CPU for a GPU: both bases, with and without dropout, every goal."""
    pytest.importorskip("triton")
    out = tmp_path / "host.csv"
    command = [sys.executable, "-m", "bench", "host", "--device", "cuda", "--rounds", "2", "--calls", "2", "--out", out]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read([out])
    assert {row.dropout for row in rows} == {0.0, 0.1}
    modes = {row.mode for row in rows if (row.kernel, row.provider) == ("nf4_linear", "fastlora-fp32")}
    assert modes >= {"forward", "both", "recompute", "reentrant", "non-reentrant"}
    for goal in ("launches forward", "launches backward"):
        (line,) = (line for line in done.stdout.splitlines() if goal in line)
        assert line.startswith("met"), line
    assert "recompute, us, in all" in done.stdout
