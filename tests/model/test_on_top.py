"""peft's adapters on a model with fastlora's: refused by every way in, before anything changes."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers.on_top import REFUSAL
from tests.support.models import gpt2, llama, logits, randomize, snapshot, tokens, trained

peft = pytest.importorskip("peft")
AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
PEFT_TYPE_TO_CONFIG_MAPPING = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING

# What each method needs beside its targets.
NEEDED = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"},
    "IA3": {"feedforward_modules": []},
}
# They put tokens before the input, or beside attention, and wrap no layer.
PROMPTS = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"}
PROMPTS |= {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}


def config(kind="LORA", **options):
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    usual = {"target_modules": ["q_proj", "v_proj"], "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    known = {name: value for name, value in usual.items() if name in inspect.signature(make).parameters}
    try:
        return make(**{**known, **NEEDED.get(kind, {}), **options})
    except ImportError as error:
        pytest.skip(str(error))


def adapted(base=llama, **options):
    return randomize(fastlora.replace_linear(base(), **{"r": 4, **options}))


def saved(path):
    peft.get_peft_model(llama(), config()).save_pretrained(path)
    return path


WAYS = {
    "get_peft_model": lambda model, path: peft.get_peft_model(model, config()),
    "all-linear": lambda model, path: peft.get_peft_model(model, config(target_modules="all-linear")),
    "mixed": lambda model, path: peft.get_peft_model(model, config(), mixed=True),
    "other name": lambda model, path: peft.get_peft_model(model, config(), adapter_name="other"),
    "modules_to_save": lambda model, path: peft.get_peft_model(
        model, config(target_modules=["lm_head"], modules_to_save=["norm"])
    ),
    "PeftModel": lambda model, path: peft.PeftModel(model, config()),
    "PeftModelForCausalLM": lambda model, path: peft.PeftModelForCausalLM(model, config()),
    "PeftModel.from_pretrained": lambda model, path: peft.PeftModel.from_pretrained(model, saved(path)),
    "inject": lambda model, path: peft.inject_adapter_in_model(config(), model),
    "LoraModel": lambda model, path: peft.LoraModel(model, config(), "default"),
    "LoraModel, a dict": lambda model, path: peft.LoraModel(model, {"default": config()}, "default"),
    "add_adapter": lambda model, path: model.add_adapter(config()),
    "load_adapter": lambda model, path: model.load_adapter(saved(path)),
    "a part's add_adapter": lambda model, path: model.model.add_adapter(config()),
    "a part": lambda model, path: peft.get_peft_model(model.model, config()),
    "a block": lambda model, path: peft.inject_adapter_in_model(config(), model.model.layers[1]),
    "one layer": lambda model, path: peft.inject_adapter_in_model(
        config(target_modules=["base_layer"]), model.model.layers[0].mlp.down_proj
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_way_in_is_refused_and_nothing_changes(way, quantize, tmp_path):
    model = adapted(quantize=quantize)
    before, expected, state = snapshot(model), logits(model), set(vars(model))
    with pytest.raises(ValueError, match="Two orders work") as refused:
        WAYS[way](model, tmp_path)
    assert str(refused.value) == REFUSAL
    assert snapshot(model) == before
    assert set(vars(model)) == state
    assert not model._hf_peft_config_loaded
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_method_that_wraps_layers_is_refused(kind):
    model = adapted()
    before = snapshot(model)
    if kind in PROMPTS:
        peft.get_peft_model(model, config(kind))
        return
    with pytest.raises(ValueError, match="Two orders work"):
        peft.get_peft_model(model, config(kind))
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"])
def test_prompts_are_trained_over_the_frozen_adapted_model(kind):
    """As over the same model with its adapters merged."""
    found = []
    for make in (adapted, lambda: fastlora.merge(adapted())):
        torch.manual_seed(4)
        model = peft.get_peft_model(make(), config(kind)).eval()
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:  # it starts at 0, where the prompt has no gradient
                nn.init.ones_(parameter)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert not any("lora_" in name for name in found[0])
    for name, gradient in found[0].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_what_is_trained_beside_layers_is_guarded_too():
    """Trained tokens alone in a part, stacks of experts, Conv1D."""
    model = fastlora.replace_linear(llama(), r=4, target_modules=["lm_head"], trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="Two orders work"):
        peft.inject_adapter_in_model(config(), model.model)
    with pytest.raises(ValueError, match="Two orders work"):
        peft.get_peft_model(adapted(gpt2), config(target_modules=["c_attn"]))


def test_a_copy_a_pickle_and_a_compiled_model_refuse_too():
    for model in (copy.deepcopy(adapted()), pickle.loads(pickle.dumps(adapted()))):
        for each in (model, torch.compile(model)):
            with pytest.raises(ValueError, match="Two orders work"):
                peft.get_peft_model(each, config())
        with pytest.raises(ValueError, match="Two orders work"):
            model.add_adapter(config())


def test_after_merging_peft_may_come():
    model = fastlora.merge(adapted())
    expected = logits(model)
    model = peft.get_peft_model(model, config())
    torch.testing.assert_close(logits(model), expected)
    fastlora.replace_linear(model)
    loss = model(input_ids=tokens(), labels=tokens()).loss.item()
    assert trained(model)(input_ids=tokens(), labels=tokens()).loss.item() < loss
    assert vars(fastlora.merge(adapted())).keys() - vars(llama()).keys() == {"fastlora_merged"}


def test_a_model_of_pefts_that_is_sped_up_goes_on_taking_adapters():
    model = fastlora.replace_linear(peft.get_peft_model(llama(), config()))
    model.add_adapter("other", config(target_modules=["k_proj"]))
    model.set_adapter("other")
    assert logits(model).isfinite().all()
    injected = fastlora.replace_linear(peft.inject_adapter_in_model(config(), llama()))
    peft.inject_adapter_in_model(config(target_modules=["down_proj"]), injected, "other")
    assert list(injected.peft_config) == ["default", "other"]


class Holder(nn.Module):
    """A model inside another module, which replace_linear has not seen."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_unknown_holder_is_refused_at_the_first_call(quantize):
    """peft asks only the module that it is given; what it put inside our layers is seen when they run."""
    model = peft.get_peft_model(Holder(adapted(quantize=quantize)), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(RuntimeError, match=r"has become a Linear.*Two orders work"):
        model(input_ids=tokens())


def test_a_model_that_is_only_in_nf4_takes_no_adapters_of_pefts(tmp_path):
    """peft says that it does not know the layer, before anything changes."""
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fastlora.FastLoRANF4Config())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NF4Linear.*is not supported"):
        peft.get_peft_model(model, config())
    assert snapshot(model)[1] == before[1]
