"""Several linears over one input, by the kernels of the CUDA path: each as accurate as alone, x read once."""

import pytest
import torch

pytest.importorskip("triton")
from fastlora.kernels import lora as kernel
from fastlora.kernels.operands import Lora

import fastlora
from fastlora import reference
from fastlora.ops import group, linear_cuda, nf4
from fastlora.ops.group import Member, group_linears, neighbours
from tests.support.kernel_cases import DEVICE, KERNELS
from tests.support.numerics import assert_as_accurate

pytestmark = KERNELS
SEED, SCALING = 2**60 + 5, 2.0


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")


@pytest.fixture(params=["table", "expanded"])
def way(request, monkeypatch):
    """As the table of choices has it, here tiles expanded inside the product; and by whole expanded weights."""
    if request.param == "expanded":
        monkeypatch.setattr(linear_cuda, "_by_table", lambda *_: linear_cuda.DEQUANTIZE)


class Case:
    """Operands of several linears; a member is (N, R or 0, base, bias, dropout)."""

    def __init__(self, *members, m=80, k=64, dtype=torch.bfloat16, adapter=torch.float32):
        generator = torch.Generator().manual_seed(m + k)

        def draw(*shape, std=1.0, dtype=dtype):
            return (torch.randn(*shape, generator=generator) * std).to(dtype).to(DEVICE)

        self.x = draw(m, k)
        self.members, self.exact, self.dys, self.masks = [], [], [], []
        for place, (n, r, base, bias, p) in enumerate(members):
            weight = draw(n, k, std=k**-0.5)
            packed = nf4.quantize(weight.cpu()).to(DEVICE) if base == "nf4" else weight
            seed = SEED + place
            lora = None
            if r:
                a, b = draw(r, k, std=k**-0.5, dtype=adapter), draw(n, r, std=r**-0.5, dtype=adapter)
                lora = Lora(a, b, SCALING + place, p, torch.tensor([seed], device=DEVICE) if p else None)
            self.members.append(Member(packed, lora, draw(n) if bias else None))
            self.exact.append(packed.dequantize(torch.float32) if base == "nf4" else weight.float())
            self.dys.append(draw(m, n))
            self.masks.append(reference.dropout_mask(seed, m, k, p).to(DEVICE) if p else None)

    def leaves(self, dtype=None):
        adapters = [t for m in self.members if m.lora is not None for t in m.lora[:2]]
        return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in (self.x, *adapters)]

    def ours(self, used=None):
        x, *adapters = leaves = self.leaves()
        left = iter(adapters)
        members = [
            m if m.lora is None else m._replace(lora=m.lora._replace(a=next(left), b=next(left))) for m in self.members
        ]
        ys = group_linears(x, members)
        chosen = [p for p in range(len(ys)) if used is None or p in used]
        found = torch.autograd.grad([ys[p] for p in chosen], leaves, [self.dys[p] for p in chosen], allow_unused=True)
        return [*(y.detach() for y in ys), *found]

    def reference(self, dtype=None, used=None):
        x, *adapters = leaves = self.leaves(dtype)
        left, ys = iter(adapters), []
        for member, weight, mask in zip(self.members, self.exact, self.masks, strict=True):
            bias = None if member.bias is None else member.bias.to(x.dtype)
            if member.lora is None:
                y = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
            else:
                y = reference.lora_linear(
                    x, weight.to(x.dtype), next(left), next(left), member.lora.scaling, bias, mask
                )
            ys.append(y)
        chosen = [p for p in range(len(ys)) if used is None or p in used]
        dys = [self.dys[p].to(x.dtype) for p in chosen]
        found = torch.autograd.grad([ys[p] for p in chosen], leaves, dys, allow_unused=True)
        return [*(y.detach() for y in ys), *found]

    def check(self, used=None):
        for place, (got, baseline, oracle) in enumerate(
            zip(self.ours(used), self.reference(used=used), self.reference(torch.float64, used), strict=True)
        ):
            assert (got is None) == (oracle is None), place
            if got is not None:
                assert got.dtype is baseline.dtype
                assert_as_accurate(got, baseline, oracle, f"number {place}")


QKV = [(96, 8, "nf4", False, 0.0), (32, 8, "nf4", False, 0.0), (32, 8, "nf4", False, 0.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapter", [torch.float32, None])
def test_three_linears_as_one(dtype, adapter, way):
    Case(*QKV, dtype=dtype, adapter=adapter or dtype).check()


@pytest.mark.parametrize(
    "members",
    [
        [(96, 8, "nf4", True, 0.0), (32, 16, "nf4", False, 0.0), (48, 4, "nf4", True, 0.0)],
        [(96, 8, "nf4", True, 0.25), (32, 8, "nf4", False, 0.25)],
        [(96, 8, "nf4", True, 0.25), (32, 8, "nf4", False, 0.0), (32, 8, "nf4", False, 0.0)],
        [(96, 8, "nf4", False, 0.0), (32, 0, "nf4", True, 0.0), (32, 8, "nf4", False, 0.0)],
        [(96, 8, "dense", False, 0.0), (32, 8, "dense", True, 0.0)],
        [(96, 8, "dense", False, 0.0), (32, 8, "nf4", True, 0.0)],
        [(33, 3, "nf4", True, 0.0), (31, 5, "nf4", True, 0.0)],
        [(64, 40, "nf4", False, 0.0), (64, 40, "nf4", False, 0.0)],
    ],
)
def test_members_that_differ(members, way):
    Case(*members).check()


@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 2)])
def test_outputs_that_nothing_uses(used, way):
    Case(*QKV).check(used)


