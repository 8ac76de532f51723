"""The grouped linear on both of its paths through torch, dense and packed, against weights with the update added."""

import itertools

import pytest
import torch
from torch import nn

from fastlora.ops import grouped, nf4
from fastlora.ops.grouped import grouped_lora_linear
from tests.support.numerics import assert_as_accurate

GROUPED = list(itertools.product((None, "segments"), (True, False), (8, 3)))


@pytest.mark.parametrize(("way", "with_bias", "rank"), GROUPED)
def test_both_ways_of_the_grouped_linear(way, with_bias, rank, monkeypatch):
    if way is None:
        if not hasattr(torch.nn.functional, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        monkeypatch.setattr(grouped, "_takes_grouped_mm", lambda x, *_: x.dtype is torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    sizes = {"x": (20, 32), "w": (3, 24, 32), "a": (3, rank, 32), "b": (3, 24, rank), "bias": (3, 24), "dy": (20, 24)}
    drawn = {name: torch.randn(shape, generator=generator).bfloat16().double() for name, shape in sizes.items()}
    offsets = torch.tensor([7, 7, 20], dtype=torch.int32)  # the second expert has no row

    def run(dtype, compute):
        given = {name: value.to(dtype).requires_grad_(name != "dy") for name, value in drawn.items()}
        given["b"].data = given["b"].data.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as peft packs it
        y = compute(given)
        y.backward(given["dy"])
        grads = {name: value.grad for name, value in given.items() if value.grad is not None}
        return {"y": y.detach(), **grads}

    def formed(given):
        w = given["w"] + (0.5 * given["b"] @ given["a"])
        stretches = [given["x"][:7] @ w[0].t(), given["x"][7:] @ w[2].t()]
        bias = torch.cat([given["bias"][0].expand(7, -1), given["bias"][2].expand(13, -1)])
        return torch.cat(stretches) + bias * with_bias

    def ours(given):
        args = (given["x"], given["w"], given["a"], given["b"], 0.5, offsets)
        return grouped_lora_linear(*args, given["bias"] if with_bias else None)

    oracle, baseline, found = run(torch.float64, formed), run(torch.bfloat16, formed), run(torch.bfloat16, ours)
    for name, value in found.items():
        assert_as_accurate(value, baseline[name], oracle[name], name)


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("rows", [40, grouped.FEW_ROWS], ids=["grouped_mm", "one_by_one"])
def test_a_packed_stack_either_way(rows, monkeypatch):
    monkeypatch.setattr(grouped, "_takes_grouped_mm", lambda x, *_: x.dtype is torch.bfloat16)
    taken = []
    monkeypatch.setattr(
        grouped, "_by_grouped_mm", lambda *args, way=grouped._by_grouped_mm: taken.append(1) or way(*args)
    )
    generator = torch.Generator().manual_seed(5)
    weight = nf4.quantize(torch.randn(3 * 24, 64, generator=generator))
    values = weight.dequantize().view(3, 24, 64)
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, 64), (3, 4, 64), (3, 24, 4))]
    dy = torch.randn(rows, 24, generator=generator).bfloat16()
    offsets = torch.tensor([rows // 2, rows // 2, rows], dtype=torch.int32)

    def run(dtype, stack):
        x, a, b = (tensor.to(dtype).requires_grad_() for tensor in drawn)
        if isinstance(stack, nf4.NF4Weight):
            y = grouped_lora_linear(x, stack, a, b, 0.5, offsets)
        else:
            formed = stack.to(dtype) + 0.5 * b @ a
            y = torch.cat([x[: rows // 2] @ formed[0].t(), x[rows // 2 :] @ formed[2].t()])
        y.backward(dy.to(dtype))
        return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}

    oracle, baseline = run(torch.float64, values.bfloat16()), run(torch.bfloat16, values)
    for name, value in run(torch.bfloat16, weight).items():
        assert_as_accurate(value, baseline[name], oracle[name], name)
    assert bool(taken) is (rows > grouped.FEW_ROWS)


def test_rows_beyond_the_last_expert_give_zero():
    x, offsets = torch.randn(5, 8, requires_grad=True), torch.tensor([2, 4], dtype=torch.int32)
    y = grouped_lora_linear(x, torch.randn(2, 4, 8), torch.ones(2, 1, 8), torch.ones(2, 4, 1), 1.0, offsets)
    assert y[:4].abs().min() > 0
    assert torch.equal(y[4], torch.zeros(4))
    y.sum().backward()
    assert torch.equal(x.grad[4], torch.zeros(8))


def test_no_rows_at_all():
    weight = torch.randn(2, 4, 8, requires_grad=True)
    offsets = torch.zeros(2, dtype=torch.int32)
    y = grouped_lora_linear(torch.zeros(0, 8), weight, torch.ones(2, 1, 8), torch.ones(2, 4, 1), 1.0, offsets)
    assert y.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 7)}, r"x must be \[S, K\]"),
        ({"weight": nf4.quantize(torch.ones(7, 64))}, r"an NF4 weight \[2 N, K\]"),
        ({"lora_a": torch.zeros(3, 2, 8)}, r"lora_a must be \[2, R, 8\]"),
        ({"lora_b": torch.zeros(2, 4, 3)}, r"lora_b \[2, 4, R\]"),
        ({"lora_b": None}, "both or neither"),
        ({"offsets": torch.tensor([2, 5])}, r"offsets must be \[E\] in int32"),
        ({"bias": torch.zeros(4)}, r"bias must be \[2, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "x": torch.zeros(5, 8),
        "weight": torch.zeros(2, 4, 8),
        "lora_a": torch.zeros(2, 2, 8),
        "lora_b": torch.zeros(2, 4, 2),
        "scaling": 1.0,
        "offsets": torch.tensor([2, 5], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        grouped_lora_linear(**given | change)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_expert_by_expert_torch_compile_sees_one_operator(packed):
    """In fp32, which grouped_mm does not take; the numbers of rows may change without another compilation."""
    generator = torch.Generator().manual_seed(6)
    stack = torch.randn(3 * 24, 64, generator=generator)
    weight = nf4.quantize(stack) if packed else stack.view(3, 24, 64)
    a, b = torch.randn(3, 4, 64, generator=generator), torch.randn(24, 4, 3, generator=generator).permute(2, 0, 1)
    bias = torch.randn(3, 24, generator=generator)

    def run(x, offsets, a, b, bias):
        return grouped_lora_linear(x, weight, a, b, 0.5, offsets, bias)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ends in ([7, 7, 20], [1, 15, 19]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        found = []
        for call in (run, compiled):
            x = torch.randn(20, 64, generator=torch.Generator().manual_seed(7))
            leaves = [leaf.clone().requires_grad_() for leaf in (x, a, b, bias)]
            y = call(leaves[0], offsets, *leaves[1:])
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_the_operator_of_the_loop():
    x, a, b = torch.randn(5, 8), torch.randn(2, 2, 8), torch.randn(2, 4, 2)
    given = [value.requires_grad_() for value in (x, torch.randn(2, 4, 8), a, b, torch.randn(2, 4))]
    offsets = torch.tensor([2, 5], dtype=torch.int32)
    operands = (*given, offsets, None, None, None, None, 8, 8, 0, 0.5)
    torch.library.opcheck(torch.ops.fastlora.grouped_segments.default, operands)
