"""`GraphedStep`: a recorded step gives the gradients of the usual one; here a stand-in for the graph runs it again."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.training import graphed_step
from tests.support.models import llama, randomize, tokens


class Rerun:
    """In the place of a CUDA graph: what was recorded runs again, over the same memory."""

    def __init__(self, step, found):
        self.step, self.found = step, found

    def replay(self):
        self.found.copy_(self.step())


@pytest.fixture
def recorded(monkeypatch):
    """The steps recorded; recording runs nothing that lasts."""
    seen = []

    def record(step, pool):
        kept = {p: p.grad.clone() for p in record.model.parameters() if p.grad is not None}
        found = step()
        for p, gradient in kept.items():
            p.grad.copy_(gradient)
        seen.append(step)
        return Rerun(step, found), found, "pool"

    monkeypatch.setattr(graphed_step, "_recorded", record)
    monkeypatch.setattr(graphed_step, "obstacle", lambda model: "")
    record.seen = seen
    return record


def model_of(recorded, **options):
    model = randomize(fastlora.replace_linear(llama(), r=4, **options))
    recorded.model = model
    return model


def batch(seed, rows=2):
    ids = torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def trained(model, step, none, micro_batches=1, steps=6, rows=lambda number: 2):
    """Losses of a few updates."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for number in range(steps):
        for part in range(micro_batches):
            losses.append(step(**batch(10 * number + part, rows(number))))
        optimizer.step()
        optimizer.zero_grad(set_to_none=none)
    return losses


def usual(model):
    def step(**batch):
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_trains_as_the_usual_step(recorded, none, micro_batches):
    model = model_of(recorded)
    other = copy.deepcopy(model)
    step = fastlora.GraphedStep(model)
    found = trained(model, step, none, micro_batches)
    assert step.replayed == 6 * micro_batches - 2
    assert len(recorded.seen) == 1
    for ours, theirs in zip(found, trained(other, usual(other), none, micro_batches), strict=True):
        assert torch.equal(ours, theirs)


def test_each_shape_has_its_graph_and_only_so_many(recorded):
    model = model_of(recorded)
    other = copy.deepcopy(model)
    step = fastlora.GraphedStep(model, warm_up=1, most=2)
    found = trained(model, step, True, steps=12, rows=lambda number: 1 + number % 3)
    assert (len(recorded.seen), step.replayed, step.usual) == (2, 6, 6)
    assert list(step.reasons.values()) == ["more than 2 kinds of batches"]
    for ours, theirs in zip(found, trained(other, usual(other), True, steps=12, rows=lambda n: 1 + n % 3), strict=True):
        assert torch.equal(ours, theirs)


def test_modes_other_arguments_and_parameters_that_moved_are_noticed(recorded):
    model = model_of(recorded)
    step = fastlora.GraphedStep(model, warm_up=1)
    for _ in range(3):
        step(**batch(0))
    assert len(recorded.seen) == 1
    model.eval()
    for _ in range(2):
        step(**batch(0))
    assert len(recorded.seen) == 2
    model.train()
    step(**batch(0), use_cache=False)
    assert len(recorded.seen) == 2
    for p in model.parameters():
        p.data = p.data.clone()
    before = step.replayed
    step(**batch(0))
    assert step.replayed == before
    step(**batch(0))
    assert len(recorded.seen) == 3


def test_a_parameter_without_gradient_keeps_none(recorded):
    model = model_of(recorded)
    spare = nn.Parameter(torch.ones(2))
    model.register_parameter("spare", spare)
    step = fastlora.GraphedStep(model, warm_up=1)
    for _ in range(3):
        step(**batch(0))
    assert step.replayed == 2
    assert spare.grad is None


def test_what_cannot_be_recorded_runs_as_usual_and_says_why(recorded, monkeypatch):
    model = model_of(recorded)
    other = copy.deepcopy(model)

    def fails(step, pool):
        for p in model.parameters():
            p.grad = None
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphed_step, "_recorded", fails)
    step = fastlora.GraphedStep(model)
    found = trained(model, step, False)
    assert (step.replayed, step.usual) == (0, 6)
    assert list(step.reasons.values()) == ["RuntimeError: operation not permitted"]
    for ours, theirs in zip(found, trained(other, usual(other), False), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoints_do_not_read_the_random_state_while_recorded(recorded):
    model = model_of(recorded)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    reads = []

    def noted(*args, **options):
        reads.append(options.get("preserve_rng_state", True))
        return checkpoint(*args, **options)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = functools.partial(noted, use_reentrant=False)
    step = fastlora.GraphedStep(model, warm_up=1)
    for _ in range(2):
        step(**batch(0))
    layers = model.config.num_hidden_layers
    assert reads[: 2 * layers] == [True] * layers + [False] * layers
    loss = model(**batch(0)).loss
    assert reads[-layers:] == [True] * layers
    loss.backward()


def test_no_mask_is_made_while_recording_where_nothing_is_padded(recorded, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    own = masking_utils.is_tracing, masking_utils.find_packed_sequence_indices
    assert own[0](None)
    model, masks = model_of(recorded), []
    model.config.use_cache = False  # with a cache, position ids are not looked at
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    step = fastlora.GraphedStep(model, warm_up=1)
    for kind in (batch(0), {**batch(0), "position_ids": torch.arange(12).remainder(6).expand(2, -1)}):
        step(**kind)
        masks.clear()
        step(**kind)  # recorded, which attends once a layer; the stand-in's replay follows
        recording = masks[: model.config.num_hidden_layers]
        assert [mask is not None for mask in recording] == ["position_ids" in kind] * len(recording)
    assert (masking_utils.is_tracing, masking_utils.find_packed_sequence_indices) == own


def test_obstacles():
    model = llama()
    assert graphed_step.obstacle(model) == "the model is not on a CUDA device"
    with pytest.raises(ValueError, match="warm_up"):
        fastlora.GraphedStep(model, warm_up=0)
    step = fastlora.GraphedStep(model, warm_up=1)
    with pytest.raises(ValueError, match="labels is a list"):
        step(input_ids=tokens(), labels=[1])
    for _ in range(3):
        step(input_ids=tokens(), labels=tokens())
    assert (step.usual, list(step.reasons.values())) == (3, ["the model is not on a CUDA device"])
