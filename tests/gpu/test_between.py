"""What stands between the linears, on a GPU: the kernels' own cases, and a model with all of it."""

import copy

import pytest
import torch

import fastlora
from tests.kernels import test_between as cases
from tests.model import test_speed_up as models
from tests.support.numerics import rms

pytestmark = pytest.mark.gpu
test_rms_norm = cases.test_rms_norm
test_rms_norm_in_two_dtypes = cases.test_rms_norm_in_two_dtypes
test_rms_norm_of_rows_apart_and_of_none = cases.test_rms_norm_of_rows_apart_and_of_none
test_rotary = cases.test_rotary
test_rotary_with_angles_that_both_halves_share = cases.test_rotary_with_angles_that_both_halves_share
test_rotary_writes_nothing_in_place_and_takes_any_strides = (
    cases.test_rotary_writes_nothing_in_place_and_takes_any_strides
)
test_gated = cases.test_gated
test_gated_halves_of_one_tensor_and_far_values = cases.test_gated_halves_of_one_tensor_and_far_values


def step(model, ids):
    model.zero_grad()
    found = model(input_ids=ids, labels=ids, use_cache=False)
    found.loss.backward()
    return [found.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "Phi3"])
def test_a_model_is_no_further_from_fp32_than_by_its_own_code(name):
    ids = models.tokens().cuda()
    exact = models.family(name).bfloat16().float().cuda()
    model = copy.deepcopy(exact).bfloat16()
    wanted, plain = step(exact, ids), step(model, ids)
    fastlora.speed_up(model)
    assert models.count(model) == models.FAMILIES[name][1]
    assert all(row.sped_up for row in model.fastlora_report.parts)
    ours = step(model, ids)
    off = [sum((rms(got - v) / rms(v)) ** 2 for got, v in zip(found, wanted, strict=True)) for found in (ours, plain)]
    assert off[0] <= 1.2**2 * off[1]


def test_a_checkpoint_that_keeps_the_linears_changes_no_bit():
    ids = models.tokens().cuda()
    model = models.family("Qwen3").bfloat16().cuda()
    fastlora.speed_up(fastlora.replace_linear(model, r=8, quantize="nf4"))
    models.randomize(model).train()
    model.enable_input_require_grads()
    plain = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_linears})
    for got, want in zip(step(model, ids), plain, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu(rehearsed=False)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replayed_step_trains_as_the_usual_one(dropout, checkpointing):
    model = models.family("Qwen3", attn_implementation="sdpa").bfloat16().cuda()
    fastlora.speed_up(fastlora.replace_linear(model, r=8, quantize="nf4", lora_dropout=dropout))
    models.randomize(model).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_linears})
    other, step = copy.deepcopy(model), fastlora.GraphedStep(model)
    found = []
    for each, graphed in ((model, True), (other, False)):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for number in range(6):
            ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(number)).cuda()
            if graphed:
                loss = step(input_ids=ids, labels=ids)
            else:
                loss = each(input_ids=ids, labels=ids).loss
                loss.backward()
            found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    if dropout and checkpointing:
        assert list(step.reasons.values()) == [
            "dropout under gradient checkpointing: its random state cannot be read while recording"
        ]
    else:
        assert (step.reasons, step.replayed) == ({}, 4)
    if not dropout:  # a recorded head takes all rows, the usual one those of targets
        assert found[:6] == pytest.approx(found[6:], rel=1e-5)
    else:  # masks drawn in another order
        assert found[:6] == pytest.approx(found[6:], rel=0.05)
