"""What the tests of the Triton kernels share: where they run, and what they draw."""

import pytest
import torch
import triton

from tests.support.numerics import largest, rms

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# For `pytestmark`: the kernels can run here, and `torch.empty` gives NaN.
KERNELS = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="neither interpreter nor CUDA device"),
    pytest.mark.usefixtures("poison"),
]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


SEED = torch.tensor([2**61 + 12345], device=DEVICE)

# Activation and adapter dtypes, and the largest relative rms error of sums whose operands were not rounded.
MODES = [
    (torch.float32, torch.float32, 1e-6),
    (torch.float16, torch.float32, 1e-6),
    (torch.bfloat16, torch.float32, 1e-6),  # the split mode, whose products are exact
    (torch.float16, torch.float16, 1e-3),  # h and g are rounded to fp16
    (torch.bfloat16, torch.bfloat16, 8e-3),  # or to bf16, which is eight times coarser
]


def assert_close(ours, oracle, limit):
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    assert rms(ours.double() - oracle) <= limit * rms(oracle)
    assert largest(ours.double() - oracle) <= 5 * limit * largest(oracle)
