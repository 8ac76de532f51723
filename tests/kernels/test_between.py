"""What stands between the linears: RMSNorm, rotary embedding, gated activations, by the tolerance rule."""

import pytest
import torch

pytest.importorskip("triton")
from fastlora.ops import gated, rms_norm, rotary
from tests.support.kernel_cases import DEVICE, KERNELS, draw
from tests.support.numerics import assert_as_accurate

pytestmark = KERNELS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(ours, plain, leaves, dys):
    """Outputs and gradients of two functions of the leaves; the second also in fp64."""
    found = []
    for function, dtype in ((ours, None), (plain, None), (plain, torch.float64)):
        given = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, given, [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)])
        found.append([*outputs, *gradients])
    for place, (got, baseline, oracle) in enumerate(zip(*found, strict=True)):
        assert_as_accurate(got.detach(), baseline.detach(), oracle.detach(), f"number {place}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 5, 128), (3, 4096), (5, 100), (2, 16384), (2, 3), (300, 24)])
def test_rms_norm(shape, offset, dtype):
    x, dy = draw(*shape).to(dtype) * 3, draw(*shape).to(dtype)
    weight = (draw(shape[-1]) + 1 - offset).to(dtype)
    check(
        lambda x, weight: rms_norm.rms_norm(x, weight, 1e-6, offset),
        lambda x, weight: rms_norm.exact(x, weight, 1e-6, offset),
        [x, weight], [dy],
    )  # fmt: skip


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_in_two_dtypes(x_dtype):
    x, weight = draw(9, 96).to(x_dtype), draw(96).float()
    y = rms_norm.rms_norm(x, weight, 1e-5, dtype=torch.float32)
    assert y.dtype is torch.float32
    exact = rms_norm.exact(x.double(), weight.double(), 1e-5, 0.0)
    assert_as_accurate(y, exact.float(), exact)


def test_rms_norm_of_rows_apart_and_of_none():
    x = draw(6, 200)[:, 40:140]
    assert not x.is_contiguous()
    torch.testing.assert_close(
        rms_norm.rms_norm(x, torch.ones(100, device=DEVICE), 0.0), x / x.square().mean(-1, True).sqrt()
    )
    turned = draw(100, 6).t()
    torch.testing.assert_close(
        rms_norm.rms_norm(turned, torch.ones(100, device=DEVICE), 0.0), rms_norm.exact(turned, 1.0, 0.0, 0.0)
    )
    assert rms_norm.rms_norm(draw(0, 64), torch.ones(64, device=DEVICE), 1e-6).shape == (0, 64)


def angles(length, size, batch=1):
    turns = draw(batch, length, size)
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "size", "rotated", "batch"),
    [
        ((4, 2), 64, 64, 1),
        ((3, 1), 16, 16, 2),
        ((14, 2), 80, 80, 1),
        ((4, 4), 96, 72, 1),
        ((1, 1), 2, 2, 1),
        ((5, 5), 24, 8, 2),
    ],
)
@pytest.mark.parametrize("dim", [1, 2])
def test_rotary(heads, size, rotated, batch, dim, dtype):
    q, k, dq, dk = (draw(2, 5, number, size).to(dtype) for number in (*heads, *heads))
    cos, sin = (part.to(dtype) for part in angles(5, rotated, batch))
    if dim == 1:
        q, k, dq, dk = (t.transpose(1, 2) for t in (q, k, dq, dk))

    def plain(q, k):
        wide = (cos.to(q.dtype), sin.to(q.dtype))
        if dim == 1:
            return rotary.exact(q, k, *wide)
        return tuple(t.transpose(1, 2) for t in rotary.exact(q.transpose(1, 2), k.transpose(1, 2), *wide))

    check(lambda q, k: rotary.rotary(q, k, cos, sin, dim), plain, [q, k], [dq, dk])


def test_rotary_with_angles_that_both_halves_share():
    q, k = draw(2, 4, 5, 32), draw(2, 2, 5, 32)
    cos, sin = angles(5, 16)
    wide = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    leaves = [t.requires_grad_() for t in (q, k)]
    found, expected = rotary.rotary(q, k, cos, sin, shared=True), rotary.exact(q, k, *wide)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(sum((y * y.sin()).sum() for y in ys), leaves) for ys in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_rotary_writes_nothing_in_place_and_takes_any_strides():
    q, k = draw(2, 4, 6, 32).transpose(2, 3).contiguous().transpose(2, 3), draw(2, 2, 6, 32)
    before = [t.clone() for t in (q, k)]
    cos, sin = angles(6, 32)
    for got, want in zip(rotary.rotary(q, k, cos, sin), rotary.exact(q, k, cos, sin), strict=True):
        torch.testing.assert_close(got, want)
    assert all(torch.equal(t, copy) for t, copy in zip((q, k), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", gated.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 2048), (2, 5, 100), (4, 5000), (1, 1)])
def test_gated(shape, act, dtype):
    gate, up, dy = (draw(*shape).to(dtype) * 2 for _ in range(3))
    check(lambda g, u: gated.gated(g, u, act), lambda g, u: gated.ACTIVATIONS[act](g) * u, [gate, up], [dy])


def test_gated_halves_of_one_tensor_and_far_values():
    both = torch.tensor([[-1e4, -90.0, -20.0, 0.0, 20.0, 1e4, 1, 1, 1, 1, 1, 1]], device=DEVICE)
    gate, up = both.chunk(2, -1)
    for act, plain in gated.ACTIVATIONS.items():
        leaf = gate.detach().requires_grad_()
        y = gated.gated(leaf, up, act)
        theirs = gate.detach().double().requires_grad_()
        torch.testing.assert_close(y.double(), plain(theirs), atol=1e-7, rtol=1e-6)
        slopes = [torch.autograd.grad(f.sum(), leaf)[0] for f, leaf in ((y, leaf), (plain(theirs), theirs))]
        torch.testing.assert_close(slopes[0].double(), slopes[1], atol=1e-6, rtol=1e-6)


def test_what_was_saved_may_be_used_twice():
    gate, up = (draw(4, 64).requires_grad_() for _ in range(2))
    y = gated.gated(gate, up, "silu")
    once, twice = (torch.autograd.grad(y.sum(), (gate, up), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), gate, create_graph=True)
