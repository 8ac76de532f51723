"""The fused dequantize-GEMM in the interpreter: both directions, every option, odd shapes; and its machine code."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4
from tests.support.numerics import assert_as_accurate

triton = pytest.importorskip("triton")
from fastlora.kernels import fused, fused_config  # noqa: E402
from fastlora.kernels.fused_config import Config  # noqa: E402
from fastlora.kernels.lora_plan import Dropout  # noqa: E402

from bench.machine_code.specimen import SHARED_LIMIT  # noqa: E402
from tests.support.kernel_cases import DEVICE, KERNELS, draw  # noqa: E402

pytestmark = KERNELS
SEED = torch.tensor([2**61 + 12345], device=DEVICE)
SCALING = 0.5
FEW = Config(block_m=16, block_n=64, block_k=64, splits=1, warps=4, stages=3, tma=False)
MANY = Config(block_m=64, block_n=64, block_k=64, splits=1, warps=4, stages=3, tma=False)


def quantized(n, k, blocksize=64, nested=True):
    return nf4.quantize(draw(n, k).cpu() / k**0.5, blocksize, nested).to(DEVICE)


class Case:
    """A weight with adapters and activations; `check` compares both directions with fp64 by the tolerance rule."""

    def __init__(
        self, m, n, k, r, dtype=torch.float16, adapter=torch.float32, blocksize=64, nested=True, bias=False, p=0.0
    ):
        self.weight, self.dtype = quantized(n, k, blocksize, nested), dtype
        self.x, self.dy = draw(m, k, dtype=dtype, seed=1), draw(m, n, dtype=dtype, seed=2)
        self.h, self.g = (draw(m, r, seed=seed) if r else None for seed in (3, 4))
        self.b = draw(n, r, seed=5).div(r**0.5).to(adapter) if r else None
        self.a = draw(r, k, seed=6).div(r**0.5).to(adapter) if r else None
        self.bias = draw(n, dtype=dtype, seed=7) if bias else None
        self.dropout = Dropout(p, SEED if p else None)
        self.mask = (
            reference.dropout_mask(int(SEED.item()), m, k, p).to(DEVICE) if p else torch.ones(m, k, device=DEVICE)
        )

    def y(self, config=None, scaling=SCALING):
        return fused.linear(self.x, self.weight, self.h, self.b, scaling, self.bias, config)

    def dx(self, config=None):
        return fused.linear_t(self.dy, self.weight, self.g, self.a, self.dropout, config)

    def expected_y(self, dtype):
        w = self.weight.dequantize(torch.float32).to(dtype)
        y = self.x.to(dtype) @ w.t()
        if self.h is not None:
            wide = torch.float64 if dtype == torch.float64 else self.b.dtype
            y = y + (self.h.to(wide) @ self.b.to(wide).t() * SCALING).to(dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def expected_dx(self, dtype):
        dx = self.dy.to(dtype) @ self.weight.dequantize(torch.float32).to(dtype)
        if self.g is not None:
            wide = torch.float64 if dtype == torch.float64 else self.a.dtype
            dx = dx + (self.mask.to(wide) * (self.g.to(wide) @ self.a.to(wide))).to(dtype)
        return dx

    def check(self, config=None):
        y, dx = self.y(config), self.dx(config)
        assert (y.dtype, dx.dtype) == (self.dtype, self.dtype)
        assert_as_accurate(y, self.expected_y(self.dtype), self.expected_y(torch.float64), f"y, {config}")
        assert_as_accurate(dx, self.expected_dx(self.dtype), self.expected_dx(torch.float64), f"dx, {config}")


@pytest.mark.parametrize("config", [FEW, MANY, FEW._replace(splits=2), MANY._replace(tma=True)])
@pytest.mark.parametrize("r", [0, 5, 40])
def test_both_directions_follow_the_oracle(config, r):
    Case(37, 72, 192, r, bias=True, p=0.25 if r == 5 else 0.0).check(config)


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
@pytest.mark.parametrize("config", [FEW._replace(splits=2), MANY])
def test_sixteen_bit_types(dtype, adapter, config):
    Case(20, 40, 128, 5, dtype=dtype, adapter=adapter, bias=True, p=0.25).check(config)


def test_large_ranks_come_in_parts():
    Case(20, 40, 64, 130, p=0.25).check(FEW)


def test_the_default_config():
    Case(3, 130, 160, 16, blocksize=32, bias=True).check()


@pytest.mark.parametrize(("blocksize", "nested"), [(32, True), (64, False), (64, True), (128, True), (256, False)])
@pytest.mark.parametrize("config", [FEW, MANY._replace(block_k=128, tma=True)])
def test_the_weight_is_bit_for_bit_the_expanded_one(config, blocksize, nested):
    """Products with the identity matrix: the weight that the loop looks up, scales and rounds comes out as it is."""
    n, k = 40, 256 + blocksize % 128  # 288, 320, 256, 256
    weight = quantized(n, k, blocksize, nested)
    exact = weight.dequantize(torch.float16)
    rows, columns = (torch.eye(size, dtype=torch.float16, device=DEVICE) for size in (n, k))
    some = slice(k - 32, k)  # including the end of a row
    assert torch.equal(fused.linear(columns[some], weight, config=config), exact.t()[some])
    assert torch.equal(fused.linear_t(rows, weight, config=config), exact)


def test_splits_and_tensor_maps_change_nothing_but_the_order_of_sums():
    case = Case(10, 32, 192, 5, bias=True, p=0.25)
    assert torch.equal(case.y(FEW), case.y(FEW._replace(tma=True)))
    assert torch.equal(case.dx(FEW), case.dx(FEW._replace(tma=True)))
    for splits in (2, 7):  # the second is more than there are steps
        case.check(FEW._replace(splits=splits))
    assert torch.equal(case.y(FEW._replace(splits=3)), case.y(FEW._replace(splits=3)))


def test_strided_operands_and_words_at_odd_addresses():
    case = Case(20, 40, 128, 5, bias=True, p=0.25)
    y, dx = case.y(FEW), case.dx(FEW)

    def strided(t):
        return torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=DEVICE)[..., ::2].copy_(
            t
        )

    def by_columns(t):
        return t.t().contiguous().t()

    case.x, case.dy, case.h, case.g = (by_columns(t) for t in (case.x, case.dy, case.h, case.g))
    case.b, case.a, case.bias = by_columns(case.b), strided(case.a), strided(case.bias)
    assert torch.equal(case.y(FEW), y)
    assert torch.equal(case.dx(FEW), dx)
    padded = torch.full((20, 136), float("nan"), dtype=torch.float16, device=DEVICE)
    case.x = padded[:, 3:131].copy_(case.x)  # no tensor map can begin there
    assert torch.equal(case.y(FEW._replace(tma=True)), y)
    odd = torch.empty(case.weight.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].copy_(case.weight.codes)
    case.weight = dataclasses.replace(case.weight, codes=odd)
    assert torch.equal(case.y(FEW), y)
    assert torch.equal(case.dx(FEW), dx)


def test_no_tokens():
    case = Case(0, 40, 64, 5)
    assert case.y().shape == (0, 40)
    assert case.dx().shape == (0, 64)


def test_an_adapter_of_rank_zero_is_none():
    case = Case(5, 40, 64, 0)
    empty = fused.linear(case.x, case.weight, case.x.new_empty(5, 0).float(), case.x.new_empty(40, 0))
    assert torch.equal(empty, case.y())


def test_the_tolerance_catches_a_lost_tile_a_wrong_scale_and_a_wrong_scaling():
    case = Case(20, 40, 192, 5, nested=False)
    baseline, oracle = case.expected_y(torch.float16), case.expected_y(torch.float64)
    assert_as_accurate(case.y(FEW), baseline, oracle)
    wrong = [case.y(FEW, scaling=SCALING * 1.01)]
    x = case.x
    case.x = torch.cat((x[:, :128], torch.zeros_like(x[:, 128:])), 1)
    wrong.append(case.y(FEW))
    case.x = x
    case.weight.absmax[-1] *= 1.05
    wrong.append(case.y(FEW))
    for y in wrong:
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(y, baseline, oracle)


def test_what_cannot_be_done_is_named():
    case = Case(4, 40, 64, 5)
    crossing = quantized(40, 96)  # its blocks go on in the next row
    assert fused.supports(torch.bfloat16, 4096, 14336, 64, 256) == ""
    assert "fp16" in fused.supports(torch.float32, 64, 64, 64, 0)
    assert "96" in fused.supports(torch.bfloat16, 96, 64, 64, 0)
    assert "257" in fused.supports(torch.bfloat16, 64, 64, 64, 257)
    for x, weight, h, b, message in (
        (case.x.float(), case.weight, None, None, "bf16 or fp16"),
        (draw(4, 96, dtype=torch.float16), crossing, None, None, "blocksize 64"),
        (case.x[:, :32], case.weight, None, None, r"expected \[M, 64\] for a weight of \[40, 64\]"),
        (case.x.repeat(1, 2), case.weight, None, None, r"expected \[M, 64\]"),
        (case.x[0], case.weight, None, None, r"expected \[M, 64\]"),
        (case.x, case.weight, case.h, None, "together"),
        (case.x, case.weight, case.h, case.b[:39], "do not give"),
        (case.x, case.weight, case.h[:3], case.b, "do not give"),
        (case.x, case.weight, case.h.half(), case.b, "fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            fused.linear(x, weight, h, b, SCALING)
    for shape in ((39,), (1,), (1, 40)):  # a short one would be read past its end
        with pytest.raises(ValueError, match=r"bias has shape .*, expected \[40\]"):
            fused.linear(case.x, case.weight, case.h, case.b, SCALING, case.x.new_zeros(shape))
    with pytest.raises(ValueError, match=r"the weight is on .*, expected meta"):
        fused.linear(case.x.to("meta"), case.weight)
    with pytest.raises(ValueError, match=r"expected \[M, 40\] for a weight of \[40, 64\]"):
        fused.linear_t(case.x, case.weight)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("op", ["linear", "linear_t"])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 4096])
def test_candidates_fit_the_device(arch, op, m):
    found = fused.candidates(op, m, 4096, 4096, (arch // 10, arch % 10))
    assert found[0] == fused.default_config(op, m, 4096, 4096, (arch // 10, arch % 10))
    assert len(found) == len(set(found)) > 4
    for config in found:
        assert fused_config.shared_bytes(config) <= SHARED_LIMIT[arch] * 1024
        assert fused_config.accumulators(config) <= 128
        assert not config.tma or arch >= 90


def test_a_sum_is_split_until_the_chip_is_full():
    config = fused.default_config("linear", 16, 4096, 4096, (9, 0))
    few_tiles = fused_config.split_sum(32, 64, config, 132)
    assert 4 * 132 // 2 <= 32 * few_tiles <= 8 * 132
    assert fused_config.split_sum(10_000, 64, config, 132) == 1
    assert fused_config.split_sum(1, 5, config, 132) <= 5


_COUNT = """
from bench.machine_code import specimens, static
for specimen in specimens.fused_specimens():
    for arch in (80, 90):
        if arch in specimen.archs and specimen.main_loop:
            loop = static.main_loop(static.compiled(specimen, arch, specimen.constants).asm["cubin"])
            threads = 32 * specimen.warps
            lookups = sum(name.startswith("SHFL") for name in loop) * threads / specimen.weights
            wgmma = any(name.startswith("HGMMA") for name in loop)
            expected = arch == 90 and specimen.constants["BLOCK_M"] >= 64
            print(specimen.name, arch, lookups, len(loop) * threads / specimen.weights, wgmma == expected)
"""


@pytest.mark.slow
def test_the_loop_expands_each_weight_once():
    """One lookup a weight; two or four if Triton propagated an operand's layout back through the expansion."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", _COUNT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 10
    for name, arch, lookups, instructions, right_product in lines:
        assert float(lookups) == 1, f"{name} on sm_{arch}: {lookups} lookups a weight"
        limit = 6 if "_m16" in name else 8.5  # with 64 tokens a weight, up to one instruction more is mma.sync itself
        assert float(instructions) <= limit, f"{name} on sm_{arch}: {instructions} instructions a weight"
        assert right_product == "True", f"{name} on sm_{arch}: wgmma where it should not be, or none where it should"
