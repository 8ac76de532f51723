"""The LoRA linear against the fp64 oracle, on every code path this machine has."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastlora import reference
from fastlora.ops.linear import lora_linear, nf4_linear
from tests.support.linear_cases import SCALING, Case, operator_arguments
from tests.support.numerics import assert_as_accurate, rms

DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
BF16 = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + BF16)
@pytest.mark.parametrize("m", [17, 200])
def test_forward_and_gradients_follow_the_oracle(path, base, dtype, adapter_dtype, m):
    Case(m, 192, 130, 8, dtype, adapter_dtype, base, bias=True).check()


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + BF16)
def test_a_single_row_follows_the_oracle(path, base, dtype, adapter_dtype):
    # The errors of one row share their factors, so a single draw is noise: many draws are held to the rule together.
    cases = [Case(1, 192, 130, 8, dtype, adapter_dtype, base, bias=True, seed=seed) for seed in range(16)]
    results = [(case.ours(), case.reference(), case.reference(torch.float64)) for case in cases]
    for i, what in enumerate(("y", "dx", "dA", "dB", "dbias")):
        ours, baseline, oracle = (torch.stack([result[kind][i] for result in results]) for kind in range(3))
        assert_as_accurate(ours, baseline, oracle, what)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [*DTYPES[1:], *BF16])
def test_activations_large_enough_to_stream(base, dtype, adapter_dtype, monkeypatch):
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    Case(300, 512, 384, 16, dtype, adapter_dtype, base, bias=True).check()
    Case(300, 256, 384, 16, dtype, adapter_dtype, base).check()


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + BF16)
def test_a_few_rows_over_a_dense_weight_on_the_cpu(dtype, adapter_dtype, monkeypatch):
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.setenv("FASTLORA_CPU_ISA", "portable")  # with AVX512_BF16, one C++ call would take bf16
    Case(17, 192, 130, 8, dtype, adapter_dtype, bias=True).check()
    Case(1, 192, 2070, 8, dtype, adapter_dtype).check()


def test_adapters_of_different_dtypes_and_a_strided_bias(path):
    case = Case(70, 128, 96, 8, torch.float16, torch.float32, base="nf4", bias=True)
    case.lora_b = case.lora_b.half()
    case.check()
    x, a, b, _ = case.leaves()
    bias = torch.stack((case.bias, case.bias + 1), dim=1)[:, 0]
    assert not bias.is_contiguous()
    for base in (case.weight, case.weight.dequantize(torch.float16)):
        strided = lora_linear(x, base, a, b, SCALING, bias)
        assert torch.equal(strided, lora_linear(x, base, a, b, SCALING, case.bias))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_second_derivative_is_refused(path, base):
    case = Case(70, 64, 48, 4, torch.float32, base=base)
    x, a, b = case.leaves()
    y = lora_linear(x, case.weight, a, b, SCALING)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, case.dy, create_graph=True)
    y = torch.ops.fastlora.lora_linear(*operator_arguments(base, False))[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        y.sum().backward(create_graph=True)


@pytest.mark.parametrize("part", ["codes", "absmax", "absmax2", "code2", "offset"])
def test_a_packed_weight_changed_before_backward_is_noticed(path, part):
    case = Case(3, 64, 48, 4, torch.float32, base="nf4")
    y = lora_linear(case.leaves()[0], case.weight, *case.leaves()[1:3], SCALING)
    getattr(case.weight, part).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.dy)


def test_defaults_of_torch_change_nothing():
    # In a process of its own: tables are made once and kept.
    code = (
        "import torch, fastlora\n"
        "torch.manual_seed(0)\n"
        "w, x = torch.randn(48, 64), torch.randn(70, 64)\n"
        "a, b = torch.randn(4, 64), torch.randn(48, 4)\n"
        "torch.set_default_dtype(torch.bfloat16)\n"
        "torch.set_default_device('meta')\n"
        "q, plain = fastlora.quantize(w), fastlora.quantize(w, double_quant=False)\n"
        "y = [fastlora.lora_linear(r, q, a, b, 2.0, dropout_p=0.5, training=t) for r in (x, x[:3]) for t in (0, 1)]\n"
        "torch.set_default_device('cpu'); torch.set_default_dtype(torch.float32)\n"
        "assert torch.equal(q.codes, fastlora.quantize(w).codes) and torch.equal(plain.codes, q.codes)\n"
        "again = [fastlora.lora_linear(r, q, a, b, 2.0) for r in (x, x[:3])]\n"
        "assert torch.equal(y[0], again[0]) and torch.equal(y[2], again[1])\n"
    )
    for forced in ("torch", ""):
        environment = {**os.environ, "FASTLORA_BACKEND": forced}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("r", [1, 3, 16, 40, 100, 256])
def test_any_rank(path, r):
    Case(33, 128, 96, r, torch.float32, base="nf4").check()
    Case(33, 128, 96, r, torch.float16, torch.float32).check()


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_derives_one_mask_forward_and_backward(path, base, monkeypatch):
    case = Case(40, 72, 64, 8, torch.float32, base=base)
    seed = torch.tensor([987654321987654321])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    mask = reference.dropout_mask(seed.item(), 40, 72, 0.3)
    assert 0.25 < (mask == 0).float().mean() < 0.35
    case.check(mask=mask, dropout_p=0.3, training=True)


def test_dropout_mask_is_fair_and_keeps_the_mean():
    mask = reference.dropout_mask(7, 512, 1000, 0.1)
    dropped = (mask == 0).float()
    assert abs(dropped.mean().item() - 0.1) < 0.002
    assert abs(mask.mean().item() - 1) < 0.002
    assert dropped.mean(0).max() < 0.2  # no column is favoured
    assert dropped.mean(1).max() < 0.2
    neighbours = torch.corrcoef(torch.stack((dropped[:, :-1].flatten(), dropped[:, 1:].flatten())))[0, 1]
    assert abs(neighbours) < 0.01
    assert not torch.equal(mask, reference.dropout_mask(8, 512, 1000, 0.1))


def test_dropout_is_off_outside_training(path):
    case = Case(9, 64, 64, 4, torch.float32)
    for plain, dropped in zip(case.ours(), case.ours(dropout_p=0.5, training=False), strict=True):
        assert torch.equal(plain, dropped)


def test_dropout_follows_torchs_generator_and_survives_recomputation():
    case = Case(12, 64, 64, 4, torch.float32)
    x, a, b = case.leaves()

    def run() -> Tensor:
        return lora_linear(x, case.weight, a, b, SCALING, dropout_p=0.5, training=True)

    torch.manual_seed(3)
    first = run()
    plain_grads = torch.autograd.grad(first, (x, a, b), case.dy)
    assert not torch.equal(first, run())
    torch.manual_seed(3)
    assert torch.equal(first, run())
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    assert torch.equal(first, y)
    for plain, recomputed in zip(plain_grads, torch.autograd.grad(y, (x, a, b), case.dy), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_every_subset_of_gradients(path, base, wanted):
    case = Case(70, 64, 48, 4, torch.float32, base=base, bias=True)
    leaves = case.leaves(requires_grad=False)
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    x, a, b, bias = leaves
    y = lora_linear(x, case.weight, a, b, SCALING, bias)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    y.backward(case.dy)
    expected = zip(case.reference()[1:], case.reference(torch.float64)[1:], strict=True)
    for name, leaf, want, (baseline, oracle) in zip("xABb", leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want, name
        if want:
            assert_as_accurate(leaf.grad, baseline, oracle, name)


def test_a_dense_weight_can_be_trained_too(path):
    case = Case(70, 64, 48, 4, torch.float32)
    x, a, b = case.leaves(requires_grad=False)
    weight = case.weight.clone().requires_grad_()
    lora_linear(x, weight, a, b, SCALING).backward(case.dy)
    torch.testing.assert_close(weight.grad, case.dy.t() @ x)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_strides_and_leading_dimensions(path, base):
    case = Case(72, 64, 48, 4, torch.float32, base=base)
    x, a, b = case.leaves()
    strided = torch.empty(64, 72).t().copy_(x.detach()).requires_grad_()
    assert not strided.is_contiguous()
    a_strided = torch.empty(64, 4).t().copy_(a.detach()).requires_grad_()
    y = lora_linear(strided.view(2, 36, 64), case.weight, a_strided, b, SCALING)
    assert y.shape == (2, 36, 48)
    dy = torch.empty(48, 72).t().copy_(case.dy).view(2, 36, 48)
    got = [y.detach().view(72, 48), *torch.autograd.grad(y, (strided, a_strided, b), dy)]
    for what, ours, baseline, oracle in zip(
        ("y", "dx", "dA", "dB"), got, case.reference(), case.reference(torch.float64), strict=True
    ):
        assert_as_accurate(ours, baseline, oracle, what)
    grads = torch.autograd.grad(lora_linear(x, case.weight, a, b, SCALING).sum(), (x, a, b))
    case.dy = torch.ones(()).expand(72, 48)  # what sum() sends back: strides of 0
    for what, got, baseline, oracle in zip(
        ("dx", "dA", "dB"), grads, case.reference()[1:], case.reference(torch.float64)[1:], strict=True
    ):
        assert_as_accurate(got, baseline, oracle, what)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_an_empty_batch(path, base):
    case = Case(0, 64, 48, 4, torch.float32, base=base)
    x, a, b = case.leaves()
    y = lora_linear(x.view(0, 1, 64), case.weight, a, b, SCALING)
    assert y.shape == (0, 1, 48)
    y.sum().backward()
    assert x.grad.shape == (0, 64)
    assert torch.equal(a.grad, torch.zeros(4, 64))
    assert torch.equal(b.grad, torch.zeros(48, 4))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_same_input_gives_the_same_bits(path, base):
    case = Case(300, 128, 96, 8, torch.float32, base=base)
    for first, second in zip(case.ours(), case.ours(), strict=True):
        assert torch.equal(first, second)


def test_autocast_casts_as_linear_does():
    case = Case(20, 64, 48, 4, torch.float32, bias=True)
    quantized = Case(20, 64, 48, 4, torch.float32, base="nf4")
    with torch.autocast("cpu", torch.bfloat16):
        leaves = case.leaves()
        y = lora_linear(*leaves[:1], case.weight, *leaves[1:3], SCALING, leaves[3])
        assert y.dtype == torch.bfloat16
        assert nf4_linear(quantized.x, quantized.weight).dtype == torch.bfloat16
    grads = torch.autograd.grad(y, leaves, case.dy.bfloat16())
    assert [grad.dtype for grad in grads] == [torch.float32] * 4
    assert rms(y.float() - case.reference()[0]) < 0.01 * rms(case.reference()[0])
    bf16 = Case(90, 64, 48, 4, torch.bfloat16, torch.float32, bias=True)
    plain = bf16.ours()
    with torch.autocast("cpu", torch.bfloat16):
        inside = bf16.ours()
    for first, second in zip(plain, inside, strict=True):
        assert torch.equal(first, second)  # the low-rank products stay in fp32


def test_nf4_linear_is_only_the_product(path):
    case = Case(20, 128, 48, 4, torch.float32, base="nf4", bias=True)
    x = case.x.clone().requires_grad_()
    bias = case.bias.clone().requires_grad_()
    y = nf4_linear(x, case.weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, case.exact_weight, bias))
    y.backward(case.dy)
    torch.testing.assert_close(x.grad, case.dy @ case.exact_weight)
    torch.testing.assert_close(bias.grad, case.dy.sum(0))
