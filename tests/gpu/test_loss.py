"""Head and loss in parts, and micro-batches in one row, on a GPU."""

import copy

import pytest
import torch

import fastlora
from fastlora.layers import causal_loss
from fastlora.training import data, packing
from fastlora.training.loop import train
from tests.kernels import test_loss as cases
from tests.kernels.test_loss import way  # noqa: F401
from tests.support.models import randomize
from tests.support.numerics import rms
from tests.support.runs import QUIET, losses, make_base, recipe
from tests.training import test_packing as rows

pytestmark = pytest.mark.gpu
test_loss_and_gradients = cases.test_loss_and_gradients
test_parts_are_the_whole_for_any_head = cases.test_parts_are_the_whole_for_any_head
test_a_loss_scale_beyond_fp16_changes_no_gradient = cases.test_a_loss_scale_beyond_fp16_changes_no_gradient
test_no_rows_and_rows_that_do_not_count = cases.test_no_rows_and_rows_that_do_not_count
test_far_logits = cases.test_far_logits
test_a_label_that_is_no_class_is_never_silent = cases.test_a_label_that_is_no_class_is_never_silent
test_autocast_computes_in_its_dtype = cases.test_autocast_computes_in_its_dtype


@pytest.mark.gpu(rehearsed=False)
def test_the_host_waits_for_nothing_but_the_number_of_targets():
    """What it waits for was queued before the backbone."""
    model = fastlora.speed_up(rows.model_of().bfloat16().cuda())
    ids = torch.randint(0, 60, (2, 32), device="cuda")
    labels = ids.clone()
    labels[:, :20] = -100
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    torch.cuda.synchronize()
    model.model.register_forward_hook(lambda module, args, out: torch.cuda._sleep(2 * 10**9))
    began = torch.cuda.Event(enable_timing=True)
    began.record()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    returned = not torch.cuda.current_stream().query()
    plain = torch.nn.functional.cross_entropy(
        model(input_ids=ids, use_cache=False).logits[:, 19:-1].flatten(0, 1).float(), labels[:, 20:].flatten()
    )
    assert returned, "the loss was there before the device had computed it"
    torch.testing.assert_close(loss, plain, rtol=1e-2, atol=0)


@pytest.mark.gpu(rehearsed=False)
def test_a_recorded_step_takes_all_rows():
    model = randomize(fastlora.replace_linear(rows.model_of().bfloat16().cuda(), r=4)).train()
    fastlora.speed_up(model)
    step = fastlora.GraphedStep(model, warm_up=1)
    ids = torch.randint(0, 60, (2, 32), device="cuda")
    found = []
    for masked in (5, 20, 0, 12):
        labels = ids.clone()
        labels[:, :masked] = -100
        loss = step(input_ids=ids, labels=labels)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        with torch.no_grad():
            found.append((loss, model(input_ids=ids, labels=labels, use_cache=False).loss))
        for got, want in zip(gradients, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
            assert rms(got - want) <= 0.02 * rms(want)
        model.zero_grad()
    assert step.replayed >= 2, step.reasons
    for got, want in found:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.gpu(rehearsed=False)
def test_dropout_runs_on_after_a_step_that_could_not_be_recorded():
    model = randomize(fastlora.replace_linear(rows.model_of().bfloat16().cuda(), r=4, lora_dropout=0.1)).train()
    ids = torch.randint(0, 60, (2, 32), device="cuda")

    def waits(model, batch):
        loss = model(**batch).loss
        return loss * float(loss.item() > 0)

    step = fastlora.GraphedStep(model, waits, warm_up=1)
    for _ in range(3):
        assert step(input_ids=ids, labels=ids).isfinite()
    assert (step.replayed, step.usual, len(step.reasons)) == (0, 3, 1)
    assert torch.nn.functional.dropout(torch.ones(100, device="cuda"), 0.5).unique().numel() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [4, 2])
def test_an_example_in_a_row_is_what_it_is_alone(dtype, heads):
    exact = rows.model_of(num_key_value_heads=heads).to(dtype).float().cuda()
    model = copy.deepcopy(exact).to(dtype)
    examples = rows.examples_of((40, 7, 130, 64))
    assert packing.prepare(model, 1024) == ""
    batch = {
        n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in packing.pack(examples, [0, 1, 2, 3], 0).items()
    }
    del batch["labels"]
    calls = []
    own = packing._variable_length
    packing._variable_length = lambda *a: calls.append(1) or own(*a)
    try:
        with packing.packed():
            found = model(**batch, use_cache=False).logits[0]
            found.float().square().sum().backward()
    finally:
        packing._variable_length = own
    assert len(calls) == (model.config.num_hidden_layers if dtype is torch.bfloat16 and found.is_cuda else 0)
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    loss = 0.0
    for part, ids in zip(found.split(lengths), batch["input_ids"][0].split(lengths), strict=True):
        alone = exact(input_ids=ids[None], use_cache=False).logits[0]
        loss += alone.square().sum()
        assert rms(part - alone) <= (2e-2 if dtype is torch.bfloat16 else 1e-5) * rms(alone)
    loss.backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert rms(ours.grad - theirs.grad) <= (5e-2 if dtype is torch.bfloat16 else 1e-4) * rms(theirs.grad)


@pytest.mark.gpu(rehearsed=False)
def test_runs_with_and_without_padding_and_replayed(tmp_path):
    base, found = make_base(tmp_path), {}
    for name, options in (
        ("padded", {"padding_free": False}), ("free", {}), ("replayed", {"cuda_graphs": True}),
        ("replayed, checkpointed", {"cuda_graphs": True, "gradient_checkpointing": "auto"}),
    ):  # fmt: skip
        options = {"use_cpu": False, "bf16": None, "max_steps": 24, "learning_rate": 1e-3, "quantize": "nf4", **options}
        train(recipe(base, tmp_path / name, **options), console=QUIET)
        found[name] = [loss for _, loss in losses(tmp_path / name)]
    for name, values in found.items():
        assert values == pytest.approx(found["padded"], rel=0.02), name


def test_targets_are_found_on_the_device():
    labels = torch.randint(0, 9, (3, 50), device="cuda")
    labels[torch.rand(3, 50, device="cuda") < 0.5] = data.IGNORED
    found = causal_loss._targets(labels, None)
    assert torch.equal(found.places(), data.before_targets(labels))
