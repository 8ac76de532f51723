"""How the error of a sum grows with its length in the Triton kernels, interpreted: see `long_sums`.

The interpreter sums a tile as numpy does and the tiles in order, as the kernels' accumulators do. It is slow, so the
sums here are only a little longer than what one program may add up. The plan says how much that is, for any length.
"""

import pytest
import torch

from fastlora.ops import nf4

triton = pytest.importorskip("triton")
from fastlora.kernels import decode, dora, fused, lora_plan  # noqa: E402
from fastlora.kernels import lora as kernel  # noqa: E402
from fastlora.kernels.fused_config import Config  # noqa: E402
from fastlora.kernels.segments import by_offsets  # noqa: E402

from tests.support.kernel_cases import DEVICE, KERNELS  # noqa: E402
from tests.support.long_sums import check, drawn, other  # noqa: E402

pytestmark = KERNELS
BF16 = torch.bfloat16
LENGTHS = [1_024, 20_000]
CUT = Config(block_m=16, block_n=32, block_k=128, splits=1, warps=4, stages=3, tma=False)


@pytest.fixture
def one_program(monkeypatch):
    """A device that a single program fills."""
    monkeypatch.setattr(lora_plan, "programs_wanted", lambda index: 1)
    lora_plan.plan.cache_clear()
    yield
    lora_plan.plan.cache_clear()


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("n", LENGTHS)
def test_low_rank_products(n):
    none, kind = kernel.Dropout(), "positive"
    x, a = drawn(kind, 4, n, dtype=BF16).to(DEVICE), other(kind, 4, n).to(DEVICE)
    at = a.t().contiguous()
    check(kind, n, kernel.shrink(x, a, none), x, a)
    check(kind, n, kernel.dy_pass(x, at, at, 1.0, True, False)[0], x, a)
    check(kind, n, kernel.x_pass(x.t(), at, none, torch.float32), a, x)
    check(kind, n, kernel.dy_pass(x.t(), a[:, :4], at, 1.0, False, True)[1], x, a)


@pytest.mark.parametrize("wanted", [1, 264])
@pytest.mark.parametrize("m", [200_000, 3_000, 1])
@pytest.mark.parametrize("length", [200_000, 4_096])
def test_no_program_adds_up_more_than_the_longest_sum(m, length, wanted, monkeypatch):
    monkeypatch.setattr(lora_plan, "programs_wanted", lambda index: wanted)
    lora_plan.plan.cache_clear()
    for op, total in (("shrink", length), ("dy", m), ("x", m)):
        launch = lora_plan.plan(op, m, length, 16, "split", False, torch.device("cpu"))
        assert launch.per_split <= lora_plan.LONGEST_SUM
        assert launch.splits * launch.per_split >= total > (launch.splits - 1) * launch.per_split
    shares = lora_plan.plan("x", m, length, 16, "split", False, torch.device("cpu"), None, 8).splits // 8
    assert -(-m // shares) <= lora_plan.LONGEST_SUM
    lora_plan.plan.cache_clear()


@pytest.mark.usefixtures("one_program")
def test_rows_that_all_have_one_of_several_adapters():
    n, kind = LENGTHS[-1], "positive"
    segments = by_offsets(torch.tensor([0, n, n], dtype=torch.int32, device=DEVICE), n)
    x, at = drawn(kind, 4, n, dtype=BF16).to(DEVICE), other(kind, 4, n).t().contiguous().to(DEVICE)
    da = kernel.x_pass(x.t(), at, kernel.Dropout(), torch.float32, segments=segments, column=-1)
    check(kind, n, da[1], at.t(), x)


@pytest.mark.parametrize("n", LENGTHS)
def test_base_products(n):
    n = n // 64 * 64
    x = drawn("drift", 4, n, dtype=BF16).to(DEVICE)
    weight = nf4.quantize(other("drift", 8, n), 64, double_quant=False).to(DEVICE)
    values = weight.dequantize(BF16)
    check("drift", n, fused.linear(x, weight, config=CUT), x, values)
    for tokens in (1, 2, 4):
        check("drift", n, decode.decode(x[:tokens], weight), x[:tokens], values)


@pytest.mark.parametrize("n", LENGTHS)
def test_dora(n):
    """Norms of rows sum squares over K, the factor's and the bias's gradients over M."""
    one, kind = torch.ones(1, n, device=DEVICE), "positive"
    x, z = drawn(kind, 4, n, dtype=BF16).to(DEVICE), other(kind, 4, n, dtype=BF16).to(DEVICE)
    _, dot, total = dora.rescale_backward(x.t().contiguous(), z.t().contiguous(), None, True, BF16)
    check(kind, n, total[None], one, x)
    check(kind, n, dot[None], one, x.double() * z.double())
    norms, no_update = torch.empty(4, device=DEVICE), (torch.zeros(1, n), torch.zeros(4, 1))
    dora.row_norms(torch.ones(1, dtype=torch.int32), x, *no_update, 1.0, norms)
    check(kind, n, norms[None], one, x.double().square() / x.double().norm(dim=1, keepdim=True))