def test_rows_of_an_odd_length_and_few_rows():
    Case((40, 8, "nf4", False, 0.0), (24, 8, "nf4", False, 0.0), m=5, k=192).check()
    Case((40, 8, "dense", False, 0.0), (24, 8, "dense", False, 0.0), m=81, k=63).check()


def test_x_is_read_once_for_h_and_once_for_the_gradients_of_all(monkeypatch):
    reads = []
    for name in ("shrink", "x_parts"):
        real = getattr(kernel, name)

        def counted(x, *args, _real=real, _name=name, **options):
            reads.append((_name, args[0].shape))
            return _real(x, *args, **options)

        monkeypatch.setattr(kernel, name, counted)
    Case(*QKV, m=200).ours()
    assert reads == [("shrink", torch.Size([24, 64])), ("x_parts", torch.Size([200, 24]))]


def test_gradients_that_are_neighbours_need_one_product(monkeypatch):
    monkeypatch.setattr(linear_cuda, "_by_table", lambda *_: linear_cuda.DEQUANTIZE)
    found = []
    real = group.neighbours
    monkeypatch.setattr(group, "neighbours", lambda parts: [found.append(real(parts)), found[-1]][1])
    case = Case((64, 8, "nf4", False, 0.0), (64, 8, "nf4", False, 0.0), m=200)
    apart = case.ours()
    case.dys = list(torch.cat(case.dys, 1).split(64, 1))
    together = case.ours()
    assert found[0] is None
    assert found[1].shape == (200, 128)
    for got, want in zip(together, apart, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    case.check()


def test_neighbours():
    whole = torch.arange(60.0).view(5, 12)
    assert torch.equal(neighbours(list(whole.split([5, 4, 3], 1))), whole)
    assert torch.equal(neighbours([whole[:, 2:5], whole[:, 5:6]]), whole[:, 2:6])
    for apart in (
        [whole[:, :4], whole[:, 5:8]], [whole[:, 4:8], whole[:, :4]], [whole[:, :4], whole.clone()[:, 4:8]],
        [whole[:, :4], None], [None, whole[:, :4]], [whole[:3, :4], whole[1:4, 4:8]], [whole.t(), whole.t()],
        [whole.view(10, 6), whole.view(10, 6)],
    ):  # fmt: skip
        assert neighbours(apart) is None
    one = torch.arange(8.0)[None]
    assert torch.equal(neighbours([one[:, :4], one[:, 4:]]), one)


def test_outputs_may_be_changed_in_place(way):
    case = Case(*QKV)
    x = case.leaves()[0]
    q, k, _ = group_linears(x, case.members)
    before = k.detach().clone()
    q.mul_(0)
    k.add_(1)
    assert torch.equal(k.detach(), before + 1)
    (q.sum() + k.sum()).backward()
    assert x.grad is not None


def test_without_gradients_and_under_autocast():
    case = Case(*QKV, dtype=torch.float32)
    with torch.no_grad():
        ys = group_linears(case.x, case.members)
        assert not any(y.requires_grad for y in ys)
    with torch.autocast("cpu" if DEVICE == "cpu" else "cuda", torch.bfloat16):
        for y, again in zip(ys, group_linears(case.x, case.members), strict=True):
            assert torch.equal(y, again)


def test_a_kept_output_is_not_computed_again(monkeypatch, way):
    calls = []
    real = group._computed
    monkeypatch.setattr(group, "_computed", lambda *args: [calls.append(0), real(*args)][1])
    case = Case(*QKV)
    x, *adapters = leaves = case.leaves()
    left = iter(adapters)
    members = [m._replace(lora=m.lora._replace(a=next(left), b=next(left))) for m in case.members]

    def block(x):
        q, k, v = group_linears(x.sin(), members)
        return q.float().cos().sum() + (k * v).float().sum()

    plain = torch.autograd.grad(block(x), leaves)
    calls.clear()
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=fastlora.keep_linears)
    kept = torch.autograd.grad(y, leaves)
    assert len(calls) == 1
    for got, want in zip(kept, plain, strict=True):
        assert torch.equal(got, want)


def test_expanded_once_over_micro_batches(monkeypatch):
    filled = []
    real = group.fill
    monkeypatch.setattr(group, "fill", lambda *args: [filled.append(0), real(*args)][1])
    case = Case((64, 8, "nf4", False, 0.0), (64, 8, "nf4", False, 0.0), m=200)
    case.dys = list(torch.cat(case.dys, 1).split(64, 1))
    members = [
        m._replace(lora=m.lora._replace(a=torch.nn.Parameter(m.lora.a), b=torch.nn.Parameter(m.lora.b)))
        for m in case.members
    ]
    x = case.x.requires_grad_()
    found = []
    with fastlora.expand_once():
        for _ in range(2):
            found.append(torch.autograd.grad(group_linears(x, members), x, case.dys)[0])
    assert len(filled) == 2
    assert torch.equal(*found)
