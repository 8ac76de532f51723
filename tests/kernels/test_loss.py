"""Head and cross-entropy in parts, by the tolerance rule: the kernel, and the same by torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")
import fastlora
from fastlora.ops import loss
from tests.support.kernel_cases import DEVICE, KERNELS, draw
from tests.support.numerics import assert_as_accurate, rms

pytestmark = KERNELS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {
    "plain": (loss.Logits(), 0.0),
    "scaled": (loss.Logits(0.25), 0.0),  # exact in fp16: the rows of rare classes share one rounding
    "capped": (loss.Logits(1.0, 3.0), 0.0),
    "scaled and capped": (loss.Logits(2.0, 5.0), 0.0),
    "smoothed": (loss.Logits(), 0.1),
    "all": (loss.Logits(0.5, 4.0), 0.2),
}


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch):
    name = {"kernel": "triton"}.get(request.param, "torch")
    monkeypatch.setenv("FASTLORA_BACKEND", name)
    from fastlora.ops.backend import backend

    assert backend(DEVICE).name == name
    return request.param


def head_of(vocabulary, width, dtype, trained=False):
    head = nn.Linear(width, vocabulary, bias=False, device=DEVICE).to(dtype)
    with torch.no_grad():
        head.weight.copy_(draw(vocabulary, width) * 3 * width**-0.5)
    return head.requires_grad_(trained)


def labels_of(rows, vocabulary, ignored=3):
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels[::ignored] = loss.IGNORED
    return labels


def plainly(x, weight, labels, logits, smoothing):
    t = logits(F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)))
    return F.cross_entropy(t, labels, ignore_index=loss.IGNORED, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [50, 2500])
def test_loss_and_gradients(way, vocabulary, kind, dtype):
    logits, smoothing = KINDS[kind]
    for trained in (False, True):
        x, head, labels = draw(300, 32).to(dtype), head_of(vocabulary, 32, dtype, trained), labels_of(300, vocabulary)
        given = x.clone().requires_grad_()
        total = loss.linear_cross_entropy(given, head, labels, logits=logits, smoothing=smoothing, divisor=7)
        total.backward()
        found = [total.detach(), given.grad, *([head.weight.grad] if trained else [])]
        others = []
        for other in (dtype, torch.float64):
            leaf, weight = (t.detach().to(other).requires_grad_() for t in (x, head.weight))
            value = plainly(leaf, weight, labels, logits, smoothing) / 7
            gradients = torch.autograd.grad(value, [leaf, weight][: len(found) - 1])
            others.append([value.detach(), *gradients])
        for name, got, baseline, exact in zip(("loss", "dx", "dweight"), found, *others, strict=False):
            if name == "loss":  # one number: luck decides how far torch's is off
                torch.testing.assert_close(got.double(), exact, rtol=2e-6 if dtype is torch.float32 else 2e-3, atol=0)
            else:
                assert_as_accurate(got, baseline, exact, f"{name}, trained {trained}")


@pytest.mark.parametrize("kind", ["frozen", "trained", "hooked", "bias", "adapted", "nf4"])
def test_parts_are_the_whole_for_any_head(way, kind, monkeypatch):
    head = head_of(200, 64, torch.float32, kind == "trained")
    if kind == "bias":
        head.bias = nn.Parameter(draw(200), requires_grad=False)
    if kind == "hooked":
        head.register_forward_hook(lambda module, args, y: y * 2)
    if kind in ("adapted", "nf4"):
        model = nn.ModuleDict({"head": head})
        quantize = "nf4" if kind == "nf4" else None
        head = fastlora.replace_linear(model, r=4, target_modules=["head"], quantize=quantize)["head"]
        nn.init.normal_(next(p for name, p in head.named_parameters() if "lora_B" in name))
    x, labels = draw(40, 64), labels_of(40, 200)
    places = (labels != loss.IGNORED).nonzero()[:, 0]
    found = {}
    for name, rows in (("whole", 1000), ("parts", 7), ("chosen", 5)):
        monkeypatch.setattr(loss, "_VALUES", dict.fromkeys(("cuda", "cpu"), 1))
        monkeypatch.setattr(loss, "_ROWS", rows)
        monkeypatch.setattr(loss, "_TILE", 1)
        head.zero_grad()
        leaf = x.clone().requires_grad_()
        total = loss.linear_cross_entropy(leaf, head, labels, places=places if name == "chosen" else None)
        total.backward()
        found[name] = [total.detach(), leaf.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
    leaf = x.clone().requires_grad_()
    head.zero_grad()
    plain = F.cross_entropy(head(leaf).float(), labels, reduction="sum")
    plain.backward()
    found["plain"] = [plain.detach(), leaf.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
    assert len(found["plain"]) == {"trained": 3, "adapted": 4, "nf4": 4}.get(kind, 2)
    for name in ("whole", "parts", "chosen"):
        for got, want in zip(found[name], found["plain"], strict=True):
            assert rms(got - want) <= 1e-5 * rms(want), name


def test_a_loss_scale_beyond_fp16_changes_no_gradient(way):
    head, labels = head_of(300, 64, torch.float16), labels_of(9, 300)
    gradients = []
    for scale in (1.0, 2.0**17):
        x = draw(9, 64).half().requires_grad_()
        (loss.linear_cross_entropy(x, head, labels, divisor=2**10) * scale).backward()
        gradients.append(x.grad.float() / scale)
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=1e-6)


def test_no_rows_and_rows_that_do_not_count(way):
    head = head_of(70, 16, torch.float32)
    for labels, places in (
        (torch.full((5,), loss.IGNORED, device=DEVICE), None),
        (labels_of(5, 70), torch.zeros(0, dtype=torch.int64, device=DEVICE)),
    ):
        x = draw(5, 16).requires_grad_()
        total = loss.linear_cross_entropy(x, head, labels, places=places)
        total.backward()
        assert total.item() == 0
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_far_logits(way):
    head, labels = head_of(100, 16, torch.float32), labels_of(8, 100)
    x = (draw(8, 16) * 1e4).requires_grad_()
    total = loss.linear_cross_entropy(x, head, labels)
    total.backward()
    leaf = x.detach().double().requires_grad_()
    exact = plainly(leaf, head.weight.double(), labels, loss.Logits(), 0.0)
    exact.backward()
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)


def test_a_label_that_is_no_class_is_never_silent(way):
    head, labels = head_of(100, 16, torch.float32), torch.tensor([1, 100, -1], device=DEVICE)
    x = draw(3, 16).requires_grad_()
    if way == "torch":
        if DEVICE == "cpu":
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                loss.linear_cross_entropy(x, head, labels)
        return
    total = loss.linear_cross_entropy(x, head, labels)
    total.backward()
    assert total.isnan()
    assert x.grad.isnan().any(1).tolist() == [False, True, True]


def test_only_the_sum_is_wanted(way, monkeypatch):
    labels, x, asked = labels_of(8, 100), draw(8, 16).bfloat16().requires_grad_(), []
    own = loss._of_part
    monkeypatch.setattr(loss, "_of_part", lambda *a: asked.append(a[-1]) or own(*a))
    for head in (head_of(100, 16, torch.bfloat16), head_of(100, 16, torch.bfloat16, trained=True)):
        with torch.no_grad():
            alone = loss.linear_cross_entropy(x, head, labels)
        assert not alone.requires_grad
        assert torch.equal(alone, loss.linear_cross_entropy(x, head, labels).detach())
    assert asked == [(False, False), (True, False), (False, False), (True, True)]


def test_autocast_computes_in_its_dtype(way):
    kind = torch.device(DEVICE).type
    head, labels = head_of(100, 16, torch.float32), labels_of(8, 100)
    x = draw(8, 16).requires_grad_()
    with torch.autocast(kind, torch.bfloat16):
        found = loss.linear_cross_entropy(x, head, labels)
    narrow = loss.linear_cross_entropy(x.bfloat16(), head.bfloat16(), labels)
    assert torch.equal(found, narrow)
    found.backward()
    assert x.grad.dtype is torch.float32


def test_a_second_derivative_is_refused(way):
    head, labels = head_of(100, 16, torch.float32), labels_of(8, 100)
    x = draw(8, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss.linear_cross_entropy(x, head, labels), x, create_graph=True)
