"""DoRA's kernels, interpreted: row norms and when they are computed again, the factor in scales, rescaling."""

import dataclasses
import weakref

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4

triton = pytest.importorskip("triton")
from fastlora.kernels import dora as kernel  # noqa: E402

from fastlora.ops import dequantize, dora, linear_cuda  # noqa: E402
from fastlora.peft_layers import kept_norms  # noqa: E402
from tests.support.kernel_cases import DEVICE, KERNELS, draw  # noqa: E402
from tests.support.numerics import assert_as_accurate, rms  # noqa: E402

pytestmark = KERNELS


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("FASTLORA_BACKEND", "triton")


def case(n, k, base, blocksize=64, nested=True, dtype=torch.bfloat16):
    """A weight on the device, and its values in fp64."""
    drawn = draw(n, k).cpu()
    if base == "nf4":
        weight = nf4.quantize(drawn, blocksize, nested)
        return weight.to(DEVICE), weight.dequantize(torch.float32).double().to(DEVICE)
    weight = drawn.to(dtype).to(DEVICE)
    return weight, weight.double()


@pytest.mark.parametrize(
    ("n", "k", "r", "base", "options"),
    [
        (40, 192, 5, "nf4", {}),
        (33, 256, 40, "nf4", {"nested": False, "blocksize": 128}),
        (20, 100, 16, "nf4", {}),  # blocks cross rows
        (50, 130, 7, "dense", {}),
        (17, 64, 3, "dense", {"dtype": torch.float32}),
    ],
)
def test_norms_of_rows(n, k, r, base, options):
    weight, values = case(n, k, base, **options)
    a, b = draw(r, k, seed=1) / k**0.5, draw(n, r, seed=2)
    found = dora.row_norms(weight, a, b, 0.5)
    exact = (values + 0.5 * b.double() @ a.double()).norm(dim=1)
    assert found.dtype == torch.float32
    assert rms(found.double() - exact) <= 1e-6 * rms(exact)


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_norms_are_computed_anew_when_the_device_finds_a_change(base, monkeypatch):
    weight, values = case(40, 128, base)
    a, b = draw(4, 128, seed=1).requires_grad_(), draw(40, 4, seed=2).requires_grad_()
    kept = kept_norms.KeptNorms()

    def exact(scaling=1.0):
        return (values + scaling * b.detach().double() @ a.detach().double()).norm(dim=1).float()

    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact())
    seen = []
    real = kernel.row_norms
    monkeypatch.setattr(kernel, "row_norms", lambda changed, *args: seen.append(changed.item()) or real(changed, *args))
    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact())
    a.data[1, 3] += 1  # no version counter sees it
    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact())
    b.data[39, 3] = float("nan")
    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact(), equal_nan=True)
    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact(), equal_nan=True)
    b.data[39, 3] = 0.0
    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact())
    assert seen == [0, 1, 1, 0, 1]
    torch.testing.assert_close(kept.of(weight, a, b, 0.25), exact(0.25))
    kept.forget()
    torch.testing.assert_close(kept.of(weight, a, b, 1.0), exact())


