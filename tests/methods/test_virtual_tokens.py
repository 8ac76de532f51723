"""Prompt and prefix tuning: peft's logits and gradients, peft's files in both directions, generation."""

import copy

import pytest
import torch

from fastlora.methods import Prefix, Prompt
from fastlora.methods.virtual_tokens import ATTRIBUTE, KEY
from tests.methods.models import FAMILIES, batch, tiny

peft = pytest.importorskip("peft")
KINDS = {"prompt": Prompt, "prefix": Prefix}
COUNT = 5


def _peft(model, name):
    kind = peft.PromptTuningConfig if name == "prompt" else peft.PrefixTuningConfig
    return peft.get_peft_model(copy.deepcopy(model), kind(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))


def _of_peft(theirs):
    return theirs.prompt_encoder["default"].embedding.weight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KINDS)
def test_logits_loss_and_gradients_are_pefts(name, family):
    base = tiny(family)
    theirs = _peft(base, name)
    method = KINDS[name](COUNT)
    method.attach(base)
    ours = getattr(base, ATTRIBUTE)
    ours.weight.data.copy_(_of_peft(theirs).data)
    given = batch(base)
    mine, other = base(**given), theirs(**given)
    assert mine.logits.shape == other.logits.shape
    torch.testing.assert_close(mine.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(ours.weight.grad, _of_peft(theirs).grad, rtol=1e-4, atol=1e-7)
    assert [p for p in base.parameters() if p.requires_grad] == [ours.weight] == method.parameters(base)


@pytest.mark.parametrize("name", KINDS)
def test_files_go_both_ways(name, tmp_path):
    base = tiny("llama")
    plain = copy.deepcopy(base)
    method = KINDS[name](COUNT)
    method.attach(base)
    given = batch(base)
    wanted = base(**given).logits
    method.save(base, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    torch.testing.assert_close(theirs(**given).logits, wanted, rtol=1e-5, atol=1e-5)
    other = _peft(plain, name)
    other.save_pretrained(tmp_path / "theirs")
    method.load(base, tmp_path / "theirs")
    torch.testing.assert_close(base(**given).logits, other(**given).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_goes_on_after_the_trained_tokens(name, padded):
    model = tiny("llama")
    KINDS[name](COUNT).attach(model.eval())
    ids = torch.randint(1, 90, (2, 6))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = 0  # on the left
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(4):  # the same without a cache
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            more = (
                model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
                .logits[:, -1]
                .argmax(-1)
            )
        ids, mask = torch.cat([ids, more[:, None]], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("name", KINDS)
def test_text_is_where_it_starts(name):
    model = tiny("llama").eval()
    given = batch(model)
    ids = [7, 8, 9]
    front = torch.tensor((ids * 2)[:COUNT]).expand(len(given["input_ids"]), -1)
    whole = model(input_ids=torch.cat([front, given["input_ids"]], 1)).logits[:, COUNT:]
    KINDS[name](COUNT, ids).attach(model)
    found = model(input_ids=given["input_ids"]).logits[:, -given["input_ids"].shape[1] :]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_a_projection_is_saved_with_what_it_makes_and_training_goes_on(tmp_path):
    model = tiny("llama")
    plain = copy.deepcopy(model)
    method = Prefix(COUNT, projection=16)
    method.attach(model)
    given = batch(model)
    torch.optim.SGD(method.parameters(model), 0.5).zero_grad()
    model(**given).loss.backward()
    assert all(p.grad is not None for p in method.parameters(model))
    method.save(model, tmp_path)
    wanted = model(**given).logits
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(**given).logits, wanted, rtol=1e-5, atol=1e-5)
    again = Prefix(COUNT, projection=16)
    again.attach(plain)
    again.load(plain, tmp_path)
    assert torch.equal(plain(**given).logits, wanted)
    assert sum(p.numel() for p in method.parameters(model)) > COUNT * 2 * 2 * 2 * 8


@pytest.mark.parametrize(("name", "options", "said"), [
    ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1"),
    ("prompt", {"init_ids": []}, "init_text has no tokens"),
    ("prefix", {"projection": -1}, "prefix_projection must be at least 0"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        KINDS[name](**options)


def test_what_a_model_cannot_take_is_refused_before_anything_changes():
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="switch gradient_checkpointing off"):
        Prefix(COUNT).attach(model)
    assert all(p.requires_grad for p in model.parameters())
    Prompt(COUNT).attach(model)
    with pytest.raises(ValueError, match="trained tokens already"):
        Prompt(COUNT).attach(model)
    with pytest.raises(ValueError, match="no language model"):
        Prompt(COUNT).attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_something_else_is_refused_and_nothing_changes(name, tmp_path):
    model, other = tiny("llama"), tiny("llama")
    method, more = KINDS[name](COUNT), KINDS[name](COUNT + 1)
    method.attach(model)
    more.attach(other)
    more.save(other, tmp_path / "longer")
    before = getattr(model, ATTRIBUTE).weight.clone()
    with pytest.raises(ValueError, match=f"{KEY} is"):
        method.load(model, tmp_path / "longer")
    different = Prefix(COUNT) if name == "prompt" else Prompt(COUNT)
    third = tiny("llama")
    different.attach(third)
    different.save(third, tmp_path / "different")
    with pytest.raises(ValueError, match="it holds P"):
        method.load(model, tmp_path / "different")
    assert torch.equal(getattr(model, ATTRIBUTE).weight, before)
    with pytest.raises(ValueError, match="cannot be merged"):
        method.merge(model)
