"""The CUDA side of the bench without a CUDA device: order of events, what a lost device does, pytest-benchmark."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.compare import linear, packages, providers, shape
from bench.compare.accuracy import Judge
from bench.compare.providers import find_providers
from bench.compare.shape import DeviceLostError, Effort, ShapeBench
from bench.measure import cuda, timing
from bench.measure.floors import Rates
from bench.measure.operands import Problem, draw_inputs, make_operands
from bench.measure.timing import interleave, measure_machine

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda")


class FakeEvent:
    """Writes down when it is recorded."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        JOURNAL.append("event")

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 2.0


JOURNAL: list[str] = []


@pytest.fixture
def fake_cuda(monkeypatch):
    JOURNAL.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: JOURNAL.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: JOURNAL.append("spin"))


def test_launches_are_hidden_behind_a_spin_or_told_by_an_idle_device(fake_cuda):
    class Staged:
        def before(self, serial: int) -> None:
            JOURNAL.append("before")

        def __call__(self, serial: int) -> None:
            JOURNAL.append("call")

    found = interleave({"one": Staged()}, GPU, 0.0, 1)
    assert found["one"].p50 == 2.0
    warm_up = ["before", "wait", "call", "wait"]
    assert [*warm_up, *warm_up, "before", "spin", "event", "call", "event", "wait"] == JOURNAL
    JOURNAL.clear()
    interleave({"one": Staged()}, GPU, 0.0, 1, hide_launches=False)
    assert [*warm_up, *warm_up, "before", "wait", "event", "call", "event", "wait"] == JOURNAL


def test_a_spin_is_bounded(fake_cuda, monkeypatch):
    spins = []
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    cuda.head_start(1e-4)
    cuda.head_start(60.0)
    assert spins == [200_000, 10_000_000]


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


def test_a_lost_device_ends_the_run_with_what_it_has(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linear, "measure_machine", functools.partial(measure_machine, size=64))

    def lose(self, m, dropout, mode):
        raise DeviceLostError("after unsloth the CUDA device no longer answers: illegal memory access")

    monkeypatch.setattr(ShapeBench, "time", lose)
    path = tmp_path / "k.csv"
    options = ["--shapes", "64x64", "--m", "16", "--r", "4", "--kernels", "bf16_linear", "--no-memory"]
    assert main(["kernels", "--out", str(path), *options, "--providers", "fastlora-fp32"]) == 1
    assert "no longer answers: illegal memory access; what was measured before it is kept" in capsys.readouterr().err
    assert ",error,limit,16," in path.read_text()


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


def test_peers_that_need_cuda_say_so_and_import_nothing(monkeypatch):
    monkeypatch.setattr(packages, "_unsloth", lambda: pytest.fail("imported without a CUDA device"))
    problem = Problem("nf4_linear", 128, 96, 4, torch.device("cpu"))
    for name, fits in (("unsloth", packages._unsloth_fits), ("lorafusion", find_providers(["lorafusion"])[0].fits)):
        assert fits(problem) == f"{name} needs a CUDA device"


def test_a_package_is_imported_without_its_own_init_and_leaves_no_trace_where_it_fails(tmp_path, monkeypatch):
    package = tmp_path / "unsloth"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this would patch transformers')\n")
    (package / "kernels" / "__init__.py").write_text(
        "import os\nos.environ['LEFT_BEHIND'] = '1'\nimport no_such_module\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    packages._unsloth.cache_clear()
    try:
        kernels_module, reason = packages._unsloth()
    finally:
        packages._unsloth.cache_clear()
    assert kernels_module is None
    assert reason == "unsloth cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"
    assert "unsloth" not in sys.modules
    assert "LEFT_BEHIND" not in os.environ


@pytest.mark.parametrize("kernel", ["bf16_linear", "nf4_linear", "nf4_dequantize"])
def test_what_is_compiled_is_right(kernel):
    """The functions handed to torch.compile, run uncompiled: compiling them for a CPU takes minutes."""
    (provider,) = find_providers(["compile"])
    operands = make_operands(Problem(kernel, 64, 48, 4, torch.device("cpu")))
    layer = provider.build(operands)[0]
    with torch.compiler.set_stance("force_eager"):
        judge = Judge(operands, *draw_inputs(operands.problem, 0 if kernel == "nf4_dequantize" else 32, grad=True))
        assert judge.judge(provider, layer)[1] == ""
        if kernel != "nf4_dequantize":
            x = torch.ones(64, 64, dtype=torch.bfloat16)
            layers = provider.build(operands.with_dropout(0.5))
            assert not torch.equal(layers[0].decode(x), layers[0].decode(x))


@pytest.mark.slow
def test_pytest_benchmark_runs_the_cases_and_compares_two_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    case = "test_kernel[nf4_dequantize-0-0-forward-fastlora-bf16]"
    shared = [
        sys.executable,
        "-m",
        "pytest",
        "tests/bench/bench_kernels.py",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    shared += ["-k", "nf4_dequantize-0-0-forward-fastlora", f"--benchmark-storage={tmp_path}"]
    # under xdist pytest-benchmark times nothing, and a worker's environment says xdist
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    for options in (["--benchmark-save=before"], ["--benchmark-compare=0001", "--benchmark-columns=median"]):
        done = subprocess.run([*shared, *options], cwd=ROOT, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{case} (0001_before)" in done.stdout
    assert f"{case} (NOW)" in done.stdout
    (saved,) = tmp_path.glob("*/0001_before.json")
    (found,) = json.loads(saved.read_text())["benchmarks"]
    assert found["name"] == case
    assert found["group"].startswith("nf4_dequantize")


def test_the_bench_is_collected_on_request_only():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is in the standard library from Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
    assert any(name.startswith("pytest-benchmark") for name in settings["project"]["optional-dependencies"]["bench"])


def test_every_provider_is_known_by_one_name():
    names = [provider.name for provider in providers.PROVIDERS]
    assert len(names) == len(set(names))
    assert not any(name.endswith("-graph") or name.startswith("predicted-") for name in names)
