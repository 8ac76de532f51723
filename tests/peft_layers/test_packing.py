"""Stacks of experts packed in NF4 against peft over the values they stand for, and both kinds by the Triton kernels."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from tests.support.numerics import assert_as_accurate

pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")
pytest.importorskip("peft")
experts = pytest.importorskip("fastlora.peft_layers.experts")
from fastlora.peft_layers.packing import quantize_experts  # noqa: E402
from tests.support.expert_cases import assert_as_good, exact, results, routed, stack  # noqa: E402


def packed(layer, double_quant=True):
    """A copy of the layer with its stacks packed, and one with the values that the packed stacks stand for."""
    quantized, expanded = copy.deepcopy(layer), copy.deepcopy(layer)
    quantize_experts(quantized, double_quant=double_quant)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(expanded.get_base_layer(), name).copy_(getattr(quantized.get_base_layer(), name))
    return quantized, expanded


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_packed_stack_is_as_exact_as_peft_over_its_values(name, dtype, double_quant):
    _, layer = stack(name, dtype)  # runs of scales cross from expert to expert in down_proj, not in gate_up_proj
    quantized, expanded = packed(layer, double_quant)
    oracle, baseline = results(exact(expanded), torch.float64), results(expanded, dtype)
    fastlora.replace_linear(quantized)
    ours = results(quantized, dtype)
    assert quantized.fastlora_calls.sped_up == 1
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        assert_as_accurate(value, baseline[name], oracle[name], name)


def test_a_packed_stack_loses_nothing_in_silence():
    model, layer = stack()
    _, expanded = packed(layer)
    with pytest.raises(ValueError, match="wrap the model first"):
        quantize_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="blocks of 4096 would cross"):
        quantize_experts(stack("qwen3-moe")[0], blocksize=4096)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge them first"):
        quantize_experts(model)
    model.unmerge_adapter()
    fastlora.replace_linear(quantize_experts(model))
    with pytest.raises(ValueError, match="parametrized already"):
        quantize_experts(model)
    with pytest.raises(ValueError, match="packed, and peft computes no adapters"):
        fastlora.restore(model)
    with pytest.raises(ValueError, match="packed in 4 bits"):
        fastlora.merge(model)
    with pytest.raises(ValueError, match="packed in 4 bits and cannot take an update"):
        model.merge_adapter()
    x, chosen, weights, _ = (t.float() if t.is_floating_point() else t for t in routed(layer))
    with model.disable_adapter():
        got = layer(x, chosen, weights)
    for wrapper in experts.chain(expanded):
        wrapper.enable_adapters(False)
    assert torch.equal(got, expanded(x, chosen, weights))
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="no adapters over a packed stack"):
        layer(x, chosen, weights)


def test_a_transposed_stack_is_packed_along_its_inputs_and_looks_as_before():
    functional = pytest.importorskip("bitsandbytes.functional")
    _, layer = stack("gpt-oss")
    before = {name: getattr(layer.get_base_layer(), name).data.clone() for name in ("gate_up_proj", "down_proj")}
    quantized, _ = packed(layer, double_quant=False)
    base = quantized.get_base_layer()
    for name, weight in before.items():
        codes, state = functional.quantize_4bit(weight.mT.contiguous(), blocksize=64, quant_type="nf4")
        assert getattr(base, name).shape == weight.shape
        assert torch.equal(getattr(base, name), functional.dequantize_4bit(codes, state).mT)
        assert torch.equal(base.state_dict()[name], codes)
        assert f"{name}.absmax" in base.state_dict()
    x, chosen, weights, _ = (t.float() if t.is_floating_point() else t for t in routed(layer))
    for wrapper in experts.chain(quantized):
        wrapper.enable_adapters(False)
    plain = quantized(x, chosen, weights)  # transformers' own forward, over the parameters as it sees them
    assert quantized.fastlora_calls.stepped_back == 1
    for wrapper in experts.chain(layer):
        wrapper.enable_adapters(False)
    assert 0 < (plain - layer(x, chosen, weights)).norm() < 0.2 * plain.norm()


def test_a_transposed_stack_that_others_packed_is_not_misread():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model, layer = stack("gpt-oss")
    parametrize.replace_parameter_4bit(layer.get_base_layer(), "down_proj", quant_type="nf4")
    fastlora.replace_linear(model)
    x, chosen, weights, _ = routed(layer)
    with pytest.raises(RuntimeError, match=r"packed as \[in, out\]: pack it with quantize_experts"):
        layer(x.float(), chosen, weights.float())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_packed_stack_serves_any_dtype(stored, given, autocast):
    _, layer = stack(dtype=stored)
    quantized, _ = packed(layer)
    y = results(quantized, given, autocast=autocast)["y"]
    assert quantized.fastlora_calls.sped_up == 1
    close_to = results(quantized, torch.float32)["y"]
    assert y.dtype == given
    assert (y - close_to).norm() < 0.02 * close_to.norm()


def test_a_packed_stack_moves_as_a_whole():
    _, layer = stack()
    quantized, _ = packed(layer)
    quantized.to("meta")
    for name in ("gate_up_proj", "down_proj"):
        stored = quantized.get_base_layer().parametrizations[name]
        state = stored[0].quant_state
        assert {stored.original.device.type, state.absmax.device.type, state.state2.absmax.device.type} == {"meta"}


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_stack_by_the_triton_kernels(name, is_packed, monkeypatch):
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("not interpreted")
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    taken = []
    from fastlora.ops import grouped_cuda as way

    monkeypatch.setattr(way, "grouped_linear", lambda *args, call=way.grouped_linear: taken.append(1) or call(*args))
    model, layer = stack(name, torch.bfloat16)
    if is_packed:
        model, expanded = packed(layer)
        oracle, baseline = results(exact(expanded), torch.float64), results(expanded, torch.bfloat16)
        for key, value in results(model, torch.bfloat16).items():
            assert_as_accurate(value, baseline[key], oracle[key], key)
    else:
        assert_as_good(model, layer, torch.bfloat16)
    assert len(taken) == 2
