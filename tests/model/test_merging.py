"""Merging and unmerging whole models, plain, in NF4, and peft's: losses are reported, unmerging restores every bit."""

import copy
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers.bases import is_linear4bit
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear
from tests.support.models import bnb_llama, llama, logits, qwen2, randomize, snapshot

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "k_proj", "down_proj"]


def wrapped(base=llama, **options):
    """A sped-up PeftModel with an update that can be seen; without gradients in the base."""
    model = base()
    if base is bnb_llama:
        model.is_loaded_in_4bit = True
    torch.manual_seed(3)
    return replace_linear(
        randomize(peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})))
    )


def bf16():
    return llama().to(torch.bfloat16)


def base_weights(model):
    """The bits of every base weight and bias."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            base = layer.get_base_layer()
            found[name] = base.weight.data.clone()
            if is_linear4bit(base):
                found[f"{name}.absmax"] = base.weight.quant_state.absmax.clone()
            if base.bias is not None:
                found[f"{name}.bias"] = base.bias.data.clone()
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (llama, {}), (bf16, {}), (bnb_llama, {}), (qwen2, {"lora_bias": True, "target_modules": ["q_proj"]}),
        (bf16, {"use_dora": True}), (bnb_llama, {"use_dora": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("safe", [False, True])
def test_unmerging_gives_back_every_bit(base, options, safe):
    model = wrapped(base, **options).train()
    before, expected = base_weights(model), logits(model)
    model.merge_adapter(safe_merge=safe)
    assert not same(base_weights(model), before)
    model.unmerge_adapter()
    assert same(base_weights(model), before)
    assert torch.equal(logits(model), expected)
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged_adapters"))
    model.merge_adapter()
    with model.disable_adapter():
        logits(model)
    assert same(base_weights(model), before), "disabling unmerges, as in peft"


def test_pefts_subtraction_does_not():
    """What the kept weight is for."""
    model = wrapped(bf16)
    before = base_weights(model)
    fastlora.restore(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not same(base_weights(model), before)


def test_two_adapters_merged_one_after_the_other_are_unmerged_at_once():
    model = wrapped(bf16)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS))
    randomize(model)
    before = base_weights(model)
    model.merge_adapter(["default"])
    once = base_weights(model)
    model.merge_adapter(["other"])
    assert not same(base_weights(model), once)
    model.unmerge_adapter()
    assert same(base_weights(model), before)


def test_a_weight_changed_since_is_unmerged_by_subtraction(tmp_path):
    model = wrapped()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    with torch.no_grad():
        layer.base_layer.weight += 1
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, before + 1)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    torch.testing.assert_close(
        copied.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, layer.fastlora_kept._weight
    )


def test_a_model_moved_since_still_gets_every_bit_back():
    model = wrapped(bf16)
    before = base_weights(model)
    model.merge_adapter()
    model.to("cpu").eval()
    model._apply(lambda tensor: tensor.clone())
    model.unmerge_adapter()
    assert same(base_weights(model), before)


def test_a_merge_that_fails_keeps_nothing():
    model = wrapped()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert layer.fastlora_kept._weight is None


@pytest.mark.parametrize("make", [lambda: randomize(replace_linear(llama(), r=4)), wrapped])
def test_a_broken_adapter_is_seen_before_anything_is_changed(make):
    model = make()
    broken = next(p for name, p in model.named_parameters() if "layers.1" in name and "lora_B" in name)
    broken.data[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ would not be finite after merging"):
        merge(model)
    assert snapshot(model) == before
    merge(model, safe_merge=False)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"modules_to_save": ["norm"]}, "model.norm.weight"), ({"trainable_token_indices": [3]}, "embed_tokens")],
)
def test_what_is_trained_beside_the_adapters_is_checked_too(options, name):
    model = replace_linear(bf16(), r=4, target_modules=["q_proj"], **options)
    next(p for key, p in model.named_parameters() if name in key and p.requires_grad).data[0] = 3.4e38  # inf in bf16
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{name}\S* holds values that are not finite"):
        merge(model)
    assert snapshot(model) == before
    merge(model, safe_merge=False)


def test_a_layer_that_the_model_calls_base_layer():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.out(self.base_layer(x))

    model = randomize(replace_linear(Odd(), r=4, target_modules=["base_layer", "out"]))
    x = torch.randn(3, 16)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected)
    assert type(model.base_layer) is type(model.out) is nn.Linear


def test_an_update_too_large_for_fp16_is_seen():
    model = replace_linear(llama(), r=4, target_modules=["q_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(300.0)
    with pytest.raises(ValueError, match="would not be finite"):
        merge(model, torch.float16)
    assert merge(model, torch.bfloat16).model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_a_merge_into_bf16_is_rounded_once():
    model = randomize(replace_linear(bf16(), r=4, target_modules=["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    a, b, scaling = layer.adapter()
    exact = (layer.base_layer.weight.double() + scaling * b.double() @ a.double()).detach()
    merged = merge(model).model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_each_layer_is_freed_before_the_next_is_merged(monkeypatch):
    model = randomize(replace_linear(llama(), r=4, quantize="nf4"))
    layers = [weakref.ref(module) for module in model.modules() if isinstance(module, LoRALinear)]
    original, alive = LoRALinear.to_linear, []

    def watching(layer, *arguments):
        alive.append(sum(layer() is not None for layer in layers))
        return original(layer, *arguments)

    monkeypatch.setattr(LoRALinear, "to_linear", watching)
    merge(model, safe_merge=False)
    assert alive == list(range(14, 0, -1))


def small(model, size):
    """An update of this size, relative to the weights."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(size)
    return model


