"""The low-rank products and the mask of dropout in the compiled CPU library, on every instruction set here."""

import pytest
import torch
from torch import Tensor

from fastlora import reference
from fastlora.native import cpu, lora
from tests.support.numerics import rms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0x123456789ABCDEF0]
# Sums of fp32 products, in short runs: below a hundredth of what one bf16 rounding would cost.
RMS_LIMIT = 1e-6

loaded = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def inside_nan(t: Tensor) -> Tensor:
    """The same values, amid NaN on every side."""
    around = torch.full((t.shape[0] + 2, t.shape[1] + 6), torch.nan, dtype=t.dtype)
    inner = around[1:-1, 3:-3]
    inner.copy_(t)
    return inner


def shrink(x: Tensor, lora_a: Tensor, *options: float | None) -> Tensor:
    M, R = x.shape[0], lora_a.shape[0]
    flat = torch.full((M * R + 8,), torch.nan)
    lora.lora_shrink(x, lora_a, flat[4:-4].view(M, R), *options)  # type: ignore[arg-type]
    assert flat[:4].isnan().all()
    assert flat[-4:].isnan().all()
    return flat[4:-4].view(M, R)


def outer(x: Tensor, g: Tensor, *options: float | None) -> Tensor:
    out = inside_nan(torch.full((g.shape[1], x.shape[1]), torch.nan))
    lora.lora_outer(x, g, out, *options)  # type: ignore[arg-type]
    around = out._base
    assert around is not None
    assert all(side.isnan().all() for side in (around[0], around[-1], around[:, :3], around[:, -3:]))
    return out


def assert_close(ours: Tensor, oracle: Tensor, what: object) -> None:
    assert torch.isfinite(ours).all(), what
    assert rms(ours - oracle) <= RMS_LIMIT * rms(oracle), what


# M, K, R: one of each, every tail of tile, vector, strip and job, several jobs in each direction.
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (1, 1040, 16),
    (3, 127, 2),
    (7, 130, 17),
    (70, 1031, 9),
    (33, 2064, 66),
    (130, 288, 130),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, SEEDS[-1]], ids=["plain", "dropout"])
def test_products_are_fp32_sums(isa: str, dtype: torch.dtype, seed: int | None) -> None:
    for M, K, R in SHAPES:
        x, lora_a, g = inside_nan(normal(M, K, dtype=dtype)), normal(R, K), normal(M, R)
        seen = x.double() if seed is None else x.double() * reference.dropout_mask(seed, M, K, 0.3).double()
        assert_close(shrink(x, lora_a, 0.7, seed, 0.3), 0.7 * seen @ lora_a.double().t(), (M, K, R))
        assert_close(outer(x, g, 0.7, seed, 0.3), 0.7 * g.double().t() @ seen, (M, K, R))


def test_long_sums(isa: str) -> None:
    x, lora_a, g = normal(5, 14336, dtype=torch.bfloat16), normal(4, 14336), normal(2100, 3)
    assert_close(shrink(x, lora_a), x.double() @ lora_a.double().t(), "K")
    tall = normal(2100, 40, dtype=torch.bfloat16)
    assert_close(outer(tall, g), g.double().t() @ tall.double(), "M")


def test_the_largest_rank(isa: str) -> None:
    x, lora_a, g = normal(9, 200, dtype=torch.bfloat16), normal(512, 200), normal(9, 512)
    assert_close(shrink(x, lora_a), x.double() @ lora_a.double().t(), "shrink")
    assert_close(outer(x, g), g.double().t() @ x.double(), "outer")


def test_strides(isa: str) -> None:
    """Any rows of x, any A, any place for the result of the outer product: the same bits as contiguous ones."""
    M, K, R = 12, 144, 6
    wide = normal(2 * M, K + 5, dtype=torch.bfloat16)
    lora_a, g = normal(R, K), normal(M, R)
    every_a = [lora_a, lora_a.t().contiguous().t(), inside_nan(lora_a), torch.stack([lora_a, lora_a], 2)[:, :, 0]]
    for x in (wide[:M, :K], wide[::2, 5:], wide[3:4, :K].expand(M, K)):
        h, d = shrink(x.contiguous(), lora_a), outer(x.contiguous(), g)
        for a in every_a:
            assert torch.equal(shrink(x, a), h), (x.stride(), a.stride())
        for out in (
            torch.empty(R, K),
            torch.empty(K, R).t(),
            torch.empty(K, 2 * R).t()[::2],
            torch.empty(R, K, 2)[..., 0],
        ):
            lora.lora_outer(x, g, out.fill_(torch.nan))
            assert torch.equal(out, d), (x.stride(), out.stride())
    column = normal(M, 4, dtype=torch.float16)[:, 1:2]
    assert torch.equal(shrink(column, torch.ones(1, 1)), column.float())
    assert torch.equal(outer(column, torch.eye(M)), column.float())


