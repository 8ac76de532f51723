"""A wrong provider cannot pass for a right one."""

import math

import pytest
import torch

from bench.compare.accuracy import Judge, share_of_limit
from bench.compare.layers import BareProduct, Expansion, LoraLayer, Provider
from bench.compare.providers import find_providers
from bench.measure.operands import DEQUANTIZE, SCALING, Problem, draw_inputs, make_operands
from fastlora import reference
from tests.bench.support import CPU, scaled_provider


def test_a_right_provider_passes_the_check_that_a_wrong_one_fails():
    operands = make_operands(Problem("nf4_linear", 128, 96, 8, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 16, grad=True))
    for factor, right in ((1.0, True), (1.01, False)):
        provider = scaled_provider(factor)
        share, wrong = judge.judge(provider, provider.build(operands)[0])
        assert (share <= 1) == right
        assert (wrong == "") == right


@pytest.mark.parametrize("r", [0, 8])
def test_an_expansion_must_be_rounded_once_from_the_exact_weight(r):
    operands = make_operands(Problem(DEQUANTIZE, 128, 96, r, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 0, grad=True))
    (ours,) = find_providers(["fastlora-bf16"])
    assert judge.judge(ours, ours.build(operands)[0])[1] == ""
    exact = operands.exact_weight.addmm(operands.lora_b.double(), operands.lora_a.double(), alpha=SCALING)
    for expand, right in (
        (lambda: exact.bfloat16(), True),
        (lambda: exact.bfloat16() * torch.tensor(1.01, dtype=torch.bfloat16), False),
        (lambda: exact.half().bfloat16().roll(1), False),
        (lambda: (exact.float() * (1 + 2**-9)).bfloat16(), False),
    ):
        worst, wrong = judge.judge(ours, Expansion(expand, operands.lora_a, operands.lora_b))
        assert (wrong == "") == right
        assert (worst <= 1) == right


def test_a_product_without_lora_is_judged_as_one():
    operands = make_operands(Problem("nf4_linear", 128, 96, 8, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 16, grad=True))
    plain = Provider("plain", lambda operands: [BareProduct(operands.dense[0])], None, modes=("decode",))
    assert judge.judge(plain, plain.build(operands)[0])[1] == ""
    a, b = operands.lora_a.bfloat16(), operands.lora_b.bfloat16()
    with_lora = LoraLayer(lambda x: reference.lora_linear(x, operands.dense[0], a, b, SCALING), a, b)
    assert "x W^T" in judge.judge(plain, with_lora)[1]


def test_what_decoding_computes_is_judged_too():
    operands = make_operands(Problem("bf16_linear", 128, 96, 8, CPU))
    judge = Judge(operands, *draw_inputs(operands.problem, 16, grad=True))

    class WrongWhenDecoding(LoraLayer):
        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return super().decode(x) * 1.02

    provider = scaled_provider(1.0)
    layer = provider.build(operands)[0]
    assert judge.judge(provider, layer)[1] == ""
    layer.__class__ = WrongWhenDecoding
    worst, wrong = judge.judge(provider, layer)
    assert worst > 1
    assert wrong.startswith("decoded y")


def test_share_of_limit_is_infinite_for_what_has_no_error():
    oracle = torch.ones(2, 2, dtype=torch.float64)
    assert share_of_limit(torch.full((2, 2), math.nan), oracle, oracle) == math.inf
    assert share_of_limit(torch.ones(2, 3), oracle, oracle) == math.inf