def reported(caught):
    """Share and error, from the warning."""
    message = next(str(w.message) for w in caught if "merged into NF4" in str(w.message))
    assert "merge(model, dtype=torch.bfloat16) keeps all of it" in message
    share, error = re.search(r"hold (-?\d+)% of the update, and an error ([\d.]+) times", message).groups()
    return int(share) / 100, float(error)


@pytest.mark.parametrize(
    "make",
    [
        lambda: randomize(replace_linear(llama(), r=4, lora_alpha=8, target_modules=TARGETS, quantize="nf4")),
        lambda: randomize(replace_linear(bnb_llama(), r=4, lora_alpha=8, target_modules=TARGETS)),
        lambda: wrapped(bnb_llama),
    ],
    ids=["ours", "adopted", "peft"],
)
def test_merging_into_nf4_reports_what_is_lost(make):
    """The figures in the warning are those of the logits' own weights, measured here once more."""
    model = small(make(), 0.02).train()
    is_peft = isinstance(model, peft.PeftModel)
    before, kinds = {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, (LoRALinear, peft.tuners.lora.LoraLayer)):
            base = layer.base_layer
            kinds.add(type(base))
            weight = fastlora.NF4Weight.from_bnb(base.weight) if is_linear4bit(base) else base.weight
            a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            before[name.removeprefix("base_model.model.")] = (
                weight.dequantize(torch.float32),
                scaling * (b @ a).detach(),
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge(model) if is_peft else merge(model, quantize="nf4")
    share, error = reported(caught)
    along = size = missed = 0.0
    for name, (weight, update) in before.items():
        layer = merged.get_submodule(name)
        after = fastlora.NF4Weight.from_bnb(layer.weight) if is_linear4bit(layer) else layer.weight
        realised = after.dequantize(torch.float32) - weight
        along += (realised * update).sum().item()
        size += update.square().sum().item()
        missed += (realised - update).square().sum().item()
    assert share == pytest.approx(along / size, abs=0.006)
    assert error == pytest.approx((missed / size) ** 0.5, abs=0.06)
    assert error > 0.5, "an update much smaller than NF4's steps is mostly lost in them"
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    assert {type(merged.get_submodule(name)) for name in before} == kinds


def test_merging_into_bf16_instead_keeps_the_update():
    model = wrapped(bnb_llama).train()
    expected = logits(model)
    merged = merge(model, torch.float32)
    assert not any(is_linear4bit(module) for module in merged.modules())
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged.train()), expected, rtol=1e-4, atol=1e-5)
    merged = merge(wrapped(bnb_llama).train(), torch.bfloat16)
    layers = [m for n, m in merged.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    exact = wrapped(bnb_llama).base_model.model.model.layers[0].self_attn.q_proj
    weight = fastlora.NF4Weight.from_bnb(exact.base_layer.weight).dequantize(torch.float32)
    weight = (weight + exact.get_delta_weight("default")).detach()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, weight.to(torch.bfloat16)), "one rounding"


