"""Groups, weights kept or expanded once, and tensors that wait on the host, on a GPU: cases and whole steps."""

import copy

import pytest
import torch

import fastlora
from tests.gpu.test_between import step
from tests.model import test_speed_up as models
from tests.ops import test_group as cases
from tests.support.numerics import rms

pytestmark = pytest.mark.gpu
forced, way = cases.forced, cases.way
test_three_linears_as_one = cases.test_three_linears_as_one
test_members_that_differ = cases.test_members_that_differ
test_outputs_that_nothing_uses = cases.test_outputs_that_nothing_uses
test_rows_of_an_odd_length_and_few_rows = cases.test_rows_of_an_odd_length_and_few_rows
test_gradients_that_are_neighbours_need_one_product = cases.test_gradients_that_are_neighbours_need_one_product
test_outputs_may_be_changed_in_place = cases.test_outputs_may_be_changed_in_place
test_expanded_once_over_micro_batches = cases.test_expanded_once_over_micro_batches
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(name="Qwen3", quantize="nf4", **options):
    model = models.family(name).bfloat16().cuda()
    fastlora.replace_linear(model, r=8, quantize=quantize, target_modules=LINEARS, **options)
    return models.randomize(model).train()


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3"])
def test_groups_are_no_further_from_fp32_than_linears_one_by_one(name, quantize):
    ids = models.tokens().cuda()
    model = adapted(name, quantize)
    wanted = step(copy.deepcopy(model).float(), ids)
    alone = step(fastlora.speed_up(model, group=False), ids)
    together = step(fastlora.speed_up(model), ids)
    assert models.count(model)["group"] == 4
    assert all(row.sped_up for row in fastlora.report(model).parts)
    off = [sum((rms(got - v) / rms(v)) ** 2 for got, v in zip(f, wanted, strict=True)) for f in (together, alone)]
    assert off[0] <= 1.2**2 * off[1]


@pytest.mark.parametrize("policy", ["min", "full", "selective", "none"])
@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.gpu(rehearsed=False))])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_policy_changes_a_bit(policy, offload, dropout):
    ids = models.tokens().cuda().repeat(4, 4)
    model = fastlora.speed_up(adapted(lora_dropout=dropout))
    model.enable_input_require_grads()

    def run():
        torch.manual_seed(3)
        return step(model, ids)

    plain = run()
    fastlora.checkpoint_layers(model, policy, offload=offload)
    for got, want in zip(run(), plain, strict=True):
        assert torch.equal(got, want)


def test_weights_expanded_once_change_no_bit_and_a_step_of_the_optimizer_is_seen():
    ids = models.tokens().cuda().repeat(4, 4)
    model = fastlora.speed_up(adapted())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    with fastlora.expand_once(0):
        first = step(model, ids)
    with fastlora.expand_once() as store:
        for _ in range(2):
            for got, want in zip(step(model, ids), first, strict=True):
                assert torch.equal(got, want)
        assert store.held > 0
        optimizer.step()
        assert store.held == 0
        kept = step(model, ids)
    with fastlora.expand_once(0):
        for got, want in zip(kept, step(model, ids), strict=True):
            assert torch.equal(got, want)