def test_every_half_is_widened(isa: str) -> None:
    """A of one 1 passes x through: all fp16 and bf16 values, including subnormals and infinities."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[:, None]
        h = shrink(x, torch.ones(1, 1))
        assert torch.equal(h.isnan(), x.isnan())
        assert torch.equal(h.nan_to_num(0.5), x.float().nan_to_num(0.5))
        d = outer(x.t(), torch.ones(1, 1))
        assert torch.equal(d.isnan(), x.t().isnan())
        assert torch.equal(d.nan_to_num(0.5), x.t().float().nan_to_num(0.5))


@pytest.mark.parametrize("p", [0.0, 2**-17, 2**-16, 0.1, 0.5, 0.75, 1 - 2**-16])
def test_masks_are_the_references(isa: str, p: float) -> None:
    for seed in SEEDS:
        # Whole groups and cut ones, rows shorter and longer than a vector of groups, more than one job.
        for rows, cols in [(1, 1), (3, 7), (5, 8), (9, 30), (2, 1000), (40, 129)]:
            expected = reference.dropout_mask(seed, rows, cols, p)
            for dtype in DTYPES:
                out = torch.full((rows, cols), torch.nan, dtype=dtype)
                lora.dropout_mask(seed, p, out)
                assert torch.equal(out, expected.to(dtype)), (seed, rows, cols, dtype)


def test_masks_of_several_jobs(isa: str) -> None:
    for rows, cols in [(3, 20003), (300, 256), (700, 61)]:
        out = torch.full((rows, cols), torch.nan)
        lora.dropout_mask(5, 0.2, out)
        assert torch.equal(out, reference.dropout_mask(5, rows, cols, 0.2))


def test_products_derive_the_same_mask(isa: str) -> None:
    """Products with an identity show the mask itself, to the bit."""
    for seed in SEEDS:
        for rows, cols in [(5, 40), (70, 300), (11, 131)]:
            mask = reference.dropout_mask(seed, rows, cols, 0.3)
            ones = torch.ones(rows, cols, dtype=torch.bfloat16)
            assert torch.equal(shrink(ones, torch.eye(cols), 1.0, seed, 0.3), mask), (seed, rows, cols)
            assert torch.equal(outer(ones, torch.eye(rows), 1.0, seed, 0.3), mask), (seed, rows, cols)


def test_without_a_seed_nothing_is_dropped(isa: str) -> None:
    x, lora_a, g = normal(4, 64), normal(2, 64), normal(4, 2)
    assert torch.equal(shrink(x, lora_a, 2.0, None, 0.5), shrink(x, lora_a, 2.0))
    assert torch.equal(shrink(x, lora_a, 2.0, 7, 0.0), shrink(x, lora_a, 2.0))
    assert torch.equal(outer(x, g, 2.0, None, 0.5), outer(x, g, 2.0))
    assert torch.equal(outer(x, g, 2.0, 7, 0.0), outer(x, g, 2.0))


def test_threads_do_not_change_the_bits(isa: str) -> None:
    """Neither does the way the result was cut into jobs for them."""
    x, lora_a, g = normal(203, 1200, dtype=torch.bfloat16), normal(70, 1200), normal(203, 70)

    def everything() -> list[Tensor]:
        mask = torch.empty(x.shape)
        lora.dropout_mask(3, 0.1, mask)
        return [
            shrink(x, lora_a, 1.5, 3, 0.1),
            shrink(x[:5], lora_a),
            outer(x, g, 1.5, 3, 0.1),
            outer(x[:5], g[:5]),
            mask,
        ]

    alone = everything()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for one, other in zip(alone, everything(), strict=True))
    # A single row is summed as it is among others.
    assert torch.equal(shrink(x[:1], lora_a[:1]), shrink(x[:5], lora_a)[:1, :1])


@loaded
def test_empty() -> None:
    for dtype in DTYPES:
        assert shrink(torch.empty(0, 8, dtype=dtype), torch.ones(2, 8)).shape == (0, 2)
        assert torch.equal(shrink(torch.empty(3, 0, dtype=dtype), torch.ones(2, 0)), torch.zeros(3, 2))
        assert torch.equal(outer(torch.empty(0, 8, dtype=dtype), torch.ones(0, 2), 1.0, 4, 0.5), torch.zeros(2, 8))
        assert outer(torch.empty(3, 0, dtype=dtype), torch.ones(3, 2)).shape == (2, 0)
    for shape in [(0, 0), (0, 5), (5, 0)]:
        lora.dropout_mask(1, 0.5, torch.empty(shape))


M, K, R = 3, 20, 2
BAD_X = {
    "x is torch.float64": torch.ones(M, K, dtype=torch.float64),
    "x has shape": torch.ones(M * K),
    "x is on meta": torch.ones(M, K, device="meta"),
    r"x has strides \[1, 3\], but its columns must be adjacent": torch.ones(K, M).t(),
}


@loaded
@pytest.mark.parametrize("message", BAD_X)
def test_bad_activations_are_refused(message: str) -> None:
    h, d = torch.zeros(M, R), torch.zeros(R, K)
    with pytest.raises(ValueError, match=message):
        lora.lora_shrink(BAD_X[message], torch.ones(R, K), h)
    with pytest.raises(ValueError, match=message):
        lora.lora_outer(BAD_X[message], torch.ones(M, R), d)
    assert not h.any()
    assert not d.any()


@loaded
def test_bad_operands_are_refused() -> None:
    x, a, g, h, d = torch.ones(M, K), torch.ones(R, K), torch.ones(M, R), torch.zeros(M, R), torch.zeros(R, K)
    bad_shrinks: list[tuple[str, Tensor, Tensor]] = [
        ("lora_a is torch.bfloat16, expected torch.float32", a.bfloat16(), h),
        ("lora_a has shape", a[0], h),
        (r"lora_a \[2, 19\] and out \[3, 2\] do not fit x of \[3, 20\]", a[:, 1:], h),
        ("R at least 1", a[:0], h[:, :0]),
        ("do not fit", a, torch.zeros(M + 1, R)),
        ("out is torch.float16", a, h.half()),
        ("out is not contiguous", a, torch.zeros(R, M).t()),
    ]
    for message, lora_a, out in bad_shrinks:
        with pytest.raises(ValueError, match=message):
            lora.lora_shrink(x, lora_a, out)
    bad_outers: list[tuple[str, Tensor, Tensor]] = [
        ("g is torch.bfloat16", g.bfloat16(), d),
        ("g is not contiguous", torch.ones(R, M).t(), d),
        (r"g \[2, 2\] and out \[2, 20\] do not fit x of \[3, 20\]", g[1:], d),
        ("R at least 1", g[:, :0].contiguous(), d[:0]),
        ("do not fit", g, d.t()),
        ("out is torch.bfloat16", g, d.bfloat16()),
        ("elements overlap", g, torch.zeros(1, K).expand(R, K)),
        ("elements overlap", g, torch.zeros(R, 1).expand(R, K)),
        ("elements overlap", g, torch.zeros(R + K).as_strided((R, K), (1, 1))),
    ]
    for message, factor, out in bad_outers:
        with pytest.raises(ValueError, match=message):
            lora.lora_outer(x, factor, out)
    assert not h.any()
    assert not d.any()


@loaded
@pytest.mark.parametrize(
    ("message", "seed", "p"),
    [
        ("seed is 18446744073709551616, expected 64 bits", 2**64, 0.5),
        ("seed is -9223372036854775809", -(2**63) - 1, 0.5),
        ("p is 1.0, expected at least 0", 1, 1.0),
        ("p is 0.999995", 1, 0.999995),
        ("p is -0.1", 1, -0.1),
        ("p is nan", 1, float("nan")),
    ],
)
def test_bad_dropout_is_refused(message: str, seed: int, p: float) -> None:
    h, d, mask = torch.zeros(M, R), torch.zeros(R, K), torch.zeros(M, K)
    with pytest.raises(ValueError, match=message):
        lora.lora_shrink(torch.ones(M, K), torch.ones(R, K), h, 1.0, seed, p)
    with pytest.raises(ValueError, match=message):
        lora.lora_outer(torch.ones(M, K), torch.ones(M, R), d, 1.0, seed, p)
    with pytest.raises(ValueError, match=message):
        lora.dropout_mask(seed, p, mask)
    assert not any(t.any() for t in (h, d, mask))


@loaded
def test_bad_masks_are_refused() -> None:
    for message, out in [
        ("out is torch.uint8", torch.zeros(M, K, dtype=torch.uint8)),
        ("out has shape", torch.zeros(K)),
        ("out is not contiguous", torch.zeros(K, M).t()),
    ]:
        with pytest.raises(ValueError, match=message):
            lora.dropout_mask(1, 0.5, out)
        assert not out.any()
