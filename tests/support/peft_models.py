"""Models that peft has wrapped, and what several test files do with them."""

import pytest
import torch

from tests.support.models import llama, randomize, tokens

peft = pytest.importorskip("peft")


def wrapped(base=llama, **options):
    """A PeftModel with an update large enough to show in the output."""
    model = base()
    if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        model.is_loaded_in_4bit = True
    config = {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], **options}
    torch.manual_seed(3)
    return randomize(peft.get_peft_model(model, peft.LoraConfig(**config)))


def run(model):
    """[logits, gradients of all trainable parameters] of one step."""
    model.zero_grad()
    output = model(input_ids=tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def counts(model):
    calls = [module.fastlora_calls for module in model.modules() if hasattr(module, "fastlora_calls")]
    return sum(c.sped_up for c in calls), sum(c.stepped_back for c in calls)


def reasons(model):
    return {m.fastlora_calls.last_reason for m in model.modules() if hasattr(m, "fastlora_calls")} - {""}


def add_another(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"]))
    randomize(model)
    model.base_model.set_adapter(["default", "other"])


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
