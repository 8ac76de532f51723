"""Full fine-tuning, Houlsby adapters and the protocol that all methods share."""

import copy

import pytest
import torch

from fastlora.files.peft_files import read_adapter, write_adapter
from fastlora.memory.shape import shape_of
from fastlora.methods import METHODS, Full, Houlsby, LoRA
from fastlora.methods.houlsby import WEIGHTS, Adapter
from tests.methods.models import FAMILIES, batch, tiny

OPTIONS = {
    "lora": {"r": 4},
    "houlsby": {"bottleneck": 6},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "full": {},
}


def _trained(name, model):
    method = METHODS[name](**OPTIONS[name])
    method.attach(model)
    optimizer = torch.optim.SGD(method.parameters(model), 0.1)
    for _ in range(3):
        model(**batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_is_what_the_forecast_counts(name, family):
    model = tiny(family)
    shape = shape_of(model.config.to_dict())
    method = METHODS[name](**OPTIONS[name])
    method.attach(model)
    assert sum(p.numel() for p in method.parameters(model)) == method.memory(shape)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_and_loaded_gives_the_same_logits(name, tmp_path):
    model = tiny("llama")
    plain = copy.deepcopy(model)
    method = _trained(name, model)
    wanted = model(**batch(model)).logits
    assert not torch.equal(wanted[:, -9:], plain(**batch(plain)).logits)
    method.save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= set(method.files)
    again = METHODS[name](**OPTIONS[name])
    again.attach(plain)
    again.load(plain, tmp_path)
    assert torch.equal(plain(**batch(plain)).logits, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_a_damaged_file_is_refused_and_the_model_stays(name, tmp_path):
    model = tiny("llama")
    method = _trained(name, model)
    method.save(model, tmp_path)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    weights = tmp_path / method.files[-1]
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        method.load(model, tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"does not exist|is missing"):
        method.load(model, tmp_path)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_an_adapter_of_64_on_4096_has_528448_values():
    adapter = Adapter(4096, 64, torch.device("meta"))
    assert sum(p.numel() for p in adapter.parameters()) == 528_448
    assert adapter.down.weight.numel() + adapter.up.weight.numel() == 524_288


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_houlsby_adapter_changes_nothing_and_a_trained_one_is_inside_both_branches(family):
    model = tiny(family).eval()
    plain = model(**batch(model)).logits
    Houlsby(6).attach(model)
    assert torch.equal(model(**batch(model)).logits, plain)
    block = model.model.layers[0]
    for adapter in block.houlsby.values():
        torch.nn.init.normal_(adapter.up.weight)
    x = torch.randn(1, 4, 32)
    positions = torch.arange(4)[None]
    around = model.model.rotary_emb(x, positions)
    found = block(x, attention_mask=None, position_ids=positions, position_embeddings=around)
    attended, *_ = block.self_attn.forward(block.input_layernorm(x), position_embeddings=around, attention_mask=None)
    y = x + block.houlsby["attention"](attended)
    y = y + block.houlsby["output"](block.mlp.forward(block.post_attention_layernorm(y)))
    torch.testing.assert_close(found if torch.is_tensor(found) else found[0], y)


def test_houlsby_says_what_a_model_lacks():
    with pytest.raises(ValueError, match="has no list of blocks"):
        Houlsby().attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="bottleneck must be at least 1"):
        Houlsby(0)
    model = tiny("llama")
    Houlsby().attach(model)
    with pytest.raises(ValueError, match="such adapters already"):
        Houlsby().attach(model)
    other = tiny("llama", hidden_size=64)
    Houlsby().attach(other)


def test_a_houlsby_file_of_another_size_is_refused(tmp_path):
    model, other = tiny("llama"), tiny("llama")
    Houlsby(6).attach(model)
    Houlsby(8).attach(other)
    Houlsby(8).save(other, tmp_path)
    with pytest.raises(ValueError, match="and the model needs"):
        Houlsby(6).load(model, tmp_path)


def test_a_whole_model_is_loaded_by_transformers(tmp_path):
    import transformers

    model = tiny("llama", tie_word_embeddings=True)
    Full().save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch(again)).logits, model(**batch(model)).logits)
    Full().load(tiny("llama", tie_word_embeddings=True), tmp_path)
    with pytest.raises(ValueError, match="another model's file"):
        Full().load(tiny("qwen2"), tmp_path)
    with pytest.raises(ValueError, match="has another shape"):
        Full().load(tiny("llama", tie_word_embeddings=True, intermediate_size=64), tmp_path)


def test_a_quantized_model_is_not_trained_whole():
    model = tiny("llama", hidden_size=64)
    LoRA(quantize="nf4").attach(model)
    with pytest.raises(ValueError, match="quantized cannot be trained"):
        Full().attach(model)


def test_only_what_changes_weights_is_merged():
    model = tiny("llama")
    method = _trained("lora", model)
    wanted = model.eval()(**batch(model)).logits
    method.merge(model)
    torch.testing.assert_close(model(**batch(model)).logits, wanted, rtol=1e-4, atol=1e-5)
    for name in ("houlsby", "prefix", "prompt"):
        with pytest.raises(ValueError, match="cannot be merged"):
            METHODS[name]().merge(tiny("llama"))
    Full().merge(tiny("llama"))


def test_a_houlsby_file_has_adapterhubs_names_and_one_under_another_name_is_read(tmp_path):
    """The names and the config are those that `adapters` 1.3.0 writes for a Llama."""
    model, other = tiny("llama"), tiny("llama")
    method = Houlsby(8)
    method.attach(model)
    for p in method.parameters(model):
        torch.nn.init.normal_(p, std=0.3)
    method.save(model, tmp_path)
    config, tensors = read_adapter(tmp_path, WEIGHTS)
    kinds = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    assert tensors.keys() == {
        f"model.layers.{layer}.{place}_adapters.adapters.default.{kind}"
        for layer in range(2) for place in ("attention", "output") for kind in kinds
    }  # fmt: skip
    assert config["config"]["reduction_factor"] == 4
    assert (config["hidden_size"], config["model_type"], config["name"]) == (32, "llama", "default")
    renamed = {name.replace(".default.", ".mine."): t for name, t in tensors.items()}
    write_adapter(tmp_path / "mine", {**config, "name": "mine"}, renamed, WEIGHTS)
    again = Houlsby(8)
    again.attach(other)
    again.load(other, tmp_path / "mine")
    assert torch.equal(other(**batch(other)).logits, model(**batch(model)).logits)
    for change, said in (
        ({"non_linearity": "swish"}, "have swish inside"),
        ({"mh_adapter": False}, "it holds no adapters"),
    ):
        write_adapter(tmp_path / "no", {**config, "config": {**config["config"], **change}}, tensors, WEIGHTS)
        with pytest.raises(ValueError, match=said):
            again.load(other, tmp_path / "no")
