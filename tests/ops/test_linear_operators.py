"""The LoRA linear as operators of torch: fakes, torch.compile, checkpointing, transforms, and what is refused."""

import warnings

import pytest
import torch
from torch import Tensor

from fastlora.ops import backend as backends
from fastlora.ops import nf4
from fastlora.ops.backend import backend
from fastlora.ops.linear import lora_linear
from tests.support.linear_cases import SCALING, Case, operator_arguments


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


@pytest.mark.parametrize("trained", [0, 1, 2, 3], ids=["x", "a", "b", "bias"])
def test_compile_with_one_gradient(trained):
    case = Case(20, 64, 48, 4, torch.float32, base="nf4", bias=True)
    leaves = [leaf.detach().requires_grad_(index == trained) for index, leaf in enumerate(case.leaves())]
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    y = compiled(leaves[0], case.weight, *leaves[1:3], SCALING, leaves[3])
    assert torch.equal(torch.autograd.grad(y, leaves[trained], case.dy)[0], case.ours()[1 + trained])


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

    from fastlora.ops import linear_cpu

    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    calls = []
    forward = linear_cpu.forward
    monkeypatch.setattr(linear_cpu, "forward", lambda *args: calls.append(1) or forward(*args))
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
        backends.backend("cpu")


def test_the_slow_path_says_why(monkeypatch):
    from fastlora.native import cpu

    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "status", lambda: (False, "no compiler was found"))
    backends.forget_choices()
    with pytest.warns(UserWarning, match="NF4 and LoRA are computed by plain torch") as said:
        found = [backend("cpu") for _ in range(3)]
    assert found == [("torch", "slow path: no compiler was found")] * 3
    assert len(said) == 1
    assert "do not run on cpu: no compiler was found" in str(said[0].message)


def test_a_path_that_was_chosen_and_a_weight_without_memory_warn_of_nothing(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend("meta").name == "torch"
        monkeypatch.setenv("FASTLORA_BACKEND", "torch")
        assert backend("cpu").name == "torch"


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
