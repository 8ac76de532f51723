"""A batch whose samples have different adapters, on a GPU: the kernels against separate products of the samples."""

import pytest
import torch

from fastlora.ops import mixed, nf4
from fastlora.ops.mixed import mixed_linear
from fastlora.ops.operands import Lora
from tests.support.numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
K, N = 512, 768
NAMES = ["one", "two", "none", "one", "one", "two"]


def run(device, dtype, adapter_dtype, tokens, base, p):
    """y and the gradients, with the same by torch in fp64 and in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "x": torch.randn(len(NAMES), tokens, K, generator=generator),
        "a1": torch.randn(16, K, generator=generator) / K**0.5,
        "b1": torch.randn(N, 16, generator=generator) / 16,
        "a2": torch.randn(40, K, generator=generator) / K**0.5,
        "b2": torch.randn(N, 40, generator=generator) / 20,
    }
    weight = nf4.quantize(torch.randn(N, K, generator=generator) / K**0.5)
    values = weight.dequantize(torch.float32)  # some kernels round an NF4 weight, others do not: the oracle does not
    values = values if base == "nf4" else values.to(dtype)
    dy = torch.randn(len(NAMES), tokens, N, generator=generator).to(dtype).to(device)
    drawn = {name: value.to(dtype if name == "x" else adapter_dtype).to(device) for name, value in drawn.items()}

    def compute(wide, ours):
        given = {
            name: value.detach().to(wide or value.dtype, copy=True).requires_grad_() for name, value in drawn.items()
        }
        adapters = {
            name: Lora(given[f"a{serial}"], given[f"b{serial}"], scaling, p)
            for name, serial, scaling in (("one", 1, 2.0), ("two", 2, 0.75))
        }
        if ours:
            y = mixed_linear(
                given["x"], weight.to(device) if base == "nf4" else values.to(device), None, adapters, NAMES
            )
        else:
            w = values.to(device, given["x"].dtype)
            y = torch.stack([each @ w.t() for each in given["x"]])
            own = [
                adapters[name].scaling * (each.to(adapters[name].a.dtype) @ adapters[name].a.t())
                @ adapters[name].b.t() if name in adapters else torch.zeros_like(y[0])
                for each, name in zip(given["x"], NAMES, strict=True)
            ]  # fmt: skip
            y = (y + torch.stack([each.to(torch.promote_types(each.dtype, y.dtype)) for each in own])).to(
                given["x"].dtype
            )
        y.backward(dy.to(y.dtype))
        return {"y": y.detach(), **{name: value.grad for name, value in given.items()}}

    return compute(None, True), compute(None, False), compute(torch.float64, False)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_mixed_batches_by_kernels(base, tokens, adapter_dtype, monkeypatch):
    monkeypatch.setitem(mixed.SIDE_BY_SIDE_UP_TO, "cuda", 0)
    ours, baseline, oracle = run("cuda", torch.bfloat16, adapter_dtype, tokens, base, 0.0)
    for name, value in ours.items():
        assert_as_accurate(value, baseline[name], oracle[name], name)


def test_dropout_is_drawn_anew_and_kept_for_backward():
    first, _, plain = run("cuda", torch.bfloat16, torch.float32, 64, "dense", 0.25)
    again, *_ = run("cuda", torch.bfloat16, torch.float32, 64, "dense", 0.25)
    assert torch.equal(first["y"][2], again["y"][2]), "rows without an adapter drop nothing"
    assert not torch.equal(first["y"][0], again["y"][0])
    share = (first["a1"].double() * plain["a1"]).sum() / plain["a1"].square().sum()
    assert 0.8 < share < 1.2, f"dA is {share:.2f} of what it is without dropout"
