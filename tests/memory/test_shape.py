"""Shapes read from configs: every parameter of every family, as transformers builds it."""

import pytest
import torch

from fastlora.memory.known import CONFIGS, known_config, known_shape
from fastlora.memory.shape import LAYOUT, shape_of
from fastlora.memory.weights import entries

transformers = pytest.importorskip("transformers")
SMALL = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "gpt_bigcode": {"multi_query": False},
}


def _built(family, **changes):
    layers = {"n_layer": 2} if family == "gpt_bigcode" else {"num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(family, **layers, **changes)
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "changes"), [*((name, {}) for name in LAYOUT), *SMALL.items()])
def test_every_parameter_of_a_family_is_counted(family, changes):
    config, model = _built(family, **changes)
    shape = shape_of(config.to_dict())
    parameters = list(model.parameters())
    assert shape.parameters == sum(p.numel() for p in parameters)
    held = entries(shape, "", 2, 2, 2)
    assert sum(each.size for each in held) == 2 * shape.parameters


@pytest.mark.parametrize("family", [name for name in LAYOUT if "experts" not in LAYOUT[name]])
def test_the_linears_are_those_of_a_layer(family):
    config, model = _built(family)
    blocks = model.transformer.h if family == "gpt_bigcode" else model.model.layers
    found = {name: module for name, module in blocks[0].named_modules() if isinstance(module, torch.nn.Linear)}
    shape = shape_of(config.to_dict())
    assert {f"{each.at}.{each.name}": (each.n, each.k, each.bias) for each in shape.linears} == {
        name: (*module.weight.shape, module.bias is not None) for name, module in found.items()
    }


def test_a_model_with_a_text_config_is_its_text_model():
    inner = transformers.AutoConfig.for_model("gemma3_text", num_hidden_layers=2).to_dict()
    assert shape_of({"model_type": "gemma3", "text_config": inner}) == shape_of(inner)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba"}, "mamba: its shape is not known here; known are"),
        ({}, r"model_type \(missing\)"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size must be a positive whole number, not '4096'"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}, "num_attention_heads must be"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_by_name(config, said):
    with pytest.raises(ValueError, match=said):
        shape_of(config)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("unsloth/Llama-3.2-3B-bnb-4bit", "llama-3.2-3b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("Qwen/Qwen2.5-Coder-7B", "qwen2.5-7b"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("bigcode/gpt_bigcode-santacoder", "santacoder"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_a_known_model_is_found_however_it_is_written(name, known):
    assert known_config(name) is CONFIGS[known]


def test_an_unknown_name_is_not_guessed():
    assert known_config("somebody/wonder-9b") is None
    assert known_shape("llama-8b") is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-2-70b", 68_976_648_192),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
        ("gemma-2-9b", 9_241_705_984),
        ("gpt-oss-20b", 20_914_757_184),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name, parameters):
    assert known_shape(name).parameters == parameters
