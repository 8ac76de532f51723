"""The low-rank kernels in the interpreter: against the fp64 oracle, odd shapes, every mode, poisoned outputs."""

import pytest
import torch

from fastlora import reference
from tests.support.numerics import assert_as_accurate

pytest.importorskip("triton")
from fastlora.kernels import lora as kernel

from tests.support.kernel_cases import DEVICE, KERNELS, MODES, SEED, assert_close, draw

pytestmark = KERNELS


@pytest.mark.parametrize(("dtype", "adapter", "limit"), MODES)
@pytest.mark.parametrize(("m", "k", "n", "r"), [(70, 200, 130, 5), (1, 64, 64, 16), (129, 136, 260, 70)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_low_rank_products(dtype, adapter, limit, m, k, n, r, p):
    x, dy = draw(m, k, dtype=dtype), draw(m, n, dtype=dtype, seed=1)
    a, b = draw(r, k, dtype=adapter, seed=2) / k**0.5, draw(n, r, dtype=adapter, seed=3) / r**0.5
    dropout = kernel.Dropout(p, SEED if p else None)
    mask = torch.ones(m, k, dtype=torch.float64)
    if p:
        mask = reference.dropout_mask(int(SEED.item()), m, k, p).double()
    mask = mask.to(DEVICE)
    h_exact = (x.double() * mask) @ a.double().t()
    h = kernel.shrink(x, a, dropout)
    assert_close(h, h_exact, 1e-6)
    g_exact = 2 * dy.double() @ b.double()
    g, db = kernel.dy_pass(dy, b, h, 2.0, True, True)
    assert_close(g, g_exact, 1e-6)
    assert_close(db, 2 * dy.double().t() @ h_exact, limit)
    assert_close(kernel.x_pass(x, g, dropout, adapter), g_exact.t() @ (x.double() * mask), limit)


def test_the_dy_pass_computes_only_what_is_asked():
    dy, b, h = draw(20, 48), draw(48, 4), draw(20, 4)
    g, db = kernel.dy_pass(dy, b, h, 1.0, True, True)
    only_g = kernel.dy_pass(dy, b, h, 1.0, True, False)
    only_db = kernel.dy_pass(dy, b, h, 1.0, False, True)
    assert only_g[1] is None
    assert only_db[0] is None
    assert torch.equal(only_g[0], g)
    assert torch.equal(only_db[1], db)


@pytest.mark.parametrize(("dtype", "adapter"), [(torch.float32, torch.float32), (torch.float16, torch.float32)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_expand_writes_the_update_with_bias_and_mask(dtype, adapter, p):
    m, n, r = 70, 130, 40
    h, b, bias = draw(m, r), draw(r, n, dtype=adapter, seed=1).t(), draw(n, dtype=dtype, seed=2)
    mask = reference.dropout_mask(int(SEED.item()), m, n, p).double().to(DEVICE) if p else 1.0
    out = kernel.expand(h, b, 0.5, dtype, kernel.Dropout(p, SEED if p else None), bias)
    exact = mask * (0.5 * h.double() @ b.double().t()) + bias.double()
    baseline = (mask * (0.5 * h @ b.float().t())).to(dtype) + bias
    assert out.dtype == dtype
    assert_as_accurate(out, baseline, exact)
