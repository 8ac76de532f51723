"""transformers' own features on adapted models: gradient checkpointing of both kinds, generation with either cache."""

import copy
import re

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


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
SCAN = {**SMALL, "state_size": 8}
HYBRID = {**SMALL, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"T5": "ForConditionalGeneration", "Deberta": "ForMaskedLM"}
# Architectures whose forward multiplies by the weight of a linear layer itself, asks it for its dtype, or changes what
# the layer gives in place.
READERS = {
    "Mamba": {**SCAN, "time_step_rank": 4},
    "FalconMamba": {**SCAN, "time_step_rank": 4},
    "Mamba2": {**SCAN, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "Jamba": {**HYBRID, "num_experts": 2, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 4},
    "Deberta": {**SMALL, "intermediate_size": 64, "num_attention_heads": 4, "relative_attention": True,
                "pos_att_type": ["c2p", "p2c"]},
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pretraining_tp": 2,
              "slow_but_exact": True},
    "T5": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("architecture", READERS)
def test_every_adapter_counts_where_a_forward_reads_weights(architecture, quantize):
    torch.manual_seed(0)
    head = HEADS.get(architecture, "ForCausalLM")
    options = getattr(transformers, f"{architecture}Config")(**READERS[architecture])
    model = getattr(transformers, architecture + head)(options)
    model = randomize(fastlora.replace_linear(model, r=4, quantize=quantize)).eval()
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    merged = fastlora.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(input_ids=tokens(), labels=tokens()).logits, output.logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_does_not_load_is_noted():
    """peft refuses adapters on a layer that fused scans read, and there is no way to load ours with it."""
    for options, noted in (({}, True), ({"exclude_modules": ["out_proj"]}, False)):
        model = fastlora.replace_linear(
            transformers.MambaForCausalLM(transformers.MambaConfig(**READERS["Mamba"])), r=4, **options
        )
        notes = " ".join(model.fastlora_report.notes)
        assert ("peft loads no adapter on out_proj of a mamba model" in notes) == noted
    with pytest.raises(ValueError, match="'out_proj' is incompatible"):
        peft.get_peft_model(
            transformers.MambaForCausalLM(transformers.MambaConfig(**READERS["Mamba"])),
            peft.LoraConfig(target_modules="all-linear"),
        )


def test_the_report_names_layers_whose_weight_is_read():
    """T5 asks for the dtype of a weight at each call; that forms the adapted weight, which takes time."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    model = fastlora.replace_linear(transformers.T5ForConditionalGeneration(config), r=4, target_modules=["wi", "wo"])
    assert not fastlora.report(model).notes
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids)
    (note,) = fastlora.report(model).notes
    name = r"encoder.block.0.layer.1.DenseReluDense.wo"
    assert re.match(rf"the weight of 2 layers was read \d+ times, such as that of {name}", note)
