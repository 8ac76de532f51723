"""What `python -m bench kernels` measures, in which order, when it stops, what it does with providers that raise."""

import time

import pytest
import torch
from torch import Tensor

from bench.compare import linear, providers
from bench.compare.layers import LoraLayer, Provider
from bench.compare.providers import find_providers
from bench.measure.models import MODEL_SHAPES
from bench.measure.operands import Operands
from fastlora import reference
from tests.bench.support import run_kernels


def plan_of(*options: str) -> linear.Plan:
    import argparse

    parser = argparse.ArgumentParser()
    linear.add_arguments(parser)
    return linear.make_plan(parser.parse_args(list(options)))


def fake_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_cuda_preset_measures_what_the_goals_need_and_the_most_wanted_first(monkeypatch):
    fake_cuda(monkeypatch)
    plan = plan_of("--device", "cuda")
    problems = list(plan.problems())
    assert [(p.kernel, p.K, p.N, p.R) for p in problems[:3]] == [
        ("nf4_linear", 4096, 4096, 16),
        ("nf4_linear", 4096, 14336, 16),
        ("nf4_linear", 8192, 28672, 16),
    ]
    cases = list(plan.cases("nf4_linear"))
    assert cases == [(8192, 0.0), (8192, 0.1), (1, 0.0), (256, 0.0), (256, 0.1), (2048, 0.0), (2048, 0.1), (16, 0.0)]
    assert plan.modes_at("nf4_linear", 1, 0.0) == ("forward", "both", "decode")
    assert plan.modes_at("nf4_linear", 8192, 0.1) == ("forward", "both")
    assert list(plan.cases("nf4_dequantize")) == [(0, 0.0)]
    assert {p.R for p in problems if p.kernel == "nf4_dequantize"} == {0, 16}
    assert plan.with_launches
    assert "compile" not in {provider.name for provider in plan.providers}
    assert "compile" in {provider.name for provider in plan_of("--device", "cuda", "--providers", "compile").providers}


def test_several_ranks_dropouts_and_models_are_taken():
    plan = plan_of("--r", "8", "64", "--dropout", "0", "0.1", "--models", "mistral-7b", "--m", "1", "32")
    assert {(p.K, p.N) for p in plan.problems()} == set(MODEL_SHAPES["mistral-7b"])
    assert {p.R for p in plan.problems() if p.kernel == "bf16_linear"} == {8, 64}
    assert list(plan.cases("bf16_linear")) == [(1, 0.0), (1, 0.1), (32, 0.0), (32, 0.1)]
    assert not plan.with_launches


def test_rows_of_several_ranks_and_dropouts_are_told_apart(tmp_path):
    rows = run_kernels(
        tmp_path / "k.csv", "--no-memory", "--kernels", "bf16_linear", "--providers", "torch", "fastlora-bf16",
        "--r", "4", "8", "--dropout", "0", "0.25", "--modes", "backward", "both",
    )  # fmt: skip
    timed = [
        (r["provider"], r["mode"], r["R"], r["dropout"])
        for r in rows
        if r["kernel"] == "bf16_linear" and r["unit"] == "ms"
    ]
    assert len(timed) == len(set(timed)) == 2 * 2 * 2 * 2
    assert [r["R"] for r in rows if r["metric"] == "error"] == ["4", "8"]


def test_the_limit_ends_a_run_with_what_it_has_and_names_the_rest(tmp_path, capsys):
    began = time.monotonic()
    rows = run_kernels(tmp_path / "k.csv", "--no-memory", "--limit", "0.001", "--kernels", "bf16_linear", "nf4_linear")
    assert time.monotonic() - began < 10
    assert {row["kernel"] for row in rows} == {"copy", "matmul"}
    shown = capsys.readouterr().out
    assert "stopped at the limit; not measured: bf16_linear 128x96 r=4, nf4_linear 128x96 r=4" in shown


def test_rows_are_printed_and_written_as_they_are_measured(tmp_path, capsys, monkeypatch):
    path = tmp_path / "k.csv"
    seen = []
    say = linear.say

    def watch(points, elapsed):
        seen.append(len(path.read_text().splitlines()))
        say(points, elapsed)

    monkeypatch.setattr(linear, "say", watch)
    run_kernels(
        path, "--no-memory", "--kernels", "bf16_linear", "--providers", "torch", "--modes", "forward", "both", "decode"
    )
    assert seen == [3, 4, 5]  # the header and the machine's two rows, then one more each time
    assert "bf16_linear 128x96 M=16 r=4 p=0 forward: torch" in capsys.readouterr().out


class Raising(LoraLayer):
    """Right until it is asked for the mode named."""

    where = "decode"

    def decode(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a second line")


def raising(stage: str) -> Provider:
    def build(operands: Operands) -> list[LoraLayer]:

        if stage == "build":
            raise ImportError("libmissing.so")
        a, b = operands.lora_a.clone().requires_grad_(), operands.lora_b.clone().requires_grad_()
        return [Raising(lambda x, w=w: reference.lora_linear(x, w, a, b, 2.0), a, b) for w in operands.dense]

    return Provider("raising", build, torch.float32, modes=("forward", "both", "decode"), checked=stage != "decode")


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("build", "LEFT OUT: raising, bf16_linear 128x96 r=4 p=0: ImportError: libmissing.so"),
        ("decode", "LEFT OUT: raising, bf16_linear 128x96 r=4 p=0 M=16 decode: RuntimeError: no such kernel\n"),
    ],
)
def test_a_provider_that_raises_is_named_and_the_bench_goes_on(tmp_path, capsys, monkeypatch, stage, says):
    monkeypatch.setattr(providers, "PROVIDERS", (raising(stage), *find_providers(["torch", "fastlora-fp32"])))
    rows = run_kernels(tmp_path / "k.csv", "--no-memory", "--kernels", "bf16_linear")
    assert says in capsys.readouterr().err
    decoded = {r["provider"] for r in rows if r["mode"] == "decode"}
    assert decoded == {"torch", "fastlora-fp32"}
    assert ("raising" in {r["provider"] for r in rows}) == (stage == "decode")
