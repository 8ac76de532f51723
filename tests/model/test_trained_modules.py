"""modules_to_save: trained in full, saved with the adapter, opened by peft; tied weights stay tied."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear
from tests.support.models import bnb_llama, llama, logits, qwen2, randomize, snapshot, tokens, trained

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("base", [llama, qwen2])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"], ["model.norm"], ["norm"]])
def test_trained_saved_and_opened_by_peft(base, names, tmp_path):
    peft = pytest.importorskip("peft")
    model = randomize(replace_linear(base(), r=4, target_modules=["q_proj", "v_proj"], modules_to_save=names))
    wanted = {name for name, _ in model.named_parameters() if any(f"{n}." in name for n in names)}
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert free == wanted
    assert free
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = logits(trained(model))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    assert len(free) == sum("modules_to_save" in name for name, p in theirs.named_parameters() if p.requires_grad)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=names)
    others = peft.get_peft_model(base(), config)
    assert len(free) == sum("modules_to_save" in name for name, p in others.named_parameters() if p.requires_grad)
    ours = load_adapter(base(), tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-6)
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n} == wanted
    other = replace_linear(base(), r=4, target_modules=["q_proj", "v_proj"], modules_to_save=names)
    torch.testing.assert_close(logits(load_adapter(other, tmp_path)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bare", [True, False])
def test_we_open_what_peft_saves(bare, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["lm_head", "norm"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=names)
    theirs = trained(randomize(peft.get_peft_model(llama(), config)))
    theirs.save_pretrained(tmp_path)
    model = llama() if bare else replace_linear(llama(), r=4, target_modules=["q_proj"], modules_to_save=names)
    torch.testing.assert_close(logits(load_adapter(model, tmp_path)), logits(theirs), rtol=1e-5, atol=1e-6)


def test_tied_weights_stay_tied_and_are_saved_under_both_names(tmp_path):
    peft = pytest.importorskip("peft")

    def base():
        return llama(tie_word_embeddings=True)

    model = randomize(replace_linear(base(), r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    expected = logits(trained(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base(), tmp_path)), expected, rtol=1e-4, atol=1e-5)
    again = load_adapter(base(), tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)


def test_a_file_with_one_of_two_tied_modules_unties_them(tmp_path):
    """peft trains a copy of a tied head only; here too, as the embedding would change otherwise."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="tied"):
        theirs = peft.get_peft_model(llama(tie_word_embeddings=True), config)
    trained(randomize(theirs)).save_pretrained(tmp_path)
    model = load_adapter(llama(tie_word_embeddings=True), tmp_path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, llama(tie_word_embeddings=True).model.embed_tokens.weight)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


def test_they_are_neither_adapted_nor_quantized():
    model = replace_linear(llama(), r=4, modules_to_save=["up_proj"], quantize="nf4")
    kinds = {type(layer.mlp.up_proj) for layer in model.model.layers}
    assert kinds == {torch.nn.Linear}
    assert isinstance(model.model.layers[0].mlp.down_proj, LoRALinear)
    assert isinstance(model.model.layers[0].mlp.down_proj.base_layer, NF4Linear)
    rows = {row.name: row for row in fastlora.report(model).rows}
    row = rows["model.layers.0.mlp.up_proj"]
    assert (row.replaced, row.reason) == (False, "trained in full (modules_to_save)")
    trained(model)


def test_what_cannot_be_trained_is_refused():
    model = bnb_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"modules_to_save: 'model\.layers\.0\.mlp\.up_proj' holds a weight in 4 bits"):
        replace_linear(model, target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(ValueError, match=r"modules_to_save: 'model\.layers\.0\.mlp\.act_fn' has no parameters"):
        replace_linear(model, target_modules=["q_proj"], modules_to_save=["act_fn"])
    assert snapshot(model) == before


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"]}
    save_adapter(randomize(replace_linear(llama(), **options, modules_to_save=["lm_head"])), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.model.lm_head.weight"
    for change, message in (
        ({key: torch.ones(3, 64)}, r"lm_head\.weight has shape \[3, 64\] in the file, \[64, 64\] in the model"),
        ({"base_model.model.lm_head.odd": torch.ones(3)}, r"lm_head\.odd is in the file, but not in the model"),
    ):
        save_file({**good, **change}, path)
        model = llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert snapshot(model) == before
    save_file(good, path)
    model = replace_linear(llama(), **options)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"the file holds \['lm_head'\], the model trains none"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_16_bit_model_they_are_trained_in_fp32(dtype, tmp_path):
    model = replace_linear(llama().to(dtype), r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert torch.equal(logits(model), logits(llama().to(dtype)))
    assert logits(model).dtype is dtype
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    before = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    still = {name: float((p == before[name]).float().mean()) for name, p in model.named_parameters() if name in before}
    assert max(share for name, share in still.items() if "lora_A" not in name) < 0.01, still
    save_adapter(model, tmp_path)
    again = load_adapter(llama().to(dtype), tmp_path)
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, model.get_parameter(name)), name
    expected = logits(model)
    merged = merge(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert type(merged.lm_head) is nn.Linear
    torch.testing.assert_close(logits(merged), expected, rtol=2e-2, atol=2e-2)


def test_adapter_dtype_is_for_them_too():
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "adapter_dtype": torch.bfloat16}
    model = replace_linear(llama().bfloat16(), **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


TIED_APART = [
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", TIED_APART)
def test_two_weights_of_a_file_stay_two(options, tmp_path):
    """peft trains copies of an embedding and of a head that the base ties."""
    peft = pytest.importorskip("peft")

    def base():
        return llama(tie_word_embeddings=True)

    theirs = trained(peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"], **options)).train())
    theirs.eval().save_pretrained(tmp_path / "theirs")
    bare = load_adapter(base(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(bare), logits(theirs), rtol=1e-4, atol=1e-5)
    save_adapter(bare, tmp_path / "ours")
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path / "ours").eval()), logits(bare))
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(bare), rtol=1e-4, atol=1e-5)
    apart = bare.lm_head.weight is not bare.model.embed_tokens.weight
    if "modules_to_save" in options:
        assert bare.config.tie_word_embeddings is not apart
        assert apart is not options.get("ensure_weight_tying", False)
    merge(bare).save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(whole), logits(theirs), rtol=1e-4, atol=1e-5)


def test_two_weights_of_a_file_untie_a_model_that_trains_both_as_one(tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    save_adapter(replace_linear(llama(), **options), tmp_path)
    model = replace_linear(llama(tie_word_embeddings=True), **options)
    with pytest.warns(
        UserWarning, match=r"two weights.*lm_head.*no longer tied|two weights.*embed_tokens.*no longer tied"
    ):
        load_adapter(model, tmp_path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(module.weight.requires_grad for module in (model.lm_head, model.model.embed_tokens))
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), logits(llama()))
