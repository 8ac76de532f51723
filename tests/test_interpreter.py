"""The mended interpreter does in bf16 what torch does."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")


@triton.jit
def _casts_kernel(x_ptr, bf16_ptr, back_ptr, half_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    narrow = x.to(tl.bfloat16)
    tl.store(bf16_ptr + offs, narrow)
    tl.store(back_ptr + offs, narrow.to(tl.float32))
    tl.store(half_ptr + offs, narrow.to(tl.float16))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, negative_ptr, product_ptr, less_ptr, where_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(sum_ptr + offs, a + b)
    tl.store(negative_ptr + offs, -a)
    tl.store(product_ptr + offs, a * b)
    tl.store(less_ptr + offs, (a < b).to(tl.int32))
    tl.store(where_ptr + offs, tl.where(a < b, a, 0.0))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    at = offs[:, None] * BLOCK + offs[None, :]
    acc = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, acc)


def test_casts_round_to_nearest_even():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 1e-40, float("inf"), float("-inf"), 0.0])
    x = torch.cat([ties, torch.randn(56)])
    narrow, back, half = torch.empty(64, dtype=torch.bfloat16), torch.empty(64), torch.empty(64, dtype=torch.float16)
    _casts_kernel[(1,)](x, narrow, back, half, BLOCK=64)
    assert torch.equal(narrow, x.bfloat16())
    assert torch.equal(back, x.bfloat16().float())
    assert torch.equal(half, x.bfloat16().half())
    nan = torch.full((64,), float("nan"))
    _casts_kernel[(1,)](nan, narrow, back, half, BLOCK=64)
    assert narrow.isnan().all()


def test_arithmetic_is_that_of_torch():
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    total, negative, product, chosen = (torch.empty(64, dtype=torch.bfloat16) for _ in range(4))
    less = torch.empty(64, dtype=torch.int32)
    _arithmetic_kernel[(1,)](a, b, total, negative, product, less, chosen, BLOCK=64)
    assert torch.equal(total, a + b)
    assert torch.equal(negative, -a)
    assert torch.equal(product, a * b)
    assert torch.equal(less.bool(), a < b)
    assert torch.equal(chosen, torch.where(a < b, a, 0.0))


def test_dot_multiplies_values():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.full((32, 32), float("nan"))
    _dot_kernel[(1,)](a, b, out, BLOCK=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
