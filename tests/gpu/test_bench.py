"""The bench on a CUDA device: events, graphs, launches, the allocator, and each peer that is installed."""

import csv
import functools
import math

import pytest
import torch

from bench.cli import main
from bench.compare import linear
from bench.compare.accuracy import Judge
from bench.compare.providers import PROVIDERS, find_providers
from bench.measure import cuda
from bench.measure.machine import gb_per_s, measure_machine, tflop_per_s
from bench.measure.operands import KERNELS, Problem, draw_inputs, make_operands
from bench.measure.timing import interleave

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def small_machine_check(monkeypatch):
    monkeypatch.setattr(linear, "measure_machine", functools.partial(measure_machine, size=1024))


def run_bench(path, *options):
    tiny = ["--device", "cuda", "--r", "16", "--repeats", "3", "--budget", "0.02", "--out", str(path)]
    assert main(["kernels", *tiny, *options]) == 0
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_metric_has_rows(tmp_path):
    options = ["--shapes", "512x1024", "--m", "256", "1", "--dropout", "0", "0.1"]
    rows = run_bench(tmp_path / "k.csv", *options, "--providers", "torch", "fastlora-fp32", "fastlora-bf16")
    assert {row["metric"] for row in rows} == {"time", "peak_memory", "error", "launches"}
    assert all(row["device"] == torch.cuda.get_device_name() for row in rows)
    decoded = {row["provider"] for row in rows if row["mode"] == "decode" and row["metric"] == "time"}
    names = {"torch", "fastlora-fp32", "fastlora-bf16"}
    assert decoded == names | {f"{name}-graph" for name in names}
    launched = {(r["provider"], r["mode"], r["M"]): r["p50"] for r in rows if r["metric"] == "launches"}
    assert launched["torch", "forward", "256"] in ("1", "2")  # cuBLAS may split the contraction
    assert all(float(row["p50"]) > 0 for row in rows if row["metric"] == "time")
    assert {row["dropout"] for row in rows} == {"0", "0.1"}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [provider.name for provider in PROVIDERS if provider.name != "compile"])
def test_each_provider_is_right(kernel, name):
    """Ours by the tolerance rule; a peer need only run. The compiled reference takes long; another test has it."""
    (provider,) = find_providers([name])
    problem = Problem(kernel, 512, 1024, 16, GPU)
    if not provider.takes_part(problem):
        problem = Problem(kernel, 512, 1024, 0, GPU)
    if not provider.takes_part(problem):
        pytest.skip("it does not take part in this kernel")
    if reason := provider.unavailable(problem):
        pytest.skip(reason)
    operands = make_operands(problem)
    judge = Judge(operands, *draw_inputs(problem, 0 if kernel == "nf4_dequantize" else 16, grad=True))
    share, wrong = judge.judge(provider, provider.build(operands)[0])
    if name.startswith("fastlora") or name == "torch":
        assert wrong == ""
        assert share <= 1
    else:
        assert share < math.inf, wrong


@pytest.mark.gpu(rehearsed=False)
def test_hidden_launches_leave_only_the_kernels():
    x = torch.randn(16, 16, device=GPU)

    def many(serial):
        for _ in range(50):
            x.add_(1)

    hidden = interleave({"many": many}, GPU, 0.0, 20)["many"].p50
    shown = interleave({"many": many}, GPU, 0.0, 20, hide_launches=False)["many"].p50
    assert 0 < hidden < shown


def test_a_replayed_graph_works_on_every_copy():
    weights = [torch.randn(64, 64, device=GPU) for _ in range(3)]
    x = torch.randn(4, 64, device=GPU)
    graph = cuda.Graph(lambda serial: x @ weights[serial], 3)
    x.copy_(torch.randn(4, 64, device=GPU))
    graph(0)
    torch.cuda.synchronize()
    for output, weight in zip(graph._outputs, weights, strict=True):
        torch.testing.assert_close(output, x @ weight)


def test_what_cannot_be_captured_raises_and_the_device_goes_on():
    x = torch.randn(64, device=GPU)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        cuda.Graph(lambda serial: x * x.sum().item(), 1)
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    assert torch.isfinite(x * 2).all()
    assert torch.rand(4, device=GPU).sum() > 0  # the generator has left the capture too
    graph = cuda.Graph(lambda serial: x * 2, 1)
    graph(0)
    torch.testing.assert_close(graph._outputs[0], x * 2)


@pytest.mark.gpu(rehearsed=False)
def test_launches_are_counted():
    x = torch.randn(1024, device=GPU)

    def three(serial):
        y = x + 1
        y.mul_(2)
        return y.sum()

    three(0)
    assert cuda.count_launches(three) == 3


def test_the_machine_is_measured():
    machine = measure_machine(GPU, size=2048, budget_s=0.05)
    assert (machine.matmul.M, machine.matmul.K, machine.matmul.N) == (2048, 2048, 2048)
    assert 50 < gb_per_s(machine.copy) < 20000
    assert 1 < tflop_per_s(machine.matmul) < 5000
