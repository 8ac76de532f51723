"""The loss of a causal model from hidden states: equal to transformers', and logits for whoever reads them."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers import between, causal_loss
from fastlora.layers.lazy_logits import LazyLogits
from tests.support.models import SIZES, llama, randomize, tokens, transformers

FAMILIES = {
    "Llama": {}, "Gemma2": {"head_dim": 16}, "Cohere": {}, "Granite": {"logits_scaling": 8.0},
    "GPTNeoX": {}, "Mamba": {"state_size": 4}, "Mixtral": {"num_local_experts": 2, "output_router_logits": True},
}  # fmt: skip
OURS = {"norm": False, "rotary": False, "mlp": False}


def model_of(name="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **FAMILIES[name], **options}))
    return model.eval()


def batch_of(first=3):
    ids = tokens()
    labels = ids.clone()
    labels[:, :first] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def step(model, **batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def calls_of(head):
    """The rows that a head multiplies."""
    rows = []
    head.register_forward_hook(lambda module, args, y: rows.append(y.shape[:-1].numel()))
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_gradients_and_logits_are_the_familys_own(name):
    model = model_of(name)
    for more in (
        {}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": torch.randint(0, 64, tokens().shape)},
    ):  # fmt: skip
        batch = {**batch_of(), **more}
        plain, expected = step(model, **batch)
        fastlora.speed_up(model, **OURS)
        assert {row.part: row.sped_up for row in model.fastlora_report.parts}["loss"]
        ours, found = step(model, **batch)
        fastlora.restore(model)
        torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-6, atol=0)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
        assert list(ours.keys()) == list(plain.keys())
        assert type(ours) is type(plain)
        assert type(ours.logits) is LazyLogits
        torch.testing.assert_close(ours.logits + 0, plain.logits)


@pytest.mark.parametrize("training", [True, False])
def test_the_head_multiplies_target_tokens_once(training):
    model = fastlora.speed_up(model_of(), **OURS).train(training)
    rows, batch = calls_of(model.lm_head), batch_of()
    out = model(**batch)
    assert sum(rows) == (batch["labels"] != -100).sum()
    assert (out.logits.shape, out.logits.dtype) == ((*tokens().shape, 64), torch.float32)
    assert out.logits.float().shape == out.logits.shape
    assert len(out.logits) == 2
    assert len(rows) == 1, "nothing has read the logits"
    first = out.logits[0, 0]
    assert rows[1:] == [tokens().numel()]
    assert torch.equal(out.logits.float()[0, 0], first)
    assert len(rows) == 2, "they are computed once"


def test_logits_carry_gradients_and_survive_copies():
    model = model_of()
    batch = batch_of()
    plain = model(**batch).logits
    plain.square().sum().backward()
    expected = model.model.embed_tokens.weight.grad.clone()
    fastlora.speed_up(model, **OURS).zero_grad()
    out = model(**batch)
    with torch.no_grad():
        assert torch.equal(out.logits.argmax(-1), plain.argmax(-1))
    assert out.logits.requires_grad
    out.logits.square().sum().backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected)
    with torch.no_grad():
        out = model(**batch)
    file = io.BytesIO()
    torch.save(out.logits, file)
    file.seek(0)
    for other in (copy.deepcopy(out.logits), torch.load(file), torch.as_tensor(out.logits.numpy())):
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, plain.detach())
    assert not model(**batch).logits.detach().requires_grad


def test_logits_below_torch_function_are_values_without_a_graph():
    model = fastlora.speed_up(model_of(), **OURS)
    out = model(**batch_of())

    class Below(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.ops.aten.mul.Tensor(x, 2.0)

    found = Below.apply(out.logits)
    assert not found.requires_grad
    torch.testing.assert_close(found, out.logits.detach() * 2)


def test_autocast_is_that_of_the_call():
    model = fastlora.speed_up(model_of(), **OURS)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model_of()(**batch_of())
        out = model(**batch_of())
    assert out.logits.dtype is plain.logits.dtype is torch.bfloat16
    assert (out.logits + 0).dtype is torch.bfloat16
    torch.testing.assert_close(out.logits + 0, plain.logits)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("way", ["tuple", "kept", "own loss", "no labels", "compiled"])
def test_other_calls_take_the_models_own_way(way):
    model = fastlora.speed_up(model_of(), **OURS)
    batch, rows = batch_of(), calls_of(model.lm_head)
    everything = tokens().numel()
    if way == "tuple":
        found = model(**batch, return_dict=False)
        assert type(found) is tuple
        logits = found[1]
    elif way == "own loss":
        model.loss_function = lambda logits, labels, vocab_size, **_: logits.mean()
        found = model(**batch)
        logits = found.logits
        assert torch.equal(found.loss, logits.mean())
    elif way == "kept":
        logits = model(input_ids=batch["input_ids"], logits_to_keep=2).logits
        everything = 2 * len(tokens())
    elif way == "no labels":
        logits = model(input_ids=batch["input_ids"]).logits
    else:
        torch._dynamo.reset()
        compiled = torch.compile(model_of_sped_up(), backend="aot_eager", fullgraph=True)
        logits = compiled(**batch).logits
        rows.append(everything)
    assert type(logits) is torch.Tensor
    assert rows == [everything]


def model_of_sped_up():
    return fastlora.speed_up(model_of(), **OURS)


def test_positional_labels_and_two_models_one_in_the_other():
    inner, outer = model_of_sped_up(), model_of_sped_up()
    batch, losses = batch_of(), []
    outer.model.register_forward_hook(lambda *_: losses.append(inner(**batch).loss))
    out = outer(batch["input_ids"], None, None, None, None, batch["labels"])
    assert torch.equal(out.loss, losses[0])
    assert causal_loss._active.calls == []


def test_an_error_in_the_backbone_leaves_nothing_behind():
    model = model_of_sped_up()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6), labels=torch.zeros(1, 4, dtype=torch.int64))
    assert causal_loss._active.calls == []
    assert isinstance(model.lm_head, nn.Linear)


def test_no_target_at_all_is_as_in_transformers():
    batch = batch_of(first=1000)
    for more in ({}, {"num_items_in_batch": 3}):
        plain, ours = model_of()(**batch, **more).loss, model_of_sped_up()(**batch, **more).loss
        torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("kind", ["nf4", "peft", "saved", "tied"])
def test_heads_that_are_adapted_quantized_or_trained(kind):
    if kind == "nf4":
        model = randomize(fastlora.replace_linear(model_of(), r=4, quantize="nf4", target_modules=["lm_head"]))
    elif kind == "tied":
        model = model_of(tie_word_embeddings=True)
    else:
        peft = pytest.importorskip("peft")
        how = {"target_modules": ["lm_head"]} if kind == "peft" else {"modules_to_save": ["lm_head"]}
        config = peft.LoraConfig(r=4, **({"target_modules": ["q_proj"]} | how))
        model = randomize(peft.get_peft_model(model_of(), config))
    plain, expected = step(model, **batch_of())
    fastlora.speed_up(model, **OURS)
    ours, found = step(model, **batch_of())
    assert any("loss" in between.parts_of(module) for module in model.modules())
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    assert any("lm_head" in name for name in found) == (kind != "tied")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


def test_known_targets_save_the_search(monkeypatch):
    model, batch = model_of_sped_up(), batch_of()
    expected = model(**batch).loss
    places = torch.cat([torch.arange(2, 11), torch.arange(14, 23)])[: (batch["labels"] != -100).sum()]
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    places = (shifted != -100).nonzero()[:, 0]
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    with causal_loss.targets_known(places):
        assert torch.equal(model(**batch).loss, expected)


class Tripled(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **options):
        found = super().forward(input_ids=input_ids, labels=labels, **options)
        if labels is not None:
            found.loss = 3 * found.loss
        return found


class Squared(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **options):
        hidden = self.model(input_ids=input_ids, **options).last_hidden_state
        logits = self.lm_head(hidden) ** 2
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class ByHand(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **options):
        logits = self.lm_head(self.model(input_ids=input_ids, **options).last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Masking(transformers.LlamaForCausalLM):
    """Has no loss where the attention mask is 0."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **options)


