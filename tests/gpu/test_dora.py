"""DoRA on a GPU: as exact as torch in the same dtypes, and no sync with the device between calls."""

import pytest
import torch

from fastlora.ops import dora, nf4
from fastlora.peft_layers.kept_norms import KeptNorms
from tests.support.numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
K, N, R = 512, 768, 16


def drawn(adapter_dtype, tokens, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    weight = nf4.quantize(torch.randn(N, K, generator=generator) / K**0.5)
    shapes = {"x": (tokens, K), "a": (R, K), "b": (N, R), "m": (N,), "bias": (N,), "dy": (tokens, N)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["a"] /= K**0.5
    values["b"] /= 32  # an update a quarter as large as the output
    values["m"] = 1 + values["m"].abs()
    kinds = {"x": torch.bfloat16, "dy": torch.bfloat16, "bias": torch.bfloat16}
    return weight, {name: value.to(kinds.get(name, adapter_dtype)).to(device) for name, value in values.items()}


def gradients(y, given):
    y.backward(given["dy"].to(y.dtype))
    return {"y": y.detach(), **{name: value.grad for name, value in given.items() if value.grad is not None}}


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_dora(base, tokens, adapter_dtype):
    check(base, tokens, adapter_dtype, "cuda")


def check(base, tokens, adapter_dtype, device):
    """One case, on any device on which the Triton kernels run."""
    packed, values = drawn(adapter_dtype, tokens, device)
    exact = packed.dequantize(torch.float32).to(device)
    weight = packed.to(device) if base == "nf4" else exact.bfloat16()

    def leaves(dtype=None):
        return {
            name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_(name != "dy")
            for name, value in values.items()
        }

    def plain(given, w):
        adapters = given["a"].dtype
        w = w.to(given["x"].dtype)
        norms = (w.double() + 2.0 * given["b"].double() @ given["a"].double()).norm(dim=1).detach()
        factor = given["m"] / norms.to(adapters)
        h = given["x"].to(adapters) @ given["a"].t()
        base_part = given["x"] @ w.t()
        return (base_part + (factor - 1) * base_part + factor * (h @ given["b"].t()) * 2.0 + given["bias"]).to(w.dtype)

    given = leaves()
    norms = KeptNorms().of(weight, given["a"], given["b"], 2.0)
    y = dora.dora_linear(given["x"], weight, given["a"], given["b"], 2.0, given["m"], norms, given["bias"])
    ours = gradients(y, given)
    frozen = exact if base == "nf4" else weight
    given = leaves()
    baseline = gradients(plain(given, frozen), given)
    given = leaves(torch.float64)
    oracle = gradients(plain(given, frozen), given)
    for name, value in ours.items():
        assert_as_accurate(value, baseline[name], oracle[name], name)


def test_norms_that_stay_need_no_sync_with_the_device():
    packed, given = drawn(torch.float32, 4)
    weight, kept = packed.to("cuda"), KeptNorms()
    first = kept.of(weight, given["a"], given["b"], 1.0).clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = kept.of(weight, given["a"], given["b"], 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
    given["a"].data[3, 7] += 1
    assert not torch.equal(first, kept.of(weight, given["a"], given["b"], 1.0))


def test_captured_norms_follow_the_adapters():
    packed, given = drawn(torch.float32, 8)
    weight, kept = packed.to("cuda"), KeptNorms()
    operands = given["a"], given["b"], 1.0

    def step():
        return dora.dora_linear(given["x"], weight, *operands, given["m"], kept.of(weight, *operands))

    with torch.no_grad():
        for _ in range(2):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        for change in (0.0, 1.0):
            given["a"].add_(change)
            graph.replay()
            torch.testing.assert_close(y, step())
