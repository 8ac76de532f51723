"""The grouped product in the interpreter: both directions, every layout of a stack, uneven and empty experts."""

import dataclasses

import pytest
import torch

from fastlora.ops import nf4
from tests.support.numerics import assert_as_accurate

triton = pytest.importorskip("triton")
from fastlora.kernels import grouped  # noqa: E402
from fastlora.kernels.fused_config import Config  # noqa: E402
from fastlora.kernels.segments import Segments, by_offsets  # noqa: E402

from tests.support.kernel_cases import DEVICE, KERNELS, draw  # noqa: E402

pytestmark = KERNELS
SCALING = 0.5
ENDS = [3, 3, 25, 26, 34]  # the second expert has no row
ROWS = 36  # the last two have no expert
FEW = Config(block_m=16, block_n=64, block_k=64, splits=1, warps=4, stages=3, tma=False)
MANY = Config(block_m=16, block_n=32, block_k=64, splits=1, warps=4, stages=3, tma=True)
KINDS = ("dense", "transposed", "nested", "plain")


class Case:
    """A stack with adapters and rows; `check` compares both directions with fp64 by the tolerance rule."""

    def __init__(
        self, kind="dense", n=40, k=128, r=5, dtype=torch.float16, adapter=torch.float32, bias=None, ends=ENDS,
        rows=ROWS, blocksize=64,
    ):  # fmt: skip
        self.ends, self.rows, self.dtype, self.kind = ends, rows, dtype, kind
        self.segments = by_offsets(torch.tensor(ends, dtype=torch.int32, device=DEVICE), rows)
        experts = len(ends)
        values = draw(experts, n, k) / k**0.5
        if kind in ("nested", "plain"):
            self.weight = nf4.quantize(values.view(-1, k).cpu(), blocksize, kind == "nested").to(DEVICE)
            self.exact = self.weight.dequantize(dtype).view(experts, n, k)
        else:
            self.weight = self.exact = values.to(dtype)
            if kind == "transposed":  # as gpt-oss keeps it
                self.weight = self.exact.transpose(1, 2).contiguous().transpose(1, 2)
        self.x, self.dy = draw(rows, k, dtype=dtype, seed=1), draw(rows, n, dtype=dtype, seed=2)
        self.h, self.g = (draw(rows, r, seed=seed) if r else None for seed in (3, 4))
        for tensor in (self.x, self.dy, self.h, self.g):
            if tensor is not None:
                tensor[ends[-1] :] = float("nan")  # rows without an expert are not read
        self.b, self.a, self.bias = None, None, None
        if r:
            self.b = draw(n, r, experts, seed=5).div(r**0.5).to(adapter).permute(2, 0, 1)  # as peft packs it
            self.a = draw(experts, r, k, seed=6).div(r**0.5).to(adapter)
        if bias is not None:
            self.bias = draw(experts, n, dtype=bias, seed=7)

    def y(self, config=None, scaling=SCALING):
        return grouped.grouped_linear(
            self.x, self.weight, self.segments, self.h, self.b, scaling, self.bias, config
        )  # fmt: skip

    def dx(self, config=None):
        return grouped.grouped_linear_t(self.dy, self.weight, self.segments, self.g, self.a, config)

    def expected(self, dtype, back=False):
        """The same by torch, expert by expert."""
        x, h, scaling = (self.dy, self.g, 1.0) if back else (self.x, self.h, SCALING)
        out = torch.zeros(self.rows, self.exact.shape[2 if back else 1], dtype=dtype, device=DEVICE)
        for expert, (begin, end) in enumerate(zip([0, *self.ends], self.ends, strict=False)):
            w = self.exact[expert].to(dtype)
            mine = x[begin:end].to(dtype) @ (w if back else w.t())
            if h is not None:
                b = self.a[expert].t() if back else self.b[expert]
                wide = torch.float64 if dtype == torch.float64 else b.dtype
                mine = mine + (h[begin:end].to(wide) @ b.to(wide).t() * scaling).to(dtype)
            if self.bias is not None and not back:
                mine = mine + self.bias[expert].to(dtype)
            out[begin:end] = mine
        return out

    def check(self, config=None):
        for back, found in ((False, self.y(config)), (True, self.dx(config))):
            assert found.dtype == self.dtype
            what = f"{'dx' if back else 'y'}, {self.kind}, {config}"
            assert_as_accurate(found, self.expected(self.dtype, back), self.expected(torch.float64, back), what)
            assert not found[self.ends[-1] :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "adapter", "config"),
    [
        (torch.float16, torch.float32, FEW),
        (torch.float16, torch.float16, MANY),
        (torch.bfloat16, torch.float32, MANY),
        (torch.bfloat16, torch.bfloat16, FEW),
    ],
)
def test_both_directions_follow_the_oracle(config, kind, dtype, adapter):
    Case(kind, dtype=dtype, adapter=adapter, bias=dtype).check(config)


@pytest.mark.parametrize("config", [FEW, MANY])
@pytest.mark.parametrize("kind", ["dense", "transposed"])
def test_sizes_that_fit_no_tile(config, kind):
    Case(kind, n=43, k=131, r=3, bias=torch.float32).check(config)


@pytest.mark.parametrize("config", [FEW, MANY])
@pytest.mark.parametrize("blocksize", [32, 128])
def test_blocks_smaller_and_larger_than_a_tile(config, blocksize):
    Case("nested", n=38, k=96 if blocksize == 32 else 128, blocksize=blocksize).check(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [0, 40])
def test_the_default_config_with_and_without_adapters(kind, r):
    Case(kind, r=r, bias=torch.float16 if r else None).check()


