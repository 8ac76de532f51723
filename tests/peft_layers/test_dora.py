"""DoRA's kept norms on the CPU, and in layers of peft's: checkpoints, weights replaced, biases in other dtypes."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastlora.model.replace import replace_linear
from fastlora.ops import nf4
from fastlora.peft_layers import kept_norms

peft = pytest.importorskip("peft")


def adapters(n=64, k=32, r=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)


def test_norms_of_a_weight_that_is_replaced_again_and_again():
    """`weight.data = ...` may get the address of a former one."""
    weight, kept = nn.Parameter(torch.randn(256, 256), requires_grad=False), kept_norms.KeptNorms()
    a, b = adapters(256, 256)
    for _ in range(20):
        torch.testing.assert_close(kept.of(weight, a, b, 1.0), (weight + b @ a).norm(dim=1))
        weight.data = weight.data * 2
        weight.data = weight.data * 1.5


def injected(**options):
    holder = nn.Module()
    holder.linear = nn.Linear(32, 64)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["linear"], **options), holder)
    return holder


def test_gradients_under_a_selective_checkpoint_after_a_step():
    """Recomputation must do what forward did, although the norms are kept by then."""
    holder = replace_linear(injected(use_dora=True))
    nn.init.normal_(holder.linear.lora_B["default"].weight)

    def policy(context, op, *args, **kwargs):
        saved = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    x = torch.randn(9, 32)

    def gradient(call):
        given = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(call(given).square().sum(), given)
        return found

    for _ in range(3):
        holder.linear.lora_B["default"].weight.data.mul_(1.5)
        selective = gradient(lambda t: checkpoint(holder.linear, t, use_reentrant=False, context_fn=contexts))
        torch.testing.assert_close(selective, gradient(holder.linear))
    assert holder.linear.fastlora_calls.stepped_back == 0


def four_bit(use_dora):
    """A layer whose bias has another dtype than it computes in, as bitsandbytes leaves it until its first call."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    holder = nn.Module()
    holder.is_loaded_in_4bit = True
    linear = bnb.nn.Linear4bit(128, 64, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.weight = nf4.quantize(torch.randn(64, 128)).to_bnb()
    linear.bias = nn.Parameter(torch.randn(64).half())
    holder.linear = linear
    config = peft.LoraConfig(r=4, use_dora=use_dora, target_modules=["linear"])
    peft.inject_adapter_in_model(config, holder)
    return holder.train()


@pytest.mark.parametrize(("use_dora", "call"), [(True, {}), (False, {}), (False, {"adapter_names": ["__base__"] * 4})])
def test_a_bias_in_another_dtype_than_the_layer_computes_in(use_dora, call):
    x = torch.randn(4, 128).half()
    expected = four_bit(use_dora).linear(x, **call)
    layer = replace_linear(four_bit(use_dora)).linear
    found = layer(x, **call)
    assert layer.fastlora_calls.stepped_back == 0
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)


@pytest.mark.filterwarnings("ignore")
def test_dropout_of_everything_is_pefts():
    holder = injected(lora_dropout=1.0).train()
    expected = holder.linear(torch.ones(2, 32))
    replace_linear(holder)
    assert torch.equal(holder.linear(torch.ones(2, 32)), expected)
    assert [row.reason for row in holder.fastlora_report.left] == ["lora_dropout drops everything"]


def caches(model):
    return [module._dora_cache for module in model.modules() if hasattr(module, "_dora_cache")]


def test_pefts_dora_caching_fills_uses_and_clears_its_caches():
    """Inside it peft keeps B A and the norms; a call outside it, or training, clears them."""
    caching = pytest.importorskip("peft.helpers").DoraCaching
    holder, x = injected(use_dora=True), torch.randn(4, 32)
    nn.init.normal_(holder.linear.lora_B["default"].weight)
    twin = copy.deepcopy(holder)
    layer = replace_linear(holder).linear

    def check(filled, sped_up):
        before = layer.fastlora_calls.sped_up
        torch.testing.assert_close(layer(x), twin.linear(x))
        assert [len(cache) for cache in caches(holder)] == [len(cache) for cache in caches(twin)] == [2 * filled]
        assert layer.fastlora_calls.sped_up - before == sped_up

    for model in (holder, twin):
        model.eval()
    check(filled=False, sped_up=True)
    with caching():
        check(filled=True, sped_up=False)
        for cache in caches(holder) + caches(twin):
            cache["weight-norm-default"] *= 2
        check(filled=True, sped_up=False)
    check(filled=False, sped_up=True)
    with caching():
        check(filled=True, sped_up=False)
        for model in (holder, twin):
            model.train()
        check(filled=False, sped_up=True)
    assert layer.fastlora_calls.last_reason == "peft's DoraCaching keeps B A and the norms"


def test_the_small_rest_of_product_and_bias_stays_at_the_start():
    torch.manual_seed(0)
    holder, x = injected(use_dora=True), torch.randn(5, 32)
    layer = holder.linear
    layer.base_layer.bias.data.copy_(1e-4 - layer.base_layer.weight @ x[0])
    replace_linear(holder)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.fastlora_calls.sped_up == 1