def test_a_backward_after_the_norms_have_changed_is_that_of_its_own_forward():
    """The kept norms are overwritten in place; a graph needs its own copy of them."""
    weight, _ = case(64, 128, "nf4")
    a, b, m = draw(4, 128, seed=1).requires_grad_(), draw(64, 4, seed=2).requires_grad_(), draw(64, seed=3).abs()
    m.requires_grad_()
    x, dy, kept = draw(9, 128, seed=4), draw(9, 64, seed=5), kept_norms.KeptNorms()

    def forward():
        return dora.dora_linear(x, weight, a, b, 1.0, m, kept.of(weight, a, b, 1.0))

    expected = torch.autograd.grad(forward(), [a, b, m], dy)
    y = forward()
    held = a.detach().clone()
    a.data.mul_(3)
    kept.of(weight, a, b, 1.0)
    a.data.copy_(held)
    for found, wanted in zip(torch.autograd.grad(y, [a, b, m], dy), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("nested", [True, False])
def test_scales_carry_the_factor(nested):
    weight, values = case(24, 256, "nf4", nested=nested)
    factor = draw(24, seed=1)
    absmax = kernel.scaled_absmax(weight, factor)
    exact = reference.nf4_scales(*weight.tensors()[1:]).view(24, 4) * factor[:, None]
    assert torch.equal(absmax.view(24, 4), exact)
    carrying = dataclasses.replace(weight, absmax=absmax, absmax2=None, code2=None, offset=None)
    scaled = dequantize.nf4_dequantize(carrying, torch.float32)
    torch.testing.assert_close(scaled.double(), values * factor[:, None].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rescaling(bias, dtype):
    z, dy = draw(150, 70, dtype=dtype).t(), draw(70, 150, dtype=dtype, seed=1)
    m, inverse = draw(150, seed=2).requires_grad_(), draw(150, seed=3).abs()
    z = z.detach().requires_grad_()
    b = draw(150, dtype=dtype, seed=4).requires_grad_() if bias else None
    y = dora.rescale(z, m, inverse, b, dtype)
    inputs = [z, m, *([b] if bias else [])]
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    factor = (m.detach() * inverse).double()
    wide_z, wide_dy = z.detach().double(), dy.double()
    exact = [wide_z * factor, wide_dy * factor, (wide_dy * wide_z).sum(0) * inverse.double()]
    if bias:
        exact = [exact[0] + b.detach().double(), *exact[1:], wide_dy.sum(0)]
    for ours, oracle in zip(found, exact, strict=True):
        ours = ours.detach()
        if ours.dtype == torch.float32:
            assert rms(ours.double() - oracle) <= 1e-6 * rms(oracle)
        else:
            assert_as_accurate(ours, oracle.to(dtype), oracle)  # rounded once


def test_an_output_whose_magnitude_is_zero_has_a_gradient():
    weight, values = case(64, 128, "nf4")
    a, b, m = draw(4, 128, seed=1), draw(64, 4, seed=2), draw(64, seed=3).abs()
    m[5] = 0.0
    m.requires_grad_()
    x, dy = draw(9, 128, seed=4), draw(9, 64, seed=5)
    norms = dora.row_norms(weight, a, b, 1.0)
    y = dora.dora_linear(x, weight, a, b, 1.0, m, norms, draw(64, seed=6))
    y.backward(dy)
    z = x.double() @ (values + b.double() @ a.double()).t()
    exact = (dy.double() * z).sum(0) / norms.double()
    torch.testing.assert_close(m.grad.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[:, 5], draw(64, seed=6)[5].expand(9))


@pytest.mark.parametrize(("k", "dtype"), [(100, torch.float32), (128, torch.float16)])
def test_what_the_scales_cannot_carry_is_rescaled(k, dtype, monkeypatch):
    """Blocks that cross rows, and fp16, in which a factor of nearly 0 would vanish."""
    weight, values = case(32, k, "nf4")
    a, b, m = (draw(4, k, seed=1) / k**0.5).to(dtype), draw(32, 4, dtype=dtype, seed=2), draw(32, seed=3)
    taken = []
    real = dora._Rescaled.apply
    monkeypatch.setattr(dora._Rescaled, "apply", lambda *args: taken.append(1) or real(*args))
    x = draw(9, k, dtype=dtype, seed=4)
    y = dora.dora_linear(x, weight, a, b, 1.0, m, dora.row_norms(weight, a, b, 1.0))
    merged = values + b.double() @ a.double()
    exact = x.double() @ merged.t() * (m.double() / merged.norm(dim=1))
    assert taken
    assert rms(y.double() - exact) <= (1e-5 if dtype == torch.float32 else 2e-3) * rms(exact)


def test_nothing_is_recorded_where_no_gradient_is_possible(monkeypatch):
    weight, _ = case(64, 128, "nf4")
    a, b, m = draw(4, 128, seed=1).requires_grad_(), draw(64, 4, seed=2).requires_grad_(), draw(64, seed=3)
    x, norms = draw(200, 128, seed=4), dora.row_norms(weight, a, b, 1.0)
    seen = []
    real = linear_cuda.forward
    monkeypatch.setattr(linear_cuda, "forward", lambda *args: seen.append(args[3:]) or real(*args))
    bias = draw(64, seed=5)
    with torch.no_grad():
        dora.dora_linear(x, weight, a, b, 1.0, m.requires_grad_(), norms, bias)
    ((given, save_h),) = seen
    assert given is bias, "added inside the product"
    assert not save_h


def test_what_a_captured_graph_reads_is_kept_for_it(monkeypatch):
    """Another scaling makes new buffers; those of the capture must stay."""
    weight, _ = case(32, 64, "dense")
    a, b, kept = draw(4, 64, seed=1), draw(32, 4, seed=2), kept_norms.KeptNorms()
    kept.of(weight, a, b, 1.0)
    held = weakref.ref(kept._adapters[0])
    monkeypatch.setattr(kept_norms, "_is_capturing", lambda frozen: True)
    fresh = kept.of(weight, a, b, 0.5)
    assert fresh is not kept._norms, "computed in the graph, and only for it"
    kept.of(weight, a, b, 1.0)
    monkeypatch.setattr(kept_norms, "_is_capturing", lambda frozen: False)
    kept.of(weight, a, b, 0.5)
    kept.forget()
    assert held() is not None
