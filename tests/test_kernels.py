"""Triton kernels in the interpreter: against the fp64 oracle, odd shapes, every mode, poisoned outputs."""

import pytest
import torch
from numerics import assert_as_accurate, largest, rms

from fastlora import nf4, reference

triton = pytest.importorskip("triton")
from fastlora.kernels import lora as kernel  # noqa: E402
from fastlora.kernels import nf4 as nf4_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret and not torch.cuda.is_available(), reason="neither interpreter nor CUDA device"
)
DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
SEED = torch.tensor([2**61 + 12345], device=DEVICE)
# Activation and adapter dtypes, and the largest relative rms error of sums whose operands were not rounded.
MODES = [
    (torch.float32, torch.float32, 1e-6),
    (torch.float16, torch.float32, 1e-6),
    (torch.bfloat16, torch.float32, 1e-6),  # the split mode, whose products are exact
    (torch.float16, torch.float16, 1e-3),  # h and g are rounded to fp16
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """`torch.empty` gives NaN, so that what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(ours, oracle, limit):
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    assert rms(ours.double() - oracle) <= limit * rms(oracle)
    assert largest(ours.double() - oracle) <= 5 * limit * largest(oracle)


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


@pytest.mark.parametrize("shape", [(70, 128), (64, 64), (33, 70), (5, 7), (3, 4097)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("nested", [True, False])
def test_dequantize_is_bitwise_the_reference(shape, blocksize, nested):
    weight = nf4.quantize(draw(*shape).cpu(), blocksize, nested)
    scales = reference.nf4_scales(weight.absmax, weight.absmax2, weight.code2, weight.offset)
    exact = reference.nf4_dequantize(weight.codes, scales, weight.shape, blocksize).to(DEVICE)
    weight = weight.to(DEVICE)
    code = torch.tensor(reference.NF4_CODE, device=DEVICE)
    for dtype in (torch.float32, torch.float16):
        padded = torch.full((shape[0], shape[1] + 3), float("nan"), device=DEVICE, dtype=dtype)
        out = padded[:, : shape[1]]  # rows may be further apart than they are long
        nf4_kernel.dequantize(*weight.tensors(), code, blocksize, out)
        assert torch.equal(out, exact.to(dtype))
        assert padded[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("r", [1, 16, 40])
def test_dequantize_merges_with_one_rounding(r):
    weight = nf4.quantize(draw(70, 192).cpu()).to(DEVICE)
    a, b = draw(r, 192, seed=1) / 14, draw(70, r, seed=2)
    exact = weight.dequantize(torch.float32).double() + 0.5 * b.double() @ a.double()
    code = torch.tensor(reference.NF4_CODE, device=DEVICE)
    for dtype, half_ulp in ((torch.float32, 2**-22), (torch.float16, 2**-11)):
        out = torch.full((70, 192), float("nan"), device=DEVICE, dtype=dtype)
        nf4_kernel.dequantize(*weight.tensors(), code, 64, out, a, b, 0.5)
        assert ((out.double() - exact).abs() <= half_ulp * exact.abs() + 1e-6).all()
