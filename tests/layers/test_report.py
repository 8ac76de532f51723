"""What the report says computes a layer, by the number of tokens, is what the code paths do."""

import json

import pytest
import torch
from fastlora.kernels.operands import Lora

import fastlora
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.ops import linear, linear_cpu, linear_cpu_bf16, linear_cuda, nf4
from fastlora.ops.operands import ANY_M, Step
from tests.support.models import gpt2, llama

CPU = torch.device("cpu")


def operands(n, k, r, blocksize=64, dtype=torch.float32):
    weight = nf4.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), blocksize)
    lora = Lora(torch.zeros(r, k, dtype=dtype), torch.zeros(n, r, dtype=dtype), 1.0, 0.0, None) if r else None
    return weight, lora


@pytest.mark.parametrize("r", [0, 4])
def test_steps_on_the_cpu_are_what_the_path_does(r):
    n, k = 96, 64
    weight, lora = operands(n, k, r)
    steps = linear_cpu.steps(n, k, 64, r, torch.float32, CPU)
    assert [step.m for step in steps] == sorted({step.m for step in steps})
    for bound, _, words in steps:
        for m in {max(1, bound - 1), bound} if bound < 1 << 20 else {4096}:
            x = torch.empty(m, k)
            assert linear_cpu._reads_packed(x, weight) == ("packed codes" in words)
            if lora is not None:
                merges = linear_cpu._merges(x, weight, lora) and not linear_cpu._reads_packed(x, weight)
                assert merges == ("merge" in words), (m, words)


@pytest.mark.parametrize("packed", [True, False])
def test_one_product_is_reported_where_it_runs(packed):
    n, k, r = 96, 64, 4
    weight, lora = operands(n, k, r, dtype=torch.bfloat16)
    if not packed:
        weight = torch.zeros(n, k, dtype=torch.bfloat16)
    steps = linear_cpu.steps(n, k, 64 * packed, r, torch.bfloat16, CPU)
    for m in (1, 64, 5000):
        words = next(step.words for step in steps if m <= step.m)
        served = linear_cpu_bf16.takes(torch.empty(m, k, dtype=torch.bfloat16), weight, lora)
        assert served == (words == "one C++ product")


def test_steps_on_a_gpu_are_the_choices():
    """On the device that stands for a GPU in the interpreter."""
    pytest.importorskip("triton")
    n, k, r = 256, 512, 8
    weight, lora = operands(n, k, r, dtype=torch.bfloat16)
    steps = linear_cuda.steps(n, k, 64, r, torch.bfloat16, CPU)
    assert steps[-1].m == ANY_M
    for bound, _, words in steps:
        m = min(bound, 5000)
        chosen = linear_cuda._choose(
            "linear", torch.empty(m, k, dtype=torch.bfloat16), weight, lora, lambda other: None
        )
        assert linear_cuda._WORDS[chosen.kernel] == words, m
    assert linear_cuda.steps(n, k, 0, r, torch.bfloat16, CPU) == [
        (ANY_M, "linear_cuda", "cuBLAS in fp32, then the update")
    ]


def test_words(monkeypatch):
    steps = [Step(8, "p", "a"), Step(16, "p", "a"), Step(64, "q", "b"), Step(ANY_M, "p", "c")]
    monkeypatch.setattr(linear_cpu, "steps", lambda *_: steps)
    assert linear.computed_by(2, 2, 1, 0, torch.float32, CPU) == (
        "p, q",
        "up to 16 tokens a, up to 64 tokens b, above c",
    )
    monkeypatch.setattr(linear_cpu, "steps", lambda *_: steps[-1:])
    assert linear.computed_by(2, 2, 1, 0, torch.float32, CPU) == ("p", "c")


def test_the_report_has_them(capsys):
    model = llama().bfloat16()
    before = fastlora.replace_linear(model, r=4, quantize="nf4").fastlora_report
    report = fastlora.report(model)
    replaced = [row for row in report.rows if row.replaced]
    expected = {linear.computed_by(*row.shape, 4, 64, torch.bfloat16, CPU)[1] for row in replaced}
    assert {row.kernels for row in replaced} == {row.kernels for row in before.replaced} == expected
    assert {row["kernels"] for row in json.loads(report.to_json())["rows"]} == expected | {""}
    report.print()
    said = " ".join(capsys.readouterr().out.split())
    for kernels in expected:
        shapes = dict.fromkeys(f"{n}x{k} NF4" for n, k in (row.shape for row in replaced if row.kernels == kernels))
        assert f"{', '.join(shapes)}: {kernels}" in said
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer, NF4Linear)


def test_nothing_is_said_about_a_transposed_weight():
    model = gpt2()
    fastlora.replace_linear(model, r=2)
    assert {row.kernels for row in fastlora.report(model).replaced} == {""}
    assert linear.computed_by(8, 8, 2, 0, torch.float32, CPU)[0] in {row.path for row in fastlora.report(model).rows}