@pytest.mark.filterwarnings("ignore")
def test_pefts_merge_of_a_bias_in_4_bits_is_scaled():
    def base():
        model = bnb_llama()
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias = nn.Parameter(torch.ones(64))
        model.is_loaded_in_4bit = True
        return model

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], lora_bias=True)
    model = replace_linear(randomize(peft.get_peft_model(base(), config)))
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].bias.detach().clone()
    merged = merge(model)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.bias.data, 1 + 3 * bias)


def test_options_that_exclude_one_another():
    model = replace_linear(llama(), r=4, quantize="nf4")
    before = snapshot(model)
    for options, message in (
        ({"quantize": "fp4"}, "quantize must be None or 'nf4'"),
        ({"quantize": "nf4", "dtype": torch.bfloat16}, "give either dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(model, **options)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"lora_bias=True cannot be merged into a layer without a bias"):
        merge(wrapped(lora_bias=True))
    merged = wrapped(bnb_llama).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged.merge_adapter()
    with pytest.raises(ValueError, match=r"call model\.unmerge_adapter\(\) first"):
        merge(merged, torch.bfloat16)


def test_layers_without_an_adapter_stay_in_nf4():
    model = randomize(replace_linear(llama(), r=4, target_modules=["q_proj"], quantize="nf4"))
    untouched = model.model.layers[0].mlp.up_proj
    with pytest.warns(UserWarning, match="merged into NF4"):
        merge(model, quantize="nf4")
    assert model.model.layers[0].mlp.up_proj is untouched
    assert isinstance(model.model.layers[0].self_attn.q_proj, NF4Linear)
    replace_linear(model, r=2)  # to be trained on


COMBINATIONS = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [llama, bnb_llama])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_adapters_combined_by_peft_are_sped_up(combination, base):
    model = wrapped(base)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=TARGETS))
    randomize(model)
    plain = fastlora.restore(copy.deepcopy(model))
    found = []
    for each in (plain, model):
        each.train()
        torch.manual_seed(13)
        options = {"combination_type": combination, **COMBINATIONS[combination]}
        each.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both", **options)
        each.set_adapter("both")
        found.append(logits(each))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    report = fastlora.report(model)
    assert len(report.replaced) == 6
    assert "6 calls sped up, 0 stepped back" in report.summary()
    model.set_adapter("default")
    assert not torch.allclose(logits(model), found[1], atol=1e-3)


def test_the_report_stays_right_through_merging_and_back():
    model = wrapped()

    def says():
        return {(str(row.calls), row.replaced) for row in fastlora.report(model).rows if row.r}

    logits(model)
    assert says() == {("1 sped up", True)}
    model.merge_adapter()
    logits(model)
    assert says() == {("1 sped up, 1 stepped back (adapters are merged)", True)}
    model.unmerge_adapter()
    logits(model)
    assert says() == {("2 sped up, 1 stepped back (adapters are merged)", True)}
    merged = merge(model)
    with pytest.raises(ValueError, match="nothing to report on"):
        fastlora.report(merged)


def test_layers_that_share_a_weight_are_unmerged_one_after_the_other():
    model = nn.Module()
    model.one, model.two = nn.Linear(16, 16), nn.Linear(16, 16)
    model.two.weight = model.one.weight
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["one", "two"]), model)
    randomize(model)
    fastlora.replace_linear(model)
    before = model.one.base_layer.weight.detach().clone()
    for layer in (model.one, model.two):
        layer.merge()
    assert (model.one.base_layer.weight - before).abs().max() > 0.01
    for layer in (model.one, model.two):
        layer.unmerge()
    torch.testing.assert_close(model.one.base_layer.weight, before, rtol=1e-5, atol=1e-6)


def test_a_model_made_in_inference_mode_is_merged_and_unmerged():
    with torch.inference_mode():
        model = wrapped()
        logits_before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), logits_before, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), logits_before, rtol=1e-4, atol=1e-4)
