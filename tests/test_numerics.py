"""The tolerance can fail: each planted fault is refused."""

import pytest
import torch

from tests.support.numerics import assert_as_accurate

M, K, N, R = 64, 256, 128, 8


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).bfloat16()
    w = (torch.randn(N, K, generator=generator) * K**-0.5).bfloat16()
    a = torch.randn(R, K, generator=generator) * K**-0.5
    b = torch.randn(N, R, generator=generator) * R**-0.5
    oracle = x.double() @ w.double().t() + 2 * (x.double() @ a.double().t()) @ b.double().t()
    baseline = x @ w.t() + (2 * (x.float() @ a.t()) @ b.t()).bfloat16()

    def ours(scaling: float = 2.0, columns: int = K) -> torch.Tensor:
        return (x.float() @ w.float().t() + scaling * (x.float()[:, :columns] @ a[:, :columns].t()) @ b.t()).bfloat16()

    return ours, baseline, oracle


def test_an_honest_result_passes(case):
    ours, baseline, oracle = case
    assert_as_accurate(ours(), baseline, oracle)
    assert_as_accurate(baseline, baseline, oracle)


def test_scaling_off_by_a_hundredth_is_refused(case):
    ours, baseline, oracle = case
    with pytest.raises(AssertionError, match="rms error"):
        assert_as_accurate(ours(scaling=2.02), baseline, oracle)


def test_a_dropped_tile_is_refused(case):
    ours, baseline, oracle = case
    with pytest.raises(AssertionError, match="rms error"):
        assert_as_accurate(ours(columns=K - 32), baseline, oracle)


def test_one_zeroed_element_is_refused(case):
    ours, baseline, oracle = case
    result = ours()
    result[3, 5] = 0
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(result, baseline, oracle)


def test_nan_and_wrong_shapes_are_refused(case):
    ours, baseline, oracle = case
    result = ours()
    result[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate(result, baseline, oracle)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(ours()[:-1], baseline, oracle)
