"""How the error of a sum grows with its length, where compiled C++ or torch computes it: see `long_sums`."""

import pytest
import torch
from fastlora.kernels.operands import Lora, Packed
from torch import Tensor

from fastlora import reference
from fastlora.native import cpu, linear
from fastlora.native.lora import lora_outer, lora_shrink
from fastlora.ops import dora, nf4
from tests.support.long_sums import KINDS, LENGTHS, check, drawn, other

BF16, FP32 = torch.bfloat16, torch.float32
AVX512_BF16 = pytest.mark.skipif(cpu.isas()[-1:] != ("avx512bf16",), reason="no AVX512_BF16 in this processor or build")
NATIVE = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
SEED = 5

pytestmark = pytest.mark.usefixtures("one_thread")


@NATIVE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_low_rank_products(isa: str, n: int, kind: str) -> None:
    """h sums over K, dA and dB over M; rows of a dropped x are rows with zeros."""
    for p in (0.0, 0.25):
        x, a = drawn(kind, 3, n, dtype=BF16), other(kind, 5, n)
        h, seed = torch.empty(3, 5), SEED if p else None
        lora_shrink(x, a, h, 1.0, seed, p)
        seen = x.double() * reference.dropout_mask(SEED, 3, n, p).double() if p else x
        if not (p and kind == "drift"):
            check(kind, n, h, seen, a)
        tall, g, d = x.t().contiguous(), a.t().contiguous(), torch.empty(5, 3)
        lora_outer(tall, g, d, 1.0, seed, p)
        seen = tall.double() * reference.dropout_mask(SEED, n, 3, p).double() if p else tall
        if not (p and kind == "drift"):
            check(kind, n, d, a, seen.t())


def packed(values: Tensor) -> tuple[nf4.NF4Weight, Tensor]:
    """An NF4 weight, and what it stands for."""
    weight = nf4.quantize(values, 64, double_quant=False)
    return weight, weight.dequantize(FP32)


@NATIVE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_products_with_packed_codes(isa: str, n: int, kind: str) -> None:
    for tokens in (1, 5):
        x = drawn(kind, tokens, n, dtype=BF16)
        weight, values = packed(other(kind, 4, n))
        y = torch.empty(tokens, 4)
        cpu.nf4_gemv(x, weight, y)
        check(kind, n, y, x, values)
        tall, values = packed(other(kind, 4, n).t().contiguous())
        dx = torch.empty(tokens, 4)
        cpu.nf4_gemv_t(x, tall, dx)
        check(kind, n, dx, x, values.t())


def base(values: Tensor, kind: str) -> tuple[Tensor | Packed, Tensor]:
    """A weight of the linear, dense or NF4, and its values as that multiplies them."""
    if kind == "dense":
        return values.to(BF16), values.to(BF16)
    weight = nf4.quantize(values, 64, double_quant=False)
    return weight, weight.dequantize(BF16)


TOKENS = [1, 6, 12, 70]  # read one by one, by codes, in panels, in more than one; every cut of the backward


@AVX512_BF16
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=str)
def test_h_and_g_of_the_linear(adapter_dtype: torch.dtype, n: int) -> None:
    """x Aᵀ over K, and dy B over N: g comes out as dA of one token whose x is 1."""
    for tokens in TOKENS[:3]:
        for kind in KINDS:
            x, a = drawn(kind, tokens, n, dtype=BF16), other(kind, 4, n, dtype=adapter_dtype)
            lora = Lora(a, a.new_zeros(2, 4))
            _, h = linear.linear(x, torch.zeros(2, n, dtype=BF16), lora, None, save_h=True)
            assert h is not None
            check(kind, n, h, x, a)
    for kind in KINDS:
        dy, b = drawn(kind, 1, n, dtype=BF16), other(kind, 4, n, dtype=adapter_dtype)
        lora, one = Lora(b.new_zeros(4, 2), b.t().contiguous()), torch.ones(1, 2, dtype=BF16)
        weight = torch.zeros(n, 2, dtype=BF16)
        _, da, _ = linear.linear_backward(dy, one, None, weight, lora, False, True)
        assert da is not None
        check(kind, n, da[:, :1].t(), dy, b, 0.0 if adapter_dtype == FP32 or kind == "drift" else 2.0**-8)


@AVX512_BF16
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_base_products_of_the_linear(kind: str, n: int) -> None:
    for tokens in TOKENS:
        x = drawn("drift", tokens, n, dtype=BF16)
        weight, values = base(other("drift", 4, n), kind)
        y, _ = linear.linear(x, weight, None, None)
        check("drift", n, y, x, values)
        weight, values = base(other("drift", 32, n).t().contiguous(), kind)
        dx, *_ = linear.linear_backward(x, None, None, weight, None, True)
        assert dx is not None
        check("drift", n, dx, x, values.t())


@AVX512_BF16
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_gradients_of_the_linears_adapters(n: int, kind: str) -> None:
    """dA and dB sum over tokens. One row of B is 1 and the rest are 0, so that g is a column of dy."""
    x, dy = drawn(kind, 2, n, dtype=BF16), other(kind, 2, n, dtype=BF16)
    h = drawn(kind, 3, n, seed=2)
    b = torch.zeros(2, 3)
    b[0] = 1
    rows = dy.t().contiguous(), x.t().contiguous(), h.t().contiguous()
    _, da, db = linear.linear_backward(
        *rows, torch.zeros(2, 2, dtype=BF16), Lora(torch.zeros(3, 2), b), False, True, True
    )
    assert da is not None
    assert db is not None
    check(kind, n, da, dy[:1].expand(3, n), x)
    check(kind, n, db, dy, h)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_sums_that_are_left_to_torch(n: int, kind: str) -> None:
    """A bias's gradient, DoRA's sums over tokens, and its norms of rows as long as rows of a weight are."""
    dy, z = drawn(kind, 4, n, dtype=BF16).t().contiguous(), other(kind, 4, n, dtype=BF16).t().contiguous()
    _, dot, total = dora._sums(dy, z, None, True, BF16)
    one = torch.ones(1, n)
    assert dot is not None
    assert total is not None
    check(kind, n, total[None], one, dy.t())
    check(kind, n, dot[None], one, (dy.double() * z.double()).t())
    if kind != "drift" and n <= LENGTHS[2]:
        rows = drawn(kind, 4, n)
        found = dora.row_norms(rows, torch.zeros(1, n), torch.zeros(4, 1), 1.0)
        check("positive", n, found[None], one, (rows.double().square() / rows.double().norm(dim=1, keepdim=True)))
