"""The one tolerance rule: against the fp64 oracle, never much worse than torch in the dtype under test.

rms(ours - oracle) <= 1.1 * rms(baseline - oracle) + 1e-6 * rms(oracle)
max|ours - oracle| <= 2   * max|baseline - oracle| + 1e-6 * max|oracle|
"""

import torch
from torch import Tensor

RMS_FACTOR, MAX_FACTOR, FLOOR = 1.1, 2.0, 1e-6


def rms(t: Tensor) -> float:
    """Root mean square, in fp64; 0 for an empty tensor."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def largest(t: Tensor) -> float:
    """Largest magnitude; 0 for an empty tensor."""
    return t.double().abs().max().item() if t.numel() else 0.0


def assert_as_accurate(ours: Tensor, baseline: Tensor, oracle: Tensor, what: str = "") -> None:
    """Raise AssertionError where `ours` is further from the fp64 `oracle` than the rule allows."""
    assert ours.shape == oracle.shape, f"{what}: shape {list(ours.shape)}, expected {list(oracle.shape)}"
    assert oracle.dtype == torch.float64, f"{what}: the oracle must be computed in fp64"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error, allowed = ours.double() - oracle, baseline.double() - oracle
    rms_limit = RMS_FACTOR * rms(allowed) + FLOOR * rms(oracle)
    max_limit = MAX_FACTOR * largest(allowed) + FLOOR * largest(oracle)
    assert rms(error) <= rms_limit, f"{what}: rms error {rms(error):.3e} above {rms_limit:.3e}"
    assert largest(error) <= max_limit, f"{what}: largest error {largest(error):.3e} above {max_limit:.3e}"
