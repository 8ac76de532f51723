"""The linear by one C++ call each way, through autograd; tests/native/test_linear.py tests the arithmetic."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import reference
from fastlora.native import cpu, linear
from fastlora.ops import linear_cpu_bf16, nf4
from fastlora.ops.linear import lora_linear, nf4_linear
from fastlora.ops.nf4 import NF4Weight
from tests.support.numerics import assert_as_accurate

BF16 = torch.bfloat16
K, N, R, SCALING = 64, 48, 4, 2.0

pytestmark = pytest.mark.skipif(
    cpu.isas()[-1:] != ("avx512bf16",), reason="this processor, or this build, has no AVX512_BF16"
)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the library, by name."""
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.delenv("FASTLORA_CPU_ISA", raising=False)
    made: list[str] = []

    def counting(name: str) -> Any:
        function = getattr(linear, name)
        return lambda *args: made.append(name) or function(*args)

    for name in ("linear", "linear_backward"):
        monkeypatch.setattr(linear, name, counting(name))
    return made


def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * std).to(dtype)


def operands(
    m: int = 20, base: str = "dense", adapter_dtype: torch.dtype = BF16
) -> tuple[Tensor, Tensor | NF4Weight, Tensor, Tensor, Tensor]:
    """x, W, A, B, dy."""
    weight = normal(N, K, std=K**-0.5)
    a, b = normal(R, K, std=K**-0.5, dtype=adapter_dtype), normal(N, R, std=R**-0.5, dtype=adapter_dtype)
    leaves = [t.requires_grad_() for t in (normal(m, K), a, b)]
    return leaves[0], nf4.quantize(weight) if base == "nf4" else weight, leaves[1], leaves[2], normal(m, N)


def check(got: list[Tensor], x: Tensor, weight: Tensor | NF4Weight, a: Tensor, b: Tensor, dy: Tensor) -> None:
    """Hold y, dx, dA, dB against the tolerance rule."""
    exact = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight
    results = []
    for dtype in (torch.float64, None):
        leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
        y = reference.lora_linear(leaves[0], exact.to(dtype or BF16), leaves[1], leaves[2], SCALING)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for name, ours, oracle, baseline in zip(("y", "dx", "dA", "dB"), got, *results, strict=True):
        assert_as_accurate(ours, baseline, oracle, name)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("m", [1, 20, 300])
def test_one_call_each_way(calls: list[str], base: str, m: int) -> None:
    x, weight, a, b, dy = operands(m, base)
    y = lora_linear(x, weight, a, b, SCALING)
    assert calls == ["linear"]
    check([y.detach(), *torch.autograd.grad(y, (x, a, b), dy)], x, weight, a, b, dy)
    assert calls == ["linear", "linear_backward"]


def test_the_operator_takes_it_too(calls: list[str]) -> None:
    x, weight, a, b, dy = operands()
    arguments = (weight, None, None, None, None, N, 0, a, b, None, SCALING, 0.0, True)
    y = torch.ops.fastlora.lora_linear(x, None, *arguments)[0]
    check([y.detach(), *torch.autograd.grad(y, (x, a, b), dy)], x, weight, a, b, dy)
    assert calls == ["linear", "linear_backward"]


@pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32])
def test_strides_and_leading_dimensions(calls: list[str], adapter_dtype: torch.dtype) -> None:
    x, weight, a, b, dy = operands(24, "dense", adapter_dtype)
    wide = torch.full((24, K + 3), torch.nan, dtype=BF16)
    wide[:, 1:-2] = x.detach()
    strided = wide[:, 1:-2].view(2, 12, K).requires_grad_()
    a_strided = torch.empty(K, R, dtype=adapter_dtype).t().copy_(a.detach()).requires_grad_()
    weight_strided = torch.empty(N, 2 * K, dtype=BF16)[:, :K].copy_(weight)
    dy_strided = torch.empty(N, 24, dtype=BF16).t().copy_(dy).view(2, 12, N)
    y = lora_linear(strided, weight_strided, a_strided, b, SCALING)
    assert y.shape == (2, 12, N)
    grads = torch.autograd.grad(y, (strided, a_strided, b), dy_strided)
    assert grads[0].shape == strided.shape
    check([y.detach().view(24, N), grads[0].reshape(24, K), *grads[1:]], x, weight, a, b, dy)
    grads = torch.autograd.grad(lora_linear(x, weight, a, b, SCALING).sum(), (x, a, b))
    check([y.detach().view(24, N), *grads], x, weight, a, b, torch.ones(24, N, dtype=BF16))
    assert calls == ["linear", "linear_backward"] * 2


