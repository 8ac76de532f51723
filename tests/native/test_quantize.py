"""NF4 quantization in the compiled CPU library: the bits of the code in torch, itself tested against bitsandbytes."""

import pytest
import torch
from fastlora.kernels.operands import LEVELS
from torch import Tensor

from fastlora.native import cpu, quantize
from fastlora.ops import nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

loaded = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
pytestmark = pytest.mark.usefixtures("one_thread")


def weight(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values of very different magnitudes, zeros, blocks of zeros, and of the levels' midpoints."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 3, (shape[0], 1), generator=generator)
    values[0] = 0
    levels = torch.tensor(LEVELS)
    edges = torch.cat((torch.ones(1), (levels[1:] + levels[:-1]) / 2))[: shape[1]]
    values[-1, : edges.numel()] = edges
    return values.to(dtype)


def in_torch(w: Tensor, blocksize: int, monkeypatch: pytest.MonkeyPatch) -> nf4.NF4Weight:
    with monkeypatch.context() as patch:
        patch.setenv("FASTLORA_BACKEND", "torch")
        return nf4.quantize(w, blocksize)


def assert_same(ours: nf4.NF4Weight, expected: nf4.NF4Weight, what: object) -> None:
    for name, one, other in zip(nf4.NF4Weight.__dataclass_fields__, ours.tensors(), expected.tensors(), strict=False):
        assert one is not None, what
        assert other is not None, what
        assert torch.equal(one, other), (what, name)


# One value, odd sizes, less than a group and than a block, blocks across rows, several jobs.
SHAPES = [(1, 1), (1, 31), (3, 33), (5, 7), (33, 70), (64, 64), (300, 512), (129, 1031)]


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(isa: str, dtype: torch.dtype, blocksize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        w = weight(*shape, dtype=dtype)
        assert_same(nf4.quantize(w, blocksize), in_torch(w, blocksize, monkeypatch), shape)


def test_scales_that_are_all_equal(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(64, 256)
    assert_same(nf4.quantize(w), in_torch(w, 64, monkeypatch), "ones")


def test_scales_over_their_whole_range(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.zeros(512, 512)
    w[:, ::64] = torch.rand(512, 8, generator=torch.Generator().manual_seed(0)) ** 8
    assert_same(nf4.quantize(w), in_torch(w, 64, monkeypatch), "ramp")


def test_threads_do_not_change_the_bits(isa: str) -> None:
    w = weight(700, 1031, dtype=torch.bfloat16)
    alone = nf4.quantize(w)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert_same(nf4.quantize(w), alone, threads)


def test_what_is_not_finite_shows_in_its_scale(isa: str) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for where in (0, 63, 64, 126, 129):
            w = torch.ones(130)
            w[where] = value
            absmax = torch.zeros(3)
            quantize.nf4_quantize(w, 64, torch.empty(65, dtype=torch.uint8), absmax)
            assert torch.isfinite(absmax).tolist() == [block != where // 64 for block in range(3)], (value, where)


@loaded
@pytest.mark.parametrize("offset", [0.0, 3e38, torch.inf, -torch.inf, torch.nan])
def test_no_scale_leads_outside_the_table(offset: float) -> None:
    table = torch.full((quantize.TABLE_STEPS,), 3, dtype=torch.uint8)
    for value in (torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45):
        absmax = torch.ones(300)
        absmax[::7] = value
        levels = torch.full((300,), 9, dtype=torch.uint8)
        quantize.quantize_scales(absmax, offset, table, levels, torch.empty(2))
        assert levels.eq(3).logical_or(levels.eq(0)).all(), value  # 0: a block whose largest is 0


@loaded
def test_nothing_beyond_the_results_is_written() -> None:
    w = torch.randn(99)
    codes, absmax = torch.full((60,), 7, dtype=torch.uint8), torch.full((9,), torch.nan)
    quantize.nf4_quantize(w, 64, codes[5:55], absmax[3:5])
    assert codes[:5].eq(7).all()
    assert codes[55:].eq(7).all()
    assert absmax[:3].isnan().all()
    assert absmax[5:].isnan().all()
    quantize.nf4_quantize(w[:0], 64, codes[:0], absmax[:0])


@loaded
def test_bad_operands_are_refused() -> None:
    w, codes, absmax = torch.ones(4, 32), torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    bad: list[tuple[str, tuple]] = [
        ("blocksize must be one of .*; got 48", (w, 48, codes, absmax)),
        ("w is torch.float64", (w.double(), 64, codes, absmax)),
        ("w is not contiguous", (torch.ones(32, 4).t(), 64, codes, absmax)),
        ("w is on meta", (w.to("meta"), 64, codes, absmax)),
        ("codes has 63 elements, expected 64", (w, 64, codes[1:], absmax)),
        ("codes is torch.int8", (w, 64, codes.view(torch.int8), absmax)),
        ("absmax has 1 elements, expected 2", (w, 64, codes, absmax[1:])),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            quantize.nf4_quantize(*arguments)
    table, levels = torch.zeros(65536, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    for message, arguments in [
        ("table has 256 elements", (absmax, 0.0, table[:256], levels, torch.zeros(1))),
        ("levels has 1 elements", (absmax, 0.0, table, levels[1:], torch.zeros(1))),
        ("absmax2 has 2 elements", (absmax, 0.0, table, levels, torch.zeros(2))),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize.quantize_scales(*arguments)
    assert not any(t.any() for t in (codes, absmax, levels))