@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize(
    ("ends", "rows"),
    [([0, 0, 0], 5), ([0, 0, 20], 20), ([20], 20), ([0] * 20 + [1] * 10 + [4] * 10, 4), ([16, 32, 48], 70)],
    ids=["no expert", "only the last", "one expert", "more experts than rows", "whole tiles"],
)
def test_uneven_and_empty_experts(kind, ends, rows):
    Case(kind, n=32, k=64, ends=ends, rows=rows).check(FEW)


def test_no_rows_and_rank_zero():
    assert Case(ends=[0, 0], rows=0).y().shape == (0, 40)
    case = Case(r=0)
    nothing = case.x.new_empty(ROWS, 0).float(), case.x.new_empty(len(ENDS), 40, 0)
    with_nothing = grouped.grouped_linear(case.x, case.weight, case.segments, *nothing, SCALING)
    assert torch.equal(with_nothing, case.y())


@pytest.mark.parametrize("config", [FEW, MANY])
def test_the_weight_is_bit_for_bit_the_expanded_one(config):
    """All rows of the identity matrix for every expert: what the loop looks up and scales comes out as it is."""
    case = Case("nested", n=40, k=64, r=0, ends=[64, 128, 192], rows=192)
    case.x = torch.eye(64, dtype=torch.float16, device=DEVICE).repeat(3, 1)
    assert torch.equal(case.y(config), case.exact.mT.reshape(192, 40))
    case = Case("nested", n=40, k=64, r=0, ends=[40, 80, 120], rows=120)
    case.dy = torch.eye(40, dtype=torch.float16, device=DEVICE).repeat(3, 1)
    assert torch.equal(case.dx(config), case.exact.view(120, 64))


@pytest.mark.parametrize("config", [FEW, MANY])
@pytest.mark.parametrize("kind", ["dense", "transposed"])
def test_experts_without_rows_are_not_read(config, kind):
    case = Case(kind, n=43, k=72)
    y, dx = case.y(config), case.dx(config)
    case.weight[1] = case.b[1] = case.a[1] = float("nan")
    assert torch.equal(case.y(config), y)
    assert torch.equal(case.dx(config), dx)


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_strided_operands_and_words_at_odd_addresses(kind):
    case = Case(kind)
    y, dx = case.y(FEW), case.dx(MANY)
    assert torch.equal(case.y(FEW), y)  # the same input gives the same bits
    case.x, case.dy, case.h, case.g = (t.t().contiguous().t() for t in (case.x, case.dy, case.h, case.g))
    case.a = case.a.repeat_interleave(2, dim=2)[..., ::2]
    if kind == "dense":
        case.weight = case.weight.repeat_interleave(3, dim=2)[..., ::3]
    else:
        odd = torch.empty(case.weight.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
        case.weight = dataclasses.replace(case.weight, codes=odd.copy_(case.weight.codes))
    assert torch.equal(case.y(FEW), y)
    assert torch.equal(case.dx(MANY), dx)


def test_the_tolerance_catches_a_wrong_scaling_and_another_experts_weight():
    case = Case(bias=torch.float16)
    baseline, oracle = case.expected(torch.float16), case.expected(torch.float64)
    assert_as_accurate(case.y(FEW), baseline, oracle)
    wrong = [case.y(FEW, scaling=SCALING * 1.01)]
    case.segments.ends[2] -= 1
    wrong.append(case.y(FEW))
    for y in wrong:
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(y, baseline, oracle)


def test_what_cannot_be_done_is_named():
    case = Case(n=40, k=64)

    def packed(n, k=64):
        return nf4.quantize(draw(n, k).cpu()).to(DEVICE)

    half, bf16 = torch.float16, torch.bfloat16
    assert grouped.supports(bf16, bf16, 128, 4096, 0, 256) == ""
    assert grouped.supports(half, None, 128, 4096, 64, 0) == ""
    for asked, message in (
        ((torch.float32, torch.float32, 8, 64, 0, 0), "bf16 or fp16"),
        ((bf16, half, 8, 64, 0, 0), "the stack"),
        ((bf16, None, 8, 96, 64, 0), "96"),
        ((bf16, bf16, 2000, 64, 0, 0), "2000 experts"),
        ((bf16, bf16, 8, 64, 0, 257), "257"),
    ):
        assert message in grouped.supports(*asked)
    for change, message in (
        ({"x": case.x.float()}, "bf16 or fp16"),
        ({"x": case.x[:, :32]}, r"must be \[S, 64\]"),
        ({"weight": case.weight[1:]}, r"weight must be \[5, N, K\]"),
        ({"weight": case.weight[0]}, r"weight must be \[5, N, K\]"),
        ({"weight": packed(199)}, r"\[199, 64\] is not a stack of 5 experts"),
        ({"weight": packed(200, 128)}, r"must be \[S, 128\]"),
        ({"weight": packed(200, 96), "x": case.x.repeat(1, 2)[:, :96]}, "96"),
        ({"weight": packed(195)}, "do not give"),
        ({"h": None}, "both or neither"),
        ({"lora_b": case.b[:, :39]}, "do not give"),
        ({"h": case.h.half()}, "must be fp32"),
        ({"segments": Segments(case.segments.ends, 6)}, "6"),
        ({"bias": case.x.new_zeros(5, 39)}, r"bias has shape \[5, 39\], expected \[5, 40\]"),
        ({"bias": case.x.new_zeros(40)}, r"expected \[5, 40\]"),
        ({"x": case.x.to("meta")}, "the weight is on .*, expected meta"),
    ):
        given = {"x": case.x, "weight": case.weight, "segments": case.segments, "h": case.h, "lora_b": case.b}
        with pytest.raises(ValueError, match=message):
            grouped.grouped_linear(**given | change)
