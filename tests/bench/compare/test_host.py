"""`python -m bench host`: every layer is timed in both modes, the way to the first product is counted."""

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


def test_cuda_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["host", "--device", "cuda"])
    assert "measures on a CPU only" in capsys.readouterr().err


def test_an_older_bench_is_no_reason_to_fail(monkeypatch, tmp_path):
    monkeypatch.delitem(record.UNITS, "host")
    assert "not recorded" in host._record([], tmp_path / "host.csv", "cpu")