class Cutting(transformers.LlamaForCausalLM):
    """Has a loss over the last tokens, where it is told."""

    def forward(self, input_ids=None, labels=None, last=0, **options):
        logits = self.lm_head(self.model(input_ids=input_ids, **options).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits[:, -last:].contiguous(), labels[:, -last:], self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Twice(transformers.LlamaForCausalLM):
    """Multiplies by its head once more, where it is told."""

    def forward(self, input_ids=None, labels=None, more=False, **options):
        found = super().forward(input_ids=input_ids, labels=labels, **options)
        if more:
            found.loss = found.loss + self.lm_head(self.model(input_ids=input_ids).last_hidden_state).mean()
        return found


@pytest.mark.parametrize(
    ("kind", "options"), [(Masking, {"attention_mask": True}), (Cutting, {"last": 4}), (Twice, {"more": True})]
)
def test_a_call_that_does_more_than_the_trial_showed_gives_its_own_loss(kind, options):
    model, batch = kind(llama().config), batch_of()
    if "attention_mask" in options:
        options = {"attention_mask": torch.ones_like(batch["input_ids"]).index_fill(1, torch.tensor([5, 6]), 0)}
    for more in ({}, options):
        _, expected = step(model, **batch, **more)
        wanted = model(**batch, **more).loss
        fastlora.speed_up(model, **OURS)
        made_again = bool(more) and kind is not Masking
        with pytest.warns(match="made twice") if made_again else contextlib.nullcontext():
            out, found = step(model, **batch, **more)
        torch.testing.assert_close(out.loss, wanted)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
        fastlora.restore(model)
    assert causal_loss._active.calls == []


def test_under_inference_mode():
    model = model_of_sped_up()
    with torch.inference_mode():
        out = model(**batch_of())
        torch.testing.assert_close(out.loss, model_of()(**batch_of()).loss)
    assert torch.equal(out.logits.argmax(-1), model_of()(**batch_of()).logits.argmax(-1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tripled, "something else"),
        (Squared, "neither a factor nor a cap"),
        (ByHand, "does not come from its loss_function"),
    ],
)
def test_what_only_looks_like_a_causal_loss_is_left_and_named(kind, reason):
    model = kind(llama().config)
    with pytest.raises(ValueError, match=reason):
        fastlora.speed_up(model, **OURS)
    assert type(model) is kind


@pytest.fixture
def own_precision():
    """accelerate keeps the precision of a process's first trainer for all later ones."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


def test_trainer_trains_evaluates_and_measures_the_same(tmp_path, own_precision):
    rows = [{key: value[0] for key, value in batch_of().items() if key != "use_cache"} for _ in range(4)]

    def run(model, **options):
        found = {}

        def measure(prediction):
            found["logits"] = prediction.predictions
            return {}

        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            logging_steps=1, disable_tqdm=True, bf16=True, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=measure if options else None
        )
        trainer.train()
        found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found["eval"] = trainer.evaluate()["eval_loss"]
        return found

    plain, ours = run(model_of()), model_of_sped_up()
    counted = calls_of(ours.lm_head)
    found = run(ours)
    targets = (batch_of()["labels"][0] != -100).sum().item()
    assert sum(counted) == (3 * 2 + 4) * targets, "logits were computed for nobody"
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    assert found["eval"] == pytest.approx(plain["eval"], rel=1e-2)
    assert run(model_of_sped_up(), measured=True)["logits"].shape == (4, tokens().shape[1], 64)
