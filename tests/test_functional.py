"""The fused linear against the fp64 oracle, on every code path this machine has."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from numerics import assert_as_accurate, rms
from torch import Tensor

from fastlora import functional, nf4, reference
from fastlora.dispatch import backend
from fastlora.functional import lora_linear, nf4_linear
from fastlora.nf4 import NF4Weight

SCALING = 2.0


@pytest.fixture(params=["torch", "cpp", "triton"])
def path(request, monkeypatch):
    """Each backend in turn; Triton through its interpreter where there is no GPU."""
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    try:
        backend("cpu")
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


class Case:
    """Random operands of one linear layer, with the oracle and the baseline of the tolerance rule."""

    def __init__(self, m, k, n, r, dtype, adapter_dtype=None, base="dense", bias=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(dtype)

        adapter_dtype = adapter_dtype or dtype
        self.x, self.dy = draw(m, k), draw(m, n)
        self.lora_a = draw(r, k, std=k**-0.5, dtype=adapter_dtype)
        self.lora_b = draw(n, r, std=r**-0.5, dtype=adapter_dtype)
        self.bias = draw(n) if bias else None
        dense = draw(n, k, std=k**-0.5)
        self.weight: Tensor | NF4Weight = dense if base == "dense" else nf4.quantize(dense)
        self.exact_weight = dense if base == "dense" else self.weight.dequantize(torch.float32)

    def leaves(self, dtype=None, requires_grad=True):
        """x, A, B and bias as fresh leaves, in another dtype where asked."""
        tensors = [self.x, self.lora_a, self.lora_b] + ([self.bias] if self.bias is not None else [])
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_(requires_grad) for t in tensors]

    def reference(self, dtype=None, mask=None):
        """y and the gradients of x, A, B (and bias) by the reference, in `dtype` (default: each tensor's own)."""
        leaves = self.leaves(dtype)
        weight = self.exact_weight.to(dtype or self.x.dtype)
        bias = leaves[3] if self.bias is not None else None
        y = reference.lora_linear(leaves[0], weight, leaves[1], leaves[2], SCALING, bias, mask)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))]

    def ours(self, **options):
        """The same by the operator under test."""
        leaves = self.leaves()
        bias = leaves[3] if self.bias is not None else None
        y = lora_linear(leaves[0], self.weight, leaves[1], leaves[2], SCALING, bias, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def check(self, ours=None, mask=None, **options):
        """Hold y and every gradient against the tolerance rule."""
        ours = ours if ours is not None else self.ours(**options)
        results = zip(("y", "dx", "dA", "dB", "dbias"), ours, self.reference(mask=mask), strict=False)
        for (what, got, baseline), oracle in zip(results, self.reference(torch.float64, mask), strict=True):
            assert_as_accurate(got, baseline, oracle, what)


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
    # One row's errors share their factors, so that a single draw is noise: many draws, held to the rule together.
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
    from fastlora import torch_path

    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.setenv("FASTLORA_CPU_ISA", "portable")  # where AVX512_BF16 is, one fused call takes bf16
    calls = []
    few_rows = torch_path.few_rows
    monkeypatch.setattr(torch_path, "few_rows", lambda *args: calls.append(1) or few_rows(*args))
    Case(17, 192, 130, 8, dtype, adapter_dtype, bias=True).check()
    Case(1, 192, 2070, 8, dtype, adapter_dtype).check()
    assert len(calls) == 2


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


def test_nf4_linear_is_the_product_alone(path):
    case = Case(20, 128, 48, 4, torch.float32, base="nf4", bias=True)
    x = case.x.clone().requires_grad_()
    bias = case.bias.clone().requires_grad_()
    y = nf4_linear(x, case.weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, case.exact_weight, bias))
    y.backward(case.dy)
    torch.testing.assert_close(x.grad, case.dy @ case.exact_weight)
    torch.testing.assert_close(bias.grad, case.dy.sum(0))


def operator_arguments(base: str, dropout: bool, m: int = 6):
    """Arguments of `fastlora::lora_linear` for torch's own checks of an operator."""
    case = Case(m, 64, 48, 4, torch.float32, base=base, bias=True)
    x, a, b, bias = case.leaves()
    parts = case.weight.tensors() if base == "nf4" else (case.weight, None, None, None, None)
    seed = torch.tensor([5]) if dropout else None
    return (x, bias, *parts, 48, 64 if base == "nf4" else 0, a, b, seed, SCALING, 0.25 if dropout else 0.0, True)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(base, dropout):
    assert set(torch.library.opcheck(torch.ops.fastlora.lora_linear, operator_arguments(base, dropout)).values()) == {
        "SUCCESS"
    }


