"""The life of peft models with sped-up layers: several adapters, more of them later, restored, copied, compiled."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.replace import replace_linear
from tests.support.models import bnb_llama, llama, qwen2, tokens
from tests.support.peft_models import add_another, counts, lora_layers, reasons, run, wrapped

peft = pytest.importorskip("peft")
linear = pytest.importorskip("fastlora.peft_layers.linear")
kept_norms = pytest.importorskip("fastlora.peft_layers.kept_norms")
row_norms = kept_norms.row_norms


@pytest.mark.parametrize("tie", [False, True])
def test_what_else_peft_trains_works_next_to_sped_up_layers(tie, tmp_path):
    """modules_to_save, trained tokens and their tied head are peft's modules, which fastlora does not touch."""

    def make():
        base = wrapped(
            lambda: llama(tie_word_embeddings=tie), modules_to_save=["model.norm"], trainable_token_indices=[3, 9]
        )
        return base.train()

    plain, model = make(), replace_linear(make())
    for one, other in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counts(model) == (6, 0)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 6 * 2 + 2
    model.save_pretrained(tmp_path)
    other = replace_linear(peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tie), tmp_path))
    torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits)


def test_a_second_adapter_and_switching():
    model = replace_linear(wrapped())
    first = model(tokens()).logits
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    torch.manual_seed(8)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "other" in name:
            nn.init.normal_(parameter, std=0.2)
    model.set_adapter("other")
    second = model(tokens()).logits
    assert not torch.allclose(first, second)
    assert reasons(model) == {"no adapter of this layer is active"}
    model.set_adapter("default")
    assert torch.equal(model(tokens()).logits, first)
    assert sum(hasattr(layer, "fastlora_calls") for layer in lora_layers(model)) == 8, "o_proj is new"


@pytest.mark.parametrize("base", [llama, qwen2, bnb_llama])
def test_several_active_adapters_run_as_one(base):
    plain, model = wrapped(base).train(), replace_linear(wrapped(base)).train()
    found = []
    for each in (plain, model):
        torch.manual_seed(11)
        add_another(each)
        for layer in lora_layers(each):
            layer.scaling["other"] = 0.75
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("lora_" in name)
        found.append(run(each))
    assert counts(model) == (6, 0)
    assert len(found[1]) == 1 + 6 * 2 * 2
    for one, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_several_adapters_drop_out_each_by_its_own_mask():
    plain, model = (wrapped(lora_dropout=0.3).train() for _ in range(2))
    found = []
    for each in (plain, replace_linear(model)):
        add_another(each)
        each.train()
        torch.manual_seed(5)
        found.append(each(tokens()).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert counts(model) == (6, 0)
    assert not torch.allclose(found[1], model(tokens()).logits, atol=1e-3), "other masks, another result"


def test_layers_that_peft_adds_later_are_sped_up_too(tmp_path):
    model = replace_linear(wrapped())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    assert [hasattr(layer, "fastlora_calls") for layer in lora_layers(model)] == [True] * 8
    wrapped(target_modules=["up_proj"]).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "third")
    assert [hasattr(layer, "fastlora_calls") for layer in lora_layers(model)] == [True] * 10
    report = fastlora.report(model)
    assert sum(row.replaced for row in report.rows) == 10
    untouched = wrapped()
    untouched.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    assert not any(hasattr(layer, "fastlora_calls") for layer in lora_layers(untouched))


def test_injection_into_a_model_without_a_peft_model():
    first = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = replace_linear(peft.inject_adapter_in_model(first, llama()))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["v_proj"]), model, adapter_name="other")
    assert [hasattr(layer, "fastlora_calls") for layer in lora_layers(model)] == [True] * 4


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_dora_keeps_its_norms_until_something_changes(base, monkeypatch):
    formed = []
    monkeypatch.setattr(kept_norms, "row_norms", lambda *args: formed.append(1) or row_norms(*args))
    plain = wrapped(base, use_dora=True).train()
    model = replace_linear(copy.deepcopy(plain))
    for _ in range(2):
        for one, other in zip(run(model), run(plain), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counts(model) == (12, 0)
    assert len(formed) == 6, "one for each layer"
    for each in (plain, model):
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
    for one, other in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(formed) == 12
    run(copy.deepcopy(model))
    assert len(formed) == 18


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_restore_gives_plain_peft_back(base):
    plain, model = wrapped(base), replace_linear(wrapped(base))
    model(tokens())
    assert fastlora.restore(model) is model
    assert [type(a) for a in model.modules()] == [type(a) for a in plain.modules()]
    for a, b in zip(model.modules(), plain.modules(), strict=True):
        assert {name for name in vars(a) if "fastlora" in name} == set()
        assert vars(a).keys() == vars(b).keys()
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    with pytest.raises(ValueError, match="no layer of this model"):
        fastlora.restore(model)
    replace_linear(model)
    model(tokens())
    assert counts(model) == (6, 0)


def test_merge_and_unload_save_and_reload(tmp_path):
    plain, model = wrapped(), replace_linear(wrapped())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)
    merged = model.merge_and_unload()
    expected = plain.merge_and_unload()
    assert torch.equal(merged(tokens()).logits, expected(tokens()).logits)
    assert not any(type(module).__module__.startswith(("fastlora", "peft")) for module in merged.modules())


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_copies(base):
    model = replace_linear(wrapped(base)).train()
    expected = model(tokens()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    if base is llama:
        copies.append(pickle.loads(pickle.dumps(model)))
    before = counts(model)
    for other in copies:
        assert torch.equal(other(tokens()).logits, expected)
        ours, back = counts(other)
        assert (ours, back) == (before[0] + 6, 0)
        assert f"{ours} calls sped up" in other.fastlora_report.summary(), "the copied report counts the copy's calls"
    assert counts(model) == before


def test_linear4bit_in_eval_mode_is_not_repacked():
    model = replace_linear(wrapped(bnb_llama, target_modules="all-linear"))
    expected = model.train()(tokens()).logits
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens()).logits, expected)
    assert counts(model) == (28, 0)
    for layer in lora_layers(model):
        assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True
        assert linear.standing_reason(layer) == "bitsandbytes has repacked the base weight for CPU inference"


def test_hot_swapping_does_not_recompile(tmp_path):
    """peft turns scalings into tensors for this; our forward takes them."""
    hotswap = pytest.importorskip("peft.utils.hotswap")
    torch._dynamo.reset()
    other = wrapped(lambda: llama(num_hidden_layers=1), r=2, lora_alpha=7)
    torch.manual_seed(12)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    other.save_pretrained(tmp_path)
    expected = other.eval()(tokens(), use_cache=False).logits
    model = replace_linear(wrapped(lambda: llama(num_hidden_layers=1))).eval()
    first = model(tokens(), use_cache=False).logits
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(model(tokens(), use_cache=False).logits, first)
    assert counts(model) == (6, 0)
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=compiles)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, first)
    hotswap.hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert compiles.frame_count == 1


def test_a_swapped_model_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = replace_linear(wrapped(lambda: llama(num_hidden_layers=1)))
    expected = model(tokens(), use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)
    assert counts(model) == (3, 0), "calls inside a graph are not counted"
