"""Mixtures of experts with adapters on their stacks, by peft and by fastlora, and what their tests compare."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.replace import replace_linear
from tests.support.models import SIZES, randomize
from tests.support.numerics import assert_as_accurate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
experts = pytest.importorskip("fastlora.peft_layers.experts")
if experts.ParamWrapper is None:
    pytest.skip("this peft has no target_parameters", allow_module_level=True)

MOE = {**SIZES, "num_hidden_layers": 1, "attn_implementation": "eager"}

MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **MOE, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, mlp_only_layers=[], head_dim=16
        )
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**MOE, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
}

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def stack(name="mixtral", dtype=torch.float32, adapters=torch.float32, targets=BOTH, **options):
    """A peft model with adapters only on its experts, and its outermost wrapper."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for key, parameter in model.named_parameters():
        if "experts" in key:
            nn.init.normal_(parameter, std=0.2)
    config = peft.LoraConfig(target_modules=[], target_parameters=list(targets), **{"r": 3, "lora_alpha": 6} | options)
    model = randomize(peft.get_peft_model(model.to(dtype), config))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(adapters)
    return model, next(module for module in model.modules() if experts.is_wrapper(module))


def routed(layer, rows=200, seed=3):
    """Tokens, their experts and weights; one expert has no token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, SIZES["hidden_size"], generator=generator, dtype=torch.float64)
    logits = torch.rand(rows, layer.num_experts - 1, generator=generator)
    chosen = logits.topk(2).indices
    weights = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    return x, chosen, weights, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def results(layer, dtype, autocast=None):
    """The output and every gradient of one call."""
    x, chosen, weights, dy = routed(layer)
    x, weights, dy = (t.to(dtype) for t in (x, weights, dy))
    x.requires_grad_()
    weights.requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x, chosen, weights)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    return found | {name: p.grad for name, p in layer.named_parameters() if p.requires_grad and p.grad is not None}


def exact(layer):
    """The layer in fp64, which transformers' grouped_mm does not take."""
    layer = copy.deepcopy(layer).double()
    layer.get_base_layer().config._experts_implementation = "eager"
    return layer


def assert_as_good(model, layer, dtype, **options):
    """The sped-up layer against peft in fp64 (the oracle) and in the same dtypes (the baseline)."""
    oracle = results(exact(layer), torch.float64)
    baseline = results(layer, dtype, **options)
    fastlora.replace_linear(model)
    ours = results(layer, dtype, **options)
    assert layer.fastlora_calls.sped_up == 1, layer.fastlora_calls
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        assert value.dtype == baseline[name].dtype, name
        assert_as_accurate(value, baseline[name], oracle[name], name)


def fp32_on_purpose(dtype):
    """A module with experts that cast their weights to fp32, and the names of its stacks."""
    kind = pytest.importorskip("transformers.models.openai_privacy_filter.modeling_openai_privacy_filter")
    torch.manual_seed(0)
    config = kind.OpenAIPrivacyFilterConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    holder = nn.Module()
    holder.experts = kind.OpenAIPrivacyFilterExperts(config)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return holder.to(dtype), [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]


ALONE = {"target_modules": [], "target_parameters": list(BOTH), "r": 3, "lora_alpha": 6}


def moe(name="mixtral", dtype=torch.float32):
    """A mixture of experts with weights large enough to show in the output."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for key, parameter in model.named_parameters():
        if "experts" in key:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def ours(name="mixtral", dtype=torch.float32, **options):
    return randomize(replace_linear(moe(name, dtype), **ALONE | options))
