"""Replacing the layers of a large model: quick, and without a copy of any weight."""

import time

import pytest

from fastlora.layers.lora_linear import LoRALinear
from fastlora.model.replace import replace_linear
from tests.support.models import PROJECTIONS, bnb_llama, gpt2, llama

LAYERS = 32


def weights(model):
    """The address of each base weight, by its name without what peft and fastlora add to it."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.data_ptr()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def seconds(change, model):
    """Processor time, which other programs on the machine do not add to."""
    start = time.process_time()
    change(model)
    return time.process_time() - start


def test_7_x_32_layers_are_replaced_within_a_second_and_nothing_is_copied():
    model = llama(num_hidden_layers=LAYERS)
    before = weights(model)
    assert seconds(lambda m: replace_linear(m, r=16), model) < 1
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 7 * LAYERS
    assert weights(model) == before


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_so_are_pefts(base):
    peft = pytest.importorskip("peft")
    model = base(num_hidden_layers=LAYERS) if base is llama else base()
    if base is bnb_llama:
        model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=list(PROJECTIONS)))
    before, pointers = weights(model), [parameter.data_ptr() for parameter in model.parameters()]
    assert seconds(replace_linear, model) < 1
    assert len(model.fastlora_report.replaced) == 7 * (LAYERS if base is llama else 2)
    assert weights(model) == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_nor_is_a_weight_copied_that_is_adopted_or_transposed():
    for model in (bnb_llama(), gpt2()):
        before = weights(model)
        replace_linear(model, r=4)
        assert weights(model) == before
