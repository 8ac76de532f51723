"""Low-rank products of rows with adapters of their own, interpreted: each row against its adapter in fp64."""

import pytest
import torch

from fastlora import reference

triton = pytest.importorskip("triton")
from fastlora.kernels import lora as kernel  # noqa: E402
from fastlora.kernels import segments as by_segments  # noqa: E402
from fastlora.kernels.segments import Segments  # noqa: E402

from tests.support.kernel_cases import DEVICE, KERNELS, MODES, SEED, assert_close, draw  # noqa: E402

pytestmark = KERNELS

ADAPTERS = 3
OWNERS = [2, -1, 0, 2, 0]  # of the segments; the second adapter has no row
LENGTHS = [70, 3, 1, 0, 40]


def shared():
    """Samples with adapters of their own: two adapters twice, some rows with none, different factors and rates."""
    ends = torch.tensor(LENGTHS).cumsum(0).int().to(DEVICE)
    facts = torch.tensor([[3.0 / 0.75, 3.0, 1 / 0.75, 16384], [1.0, 1.0, 1.0, 0], [0.5, 0.5, 1.0, 0]]).to(DEVICE)
    order = torch.tensor([2, 4, 0, 3]).to(DEVICE)
    owner = torch.tensor(OWNERS, dtype=torch.int32).to(DEVICE)
    found = Segments(ends, ADAPTERS, owner, facts, order, (2, 0, 2))
    rows = torch.tensor(OWNERS).repeat_interleave(torch.tensor(LENGTHS))
    return found, rows, [3.0, 1.0, 0.5], [0.25, 0.0, 0.0]


def experts():
    """Experts of a mixture, the second without a row, and two rows that have no expert."""
    offsets = torch.tensor([70, 70, 112], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([0] * 70 + [2] * 42 + [-1] * 2)
    return by_segments.by_offsets(offsets, 114), rows, [1.0] * 3, [0.0] * 3


@pytest.mark.parametrize(("dtype", "adapter", "limit"), MODES)
@pytest.mark.parametrize(("k", "n", "r"), [(200, 130, 5), (72, 260, 70)])
@pytest.mark.parametrize("case", [shared, experts])
def test_low_rank_products_by_segments(dtype, adapter, limit, k, n, r, case):
    segments, owner, factors, rates = case()
    m = len(owner)
    x, dy = draw(m, k, dtype=dtype), draw(m, n, dtype=dtype, seed=1)
    a = draw(ADAPTERS, r, k, dtype=adapter, seed=2) / k**0.5
    b = (draw(n, r, ADAPTERS, dtype=adapter, seed=3) / r**0.5).permute(2, 0, 1)  # as peft packs experts
    dropout = kernel.Dropout.by_adapter(SEED) if max(rates) else kernel.Dropout()
    scaling = torch.tensor([*factors, 0.0], dtype=torch.float64)[owner].unsqueeze(1).to(DEVICE)
    masks = [reference.dropout_mask(int(SEED.item()), m, k, p).double() if p else 1.0 for p in rates]
    mask = torch.ones(m, k, dtype=torch.float64)
    for which, each in enumerate(masks):
        mask = torch.where((owner == which).unsqueeze(1), each * torch.ones_like(mask), mask)
    kept = x.double() * mask.to(DEVICE)
    wide_a, wide_b = (torch.cat((each.double(), torch.zeros_like(each[:1]).double()))[owner] for each in (a, b))

    h_exact = scaling * torch.einsum("mk,mrk->mr", kept, wide_a)
    h = kernel.shrink(x, a, dropout, segments=segments)
    assert_close(h, h_exact, 1e-6)
    g_exact = scaling * torch.einsum("mn,mnr->mr", dy.double(), wide_b)
    g, db = kernel.dy_pass(dy, b, h, 1.0, True, True, segments=segments)
    assert_close(g, g_exact, 1e-6)
    assert torch.equal(kernel.dy_pass(dy, b, h, 1.0, False, True, segments=segments)[1], db)
    da = kernel.x_pass(x, g, dropout, adapter, segments=segments)
    assert da.shape == (ADAPTERS, r, k)
    assert db.shape == (ADAPTERS, n, r)
    for which in range(ADAPTERS):
        mine = (owner == which).to(DEVICE)
        if mine.any():
            assert_close(db[which], dy[mine].double().t() @ h_exact[mine], limit)
            assert_close(da[which], g_exact[mine].t() @ kept[mine], limit)
        else:
            assert not db[which].any()
            assert not da[which].any()
    forward = kernel.expand(h, b, 1.0, torch.float32, kernel.Dropout(), segments=segments)
    assert_close(forward, torch.einsum("mr,mnr->mn", h_exact, wide_b), max(limit, 1e-5))
    bias = draw(ADAPTERS + 1, n, seed=4)
    biased = kernel.expand(h, b, 1.0, torch.float32, kernel.Dropout(), bias, segments=segments)
    torch.testing.assert_close(biased, forward + bias[owner.to(DEVICE)])
    back = kernel.expand(g, a.mT, 1.0, torch.float32, dropout, segments=segments, column=by_segments.KEEP)
    assert_close(back, torch.einsum("mr,mrk->mk", g_exact, wide_a) * mask.to(DEVICE), max(limit, 1e-5))


def test_programs_find_their_rows_whatever_the_lengths():
    """Many segments, most of them empty: every row is found once."""
    lengths = torch.zeros(40, dtype=torch.int64)
    lengths[[0, 7, 8, 31, 39]] = torch.tensor([1, 129, 64, 63, 2])
    ends = lengths.cumsum(0).int().to(DEVICE)
    owner = torch.arange(40).repeat_interleave(lengths)
    x, a = draw(259, 16), draw(40, 4, 16, seed=1)
    h = kernel.shrink(x, a, kernel.Dropout(), segments=Segments(ends, 40))
    assert_close(h, torch.einsum("mk,mrk->mr", x.double(), a.double()[owner]), 1e-6)
    g, db = kernel.dy_pass(
        draw(259, 24, seed=2), draw(40, 24, 4, seed=3), h, 1.0, True, True, segments=Segments(ends, 40)
    )
    assert torch.isfinite(g).all()
    assert torch.equal(db.flatten(1).any(1).cpu(), lengths > 0)
