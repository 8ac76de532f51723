"""On a CUDA device: each kernel that the table may name is right, and a search runs once, outside capture."""

import pytest
import torch

pytest.importorskip("triton")
from fastlora.kernels import choice, search

from bench.measure.operands import Problem, make_operands
from bench.tune.trials import TuneCase, low_rank_trials, product_trials
from fastlora.native import cuda
from fastlora.ops import backend, nf4
from fastlora.ops.linear import lora_linear

pytestmark = pytest.mark.gpu
SCALING = 2.0
MOST = 4  # candidates of a case; `bench tune` checks them all


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("FASTLORA_BACKEND", "FASTLORA_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(search, "_found", {})


@pytest.fixture(scope="module")
def operands():
    problem = Problem("nf4_linear", 1024, 2048, 16, torch.device("cuda", 0))
    return make_operands(problem, packed_copies=2)


def test_the_gpu_is_known_by_its_name():
    device = torch.device("cuda", torch.cuda.current_device())
    name, capability = choice.gpu_of(device)
    assert name == torch.cuda.get_device_name()
    assert capability == torch.cuda.get_device_capability()
    assert choice.choose("linear", 1 << 20, 4096, 4096, 16, False, device).kernel == "dequantize"
    print(choice.describe(device))


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("op", choice.PRODUCTS)
def test_the_first_candidates_are_right(operands, op, m):
    found, truth = product_trials(TuneCase(op, m, 1024, 2048, 16), operands)
    assert len(found) > 1
    kernels = set()
    for trial in found[:MOST]:
        assert truth.fault(trial.result()) == "", str(trial)
        kernels.add(trial.kernel)
    assert {"dequantize", "fused"} <= kernels
    assert ("decode" in kernels) == (op == "linear" and m <= 16)


@pytest.mark.parametrize("mode", ["narrow", "split"])
@pytest.mark.parametrize("op", choice.LOW_RANK)
def test_tiles_of_the_low_rank_kernels_are_right(op, mode):
    case = TuneCase(op, 1024, 0 if op == "dy" else 4096, 4096 if op == "dy" else 0, 16, mode)
    found, truth = low_rank_trials(case, torch.device("cuda", 0), torch.bfloat16)
    for trial in found[:MOST]:
        assert truth.fault(trial.result()) == "", str(trial)


def test_tuning_writes_rows_for_this_gpu(tmp_path, monkeypatch, capsys):
    from fastlora.kernels import fused

    from bench.cli import main

    candidates = fused.candidates
    monkeypatch.setattr(fused, "candidates", lambda *asked: candidates(*asked)[:2])
    path = tmp_path / "choice.csv"
    options = ("--shapes", "1024x2048", "--m", "16", "--ops", "linear", "linear_t", "--out", str(path))
    assert main(["tune", *options]) == 0, capsys.readouterr()
    shipped = choice.read(choice.TABLE)
    rows = [row for row in choice.read(path) if row.source == "measured" and row not in shipped]
    assert {(row.gpu, row.op, row.m) for row in rows} == {
        (torch.cuda.get_device_name(), op, 16) for op in choice.PRODUCTS
    }
    assert all(row.us and 1 < row.us < 1000 for row in rows)


def layer(m: int, k: int = 512, n: int = 768, r: int = 16):
    generator = torch.Generator("cuda").manual_seed(m)

    def draw(*shape, std=1.0, dtype=torch.bfloat16):
        return (torch.randn(*shape, generator=generator, device="cuda") * std).to(dtype)

    weight = nf4.quantize(draw(n, k, std=k**-0.5))
    return draw(m, k), weight, draw(r, k, std=k**-0.5, dtype=torch.float32), draw(n, r, std=0.25, dtype=torch.float32)


def test_a_search_runs_once_and_not_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("FASTLORA_AUTOTUNE", "1")
    from fastlora.kernels import fused

    candidates = fused.candidates
    monkeypatch.setattr(fused, "candidates", lambda *asked: candidates(*asked)[:2])
    x, weight, a, b = layer(8)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        monkeypatch.setenv("FASTLORA_AUTOTUNE", "0")
        expected = lora_linear(x, weight, a, b, SCALING)  # compiles what the table names
        monkeypatch.setenv("FASTLORA_AUTOTUNE", "1")
        with torch.cuda.graph(graph):
            captured = lora_linear(x, weight, a, b, SCALING)
        assert search._found == {}
        graph.replay()
        assert torch.equal(captured, expected)
        searched = lora_linear(x, weight, a, b, SCALING)
        assert len(search._found) == 1
        torch.testing.assert_close(searched, expected, rtol=2e-2, atol=2e-2)
        monkeypatch.setattr(search, "_milliseconds", lambda *_: pytest.fail("searched twice"))
        assert torch.equal(lora_linear(x, weight, a, b, SCALING), searched)


def test_the_compiled_decode_kernel_can_be_forced(monkeypatch):
    backend._backend.cache_clear()
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    x, weight, a, b = layer(4)
    loaded, reason = cuda.status()
    if not loaded:
        with pytest.raises(ValueError, match="FASTLORA_BACKEND=cuda cannot run on cuda"):
            lora_linear(x, weight, a, b, SCALING)
        pytest.skip(f"no compiled library: {reason}")
    calls = []
    decode = cuda.decode
    monkeypatch.setattr(cuda, "decode", lambda *operands: calls.append(1) or decode(*operands))
    with torch.no_grad():
        forced = lora_linear(x, weight, a, b, SCALING)
        monkeypatch.setenv("FASTLORA_BACKEND", "triton")
        by_triton = lora_linear(x, weight, a, b, SCALING)
    assert len(calls) == 1
    torch.testing.assert_close(forced, by_triton, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_the_same_call_gives_the_same_bits_and_waits_for_nothing(m):
    x, weight, a, b = layer(m)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]

    def results():
        y = lora_linear(leaves[0], weight, leaves[1], leaves[2], SCALING)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    first = results()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