def test_opcheck_of_dequantize():
    weight = nf4.quantize(torch.randn(48, 64))
    arguments = (*weight.tensors(), 48, 64, 64, torch.bfloat16, torch.randn(4, 64), torch.randn(48, 4), 0.5)
    assert set(torch.library.opcheck(torch.ops.fastlora.nf4_dequantize, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compile_fullgraph_gives_the_same(base):
    case = Case(20, 64, 48, 4, torch.float32, base=base, bias=True)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    leaves = case.leaves()
    y = compiled(leaves[0], case.weight, *leaves[1:3], SCALING, leaves[3])
    got = [y.detach(), *torch.autograd.grad(y, leaves, case.dy)]
    for ours, eager in zip(got, case.ours(), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.slow
def test_compile_with_inductor_and_dynamic_rows():
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, dynamic=True)
    for m in (20, 33):
        case = Case(m, 64, 48, 4, torch.float32, base="nf4", bias=True)
        leaves = case.leaves()
        y = compiled(leaves[0], case.weight, *leaves[1:3], SCALING, leaves[3], dropout_p=0.0, training=True)
        for ours, eager in zip([y, *torch.autograd.grad(y, leaves, case.dy)], case.ours(), strict=True):
            torch.testing.assert_close(ours, eager)


def test_a_selective_checkpoint_keeps_the_output_by_the_operators_name(monkeypatch):
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    from fastlora import torch_path

    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    calls = []
    forward = torch_path.forward
    monkeypatch.setattr(torch_path, "forward", lambda *args: calls.append(1) or forward(*args))
    case = Case(90, 64, 64, 4, torch.float32)
    x, a, b = case.leaves()

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(lora_linear(x.sin(), case.weight, a, b, SCALING))

    def policy(context, operator, *args, **kwargs):
        kept = operator is torch.ops.fastlora.lora_linear.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    plain = torch.autograd.grad(block(x), (x, a, b), case.dy)
    assert len(calls) == 1
    for options, expected in (({}, 2), ({"context_fn": contexts}, 1)):
        calls.clear()
        y = checkpoint(block, x, use_reentrant=False, **options)
        for got, want in zip(torch.autograd.grad(y, (x, a, b), case.dy), plain, strict=True):
            assert torch.equal(got, want)
        assert len(calls) == expected


SHAPES = {"x": (6, 64), "weight": (48, 64), "lora_a": (4, 64), "lora_b": (48, 4), "bias": (48,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (6, 63)}, r"last dimension of x must be 64"),
        ({"weight": (64,)}, r"weight must be \[N, K\]"),
        ({"lora_a": (4, 63)}, r"must end in 64"),
        ({"lora_b": (47, 4)}, r"must begin with 48"),
        ({"lora_b": (48, 5)}, r"same R"),
        ({"bias": (47,)}, r"bias must be \[48\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be at least 0 and below 1"),
        ({"x_dtype": torch.float64}, r"x must be bf16, fp16 or fp32"),
        ({"x_dtype": torch.bfloat16}, r"cast one of them, or run under autocast"),
        ({"lora_a_dtype": torch.float16}, r"lora_a must be fp32 or torch.float32 like x"),
        ({"bias_dtype": torch.float16}, r"bias must be"),
    ],
)
def test_bad_operands_are_named(change, message):
    tensors = {
        name: torch.zeros(change.get(name, shape), dtype=change.get(f"{name}_dtype", torch.float32))
        for name, shape in SHAPES.items()
    }
    with pytest.raises(ValueError, match=message):
        lora_linear(**tensors, scaling=1.0, dropout_p=change.get("dropout_p", 0.0))


def test_a_wrong_backend_is_named(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "abacus")
    with pytest.raises(ValueError, match="must be one of triton, cuda, cpp, torch; got 'abacus'"):
        functional.backend("cpu")


def test_the_slow_path_says_why(monkeypatch):
    from fastlora import native

    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.setattr(native, "status", lambda: (False, "no compiler was found"))
    from fastlora.dispatch import _backend

    _backend.cache_clear()
    assert backend("cpu") == ("torch", "slow path: no compiler was found")
    _backend.cache_clear()


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp"])
@pytest.mark.parametrize("m", [4, 100])
def test_func_gradients_are_refused_rather_than_wrong(transform, m):
    x, weight, a, b = torch.randn(m, 64), torch.randn(32, 64), torch.randn(4, 64), torch.randn(32, 4)

    def loss(a):
        return lora_linear(x, weight, a, b, 1.0).sum()

    calls = {
        "grad": lambda: torch.func.grad(loss)(a),
        "vjp": lambda: torch.func.vjp(loss, a),
        "jvp": lambda: torch.func.jvp(loss, (a,), (a,)),
    }
    with pytest.raises(RuntimeError, match=r"use loss\.backward"):
        calls[transform]()
    many = torch.func.vmap(lambda a: lora_linear(x, weight, a, b, 1.0))(torch.stack([a, 2 * a]))
    torch.testing.assert_close(many[1], lora_linear(x, weight, 2 * a, b, 1.0), rtol=1e-4, atol=1e-4)
