"""transformers' own features on adapted models: gradient checkpointing of both kinds, generation with either cache."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import fastlora
from tests.support.models import bnb_llama, llama, qwen2, randomize, tokens
from tests.support.peft_models import counts, wrapped

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def in_peft(base=llama, **options):
    return wrapped(base, **{"target_modules": TARGETS, **options})


def gradients(model):
    """(loss, gradients of the adapters), of one step whose dropout masks come from one seed."""
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


MODELS = {
    "peft": lambda **options: fastlora.replace_linear(in_peft(**options)),
    "peft in bf16": lambda **options: fastlora.replace_linear(in_peft(lambda: llama().to(torch.bfloat16), **options)),
    "bitsandbytes": lambda **options: fastlora.replace_linear(in_peft(bnb_llama, **options)),
    "own nf4": lambda **options: randomize(fastlora.replace_linear(llama(), r=4, quantize="nf4", **options)),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same_with_checkpointing(kind, dropout, use_reentrant):
    """The recomputation draws the masks of the forward pass again, and every gradient is the same bit for bit."""
    model = MODELS[kind](lora_dropout=dropout).train()
    loss, expected = gradients(model)
    assert len(expected) in (2 * 6, 2 * 14)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    before = counts(model)[0]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    again, found = gradients(model)
    assert torch.equal(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    sped_up, back = counts(model)
    assert back == 0
    assert sped_up == 3 * before, "each layer runs forward, forward again, and recomputes"


def test_dropout_is_drawn_anew_at_every_step():
    model = MODELS["peft"](lora_dropout=0.3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, first = gradients(model)
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert any(not torch.equal(p.grad, first[name]) for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("base", [llama, qwen2])
def test_generation_gives_pefts_tokens(base, cache):
    plain = in_peft(base).eval()
    sped_up = fastlora.replace_linear(copy.deepcopy(plain))
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    given = {"input_ids": tokens()[:, :5], "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    expected, found = (
        model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
        for model in (plain, sped_up)
    )
    assert expected.sequences.shape == (2, 17)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
    assert counts(sped_up) == (6 * 12, 0)
    with plain.disable_adapter():
        assert not torch.equal(plain.generate(**given, **options), expected.sequences), "the update is seen"


def test_generation_over_bitsandbytes():
    """Decoding repacks no weight of a sped-up layer; that would lose precision."""
    plain = in_peft(bnb_llama, target_modules="all-linear").train()  # in eval mode bitsandbytes repacks weights
    sped_up = fastlora.replace_linear(in_peft(bnb_llama, target_modules="all-linear")).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    given = {"input_ids": tokens()[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert torch.equal(sped_up.generate(**given, **options), plain.generate(**given, **options))
    assert counts(sped_up) == (14 * 8, 0)


def test_generation_compiled_by_transformers():
    """A static cache lets `generate` compile the decoding step: one graph for all tokens, the eager tokens."""
    sped_up = fastlora.replace_linear(in_peft(lambda: llama(num_hidden_layers=1))).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    given = {"input_ids": tokens()[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    expected = sped_up.generate(**given, **options)
    before = counts(sped_up)[0]
    torch._dynamo.reset()
    counters.clear()
    how = transformers.CompileConfig(backend="aot_eager", fullgraph=True)
    how._compile_all_devices = True  # on the CPU, where transformers would not
    assert torch.equal(sped_up.generate(**given, **options, compile_config=how), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counts(sped_up)[0] - before < before, "what is compiled is not counted"


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_training_after_inference_mode(base, use_dora):
    """A training step must be able to save for backward what a layer kept from a call in inference mode."""
    sped_up, fresh = (
        fastlora.replace_linear(in_peft(base, target_modules="all-linear", use_dora=use_dora)) for _ in "ab"
    )
    with torch.inference_mode():
        sped_up.eval()(tokens())
    loss, found = gradients(sped_up.train())
    expected_loss, expected = gradients(fresh.train())
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    assert counts(sped_up) == (28, 0)
