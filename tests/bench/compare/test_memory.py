"""Peak memory: what a call holds and what it leaves behind."""

import pytest
import torch

from bench.compare import memory
from bench.compare.layers import BareProduct, Provider
from bench.compare.providers import find_providers
from bench.measure.operands import Problem
from tests.bench.support import CPU


def test_peak_memory_counts_what_a_call_holds():
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    m, k, n = 512, 1024, 2048
    floor, ours = find_providers(["torch", "fastlora-fp32"])
    problem = Problem("bf16_linear", k, n, 64, CPU)  # gradients of A and B well above what a reading is off
    with memory.CpuMemory() as server:
        bare = server.peak(floor, problem, m, ("forward", "both"))
        again = server.peak(floor, problem, m, ("forward", "both"))
        lora = server.peak(ours, problem, m, ("both",))
    outputs = 2 * m * n + 2 * m * k
    assert bare["forward"] == pytest.approx(2 * m * n, abs=5e5)
    assert bare["both"] == pytest.approx(outputs, abs=5e5)
    assert again["both"] == pytest.approx(bare["both"], abs=memory.resolution())
    assert lora["both"] >= outputs


def test_peak_memory_counts_scratch_kept_between_calls():
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    scratch: list[torch.Tensor] = []

    class Keeper(BareProduct):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scratch[:] = scratch or [torch.ones(3_000_000, dtype=torch.uint8)]
            return super().forward(x)

    keeper = Provider("keeper", lambda operands: [Keeper(operands.dense[0])], None)
    request = {"kernel": "bf16_linear", "K": 64, "N": 64, "R": 4, "M": 16, "dropout": 0.0, "modes": ["forward"]}
    assert memory._measure(keeper, request)["forward"] >= 3_000_000


def test_memory_that_cannot_be_measured_is_an_error():
    if reason := memory.unavailable(CPU):
        pytest.skip(reason)
    (floor,) = find_providers(["torch"])
    problem = Problem("bf16_linear", 64, -1, 4, CPU)
    with memory.CpuMemory() as server, pytest.raises(RuntimeError, match="measuring the memory of torch"):
        server.peak(floor, problem, 1, ("forward",))
