"""What the tests of the Triton kernels share: where they run, and what they draw."""

import pytest
import torch
import triton

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