def test_what_it_does_not_take_goes_to_another_path(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, a, b, dy = operands()
    transposed = weight.t().contiguous().t()
    y = lora_linear(x, transposed, a, b, SCALING)
    check([y.detach(), *torch.autograd.grad(y, (x, a, b), dy)], x, weight, a, b, dy)
    lora_linear(x.float(), weight.float(), a.float(), b.float(), SCALING)
    monkeypatch.setenv("FASTLORA_CPU_ISA", "avx512")
    lora_linear(x, weight, a, b, SCALING)
    monkeypatch.delenv("FASTLORA_CPU_ISA")
    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    lora_linear(x, weight, a, b, SCALING)
    assert calls == []


def test_adapters_of_different_dtypes(calls: list[str]) -> None:
    x, weight, a, _, dy = operands(20, "dense", torch.float32)
    b = normal(N, R, std=R**-0.5).requires_grad_()
    y = lora_linear(x, weight, a, b, SCALING)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    assert [grad.dtype for grad in grads] == [BF16, torch.float32, BF16]
    assert calls == ["linear", "linear_backward"]
    check([y.detach(), *grads], x, weight, a, b, dy)


def test_a_trained_weight_and_bias(calls: list[str]) -> None:
    x, weight, a, b, dy = operands(80)
    assert isinstance(weight, Tensor)
    bias = normal(N).requires_grad_()
    weight.requires_grad_()
    y = lora_linear(x, weight, a, b, SCALING, bias)
    grads = torch.autograd.grad(y, (x, weight, a, b, bias), dy)
    assert calls == ["linear", "linear_backward"]
    torch.testing.assert_close(grads[1], dy.t() @ x.detach())
    torch.testing.assert_close(grads[4], dy.float().sum(0).bfloat16())
    with torch.no_grad():
        expected = lora_linear(x, weight, a, b, SCALING) + bias
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.02)


def test_a_product_without_adapters(calls: list[str]) -> None:
    x, weight, _, _, dy = operands(20, "nf4")
    assert isinstance(weight, NF4Weight)
    y = nf4_linear(x, weight)
    torch.testing.assert_close(y, x @ weight.dequantize(BF16).t(), atol=0.03, rtol=0.02)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ weight.dequantize(BF16), atol=0.03, rtol=0.02)
    assert calls == ["linear", "linear_backward"]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_only_what_is_needed_is_computed(calls: list[str], base: str) -> None:
    x, weight, a, b, dy = operands(20, base)
    everything = torch.autograd.grad(lora_linear(x, weight, a, b, SCALING), (x, a, b), dy)
    for wanted in range(1, 8):
        leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((x, a, b))]
        lora_linear(leaves[0], weight, leaves[1], leaves[2], SCALING).backward(dy)
        for i, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            assert leaf.grad is None or torch.equal(leaf.grad, expected)
    with torch.no_grad():
        assert not lora_linear(x, weight, a, b, SCALING).requires_grad


def test_an_empty_batch() -> None:
    x, weight, a, b, _ = operands(0)
    y = lora_linear(x.view(0, 1, K), weight, a, b, SCALING)
    assert y.shape == (0, 1, N)
    y.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert torch.equal(b.grad, torch.zeros_like(b))


def test_dropout_derives_one_mask_forward_and_backward(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, a, b, dy = operands(40)
    seed = torch.tensor([987654321987654321])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    y = lora_linear(x, weight, a, b, SCALING, dropout_p=0.3, training=True)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    mask = reference.dropout_mask(seed.item(), 40, K, 0.3)
    for dtype in (torch.float64, None):
        leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
        expected = reference.lora_linear(leaves[0], weight.to(dtype or BF16), leaves[1], leaves[2], SCALING, None, mask)
        values = [expected.detach(), *torch.autograd.grad(expected, leaves, dy.to(expected.dtype))]
        if dtype is not None:
            oracle = values
    for ours, baseline, exact in zip([y.detach(), *grads], values, oracle, strict=True):
        assert_as_accurate(ours, baseline, exact)
    assert calls == ["linear", "linear_backward"]


def test_a_second_derivative_is_refused() -> None:
    x, weight, a, b, dy = operands()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(lora_linear(x, weight, a, b, SCALING), x, dy, create_graph=True)


def test_an_adapter_changed_before_backward_is_noticed() -> None:
    x, weight, a, b, dy = operands()
    y = lora_linear(x, weight, a, b, SCALING)
    with torch.no_grad():
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_checkpoints_and_autocast_give_the_same_bits() -> None:
    x, weight, a, b, dy = operands(20, "dense", torch.float32)
    plain = [lora_linear(x, weight, a, b, SCALING)]
    plain += torch.autograd.grad(plain[0], (x, a, b), dy)
    y = torch.utils.checkpoint.checkpoint(lora_linear, x, weight, a, b, SCALING, use_reentrant=False)
    for ours, expected in zip([y, *torch.autograd.grad(y, (x, a, b), dy)], plain, strict=True):
        assert torch.equal(ours, expected)
    with torch.autocast("cpu", BF16):
        y = lora_linear(x.float(), weight, a, b, SCALING)
    assert torch.equal(y, plain[0])


def test_takes_checks_what_the_library_needs() -> None:
    x, weight, *_ = operands()
    assert linear_cpu_bf16.takes(x, weight, None)
    assert not linear_cpu_bf16.takes(x.half(), weight, None)
    assert not linear_cpu_bf16.takes(x, weight[1:], None)
    assert not linear_cpu_bf16.takes(x, weight.t().contiguous().t(), None)
