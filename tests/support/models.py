"""Tiny models that several test files use, and what they do to them."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))


def qwen2():
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))


def tokens():
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def randomize(model):
    """Give every adapter an update large enough to show in the output."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def logits(model):
    """For `tokens`."""
    return model(tokens()).logits.detach()


def trained(model, steps=3):
    """The model after a few steps that move whatever is trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    return model


def as_attributes(model):
    """Put views in place of parameters, as FSDP without use_orig_params and DataParallel do."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.view_as(parameter))


def snapshot(model):
    """Everything that replace_linear could change: modules, their classes, parameters, flags."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    parameters = [
        (name, id(parameter), parameter._version, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]
    return modules, parameters, hasattr(model, "fastlora_report")


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def bnb_llama(**options):
    """Llama with bitsandbytes layers, as transformers loads it with load_in_4bit."""
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, **{"quant_type": "nf4", **options}
                )
                new.weight.data = child.weight.data
                setattr(module, name, new.to("cpu"))
    return model
