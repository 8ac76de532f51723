"""Stacks of experts on a CUDA device: dense and packed stacks, and the few rows of decoding."""

import pytest
import torch

from fastlora.ops import grouped, nf4
from fastlora.ops.grouped import grouped_lora_linear
from tests.support.numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
EXPERTS, N, K, R = 8, 192, 256, 16


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("rows", [700, grouped.FEW_ROWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_as_exact_as_formed_weights(rows, packed, dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    drawn, dy = (draw(rows, K), draw(EXPERTS, R, K) / 16, draw(N, R, EXPERTS).permute(2, 0, 1) / 4), draw(rows, N)
    weight = nf4.quantize(draw(EXPERTS * N, K))
    values = weight.dequantize(dtype).view(EXPERTS, N, K)
    ends = torch.randint(0, rows, (EXPERTS - 1,), generator=generator, device="cuda").sort().values
    offsets = torch.cat([ends, ends.new_tensor([rows])]).to(torch.int32)

    def run(precision, compute):
        x, a, b = (tensor.to(precision).requires_grad_() for tensor in drawn)
        y = compute(x, a, b, values.to(precision))
        y.backward(dy.to(precision))
        return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}

    def formed(x, a, b, w):
        w = w + 0.5 * b @ a
        stretches = zip([0, *offsets.tolist()], offsets.tolist(), w, strict=False)
        return torch.cat([x[begin:end] @ expert.t() for begin, end, expert in stretches])

    def ours(x, a, b, w):
        return grouped_lora_linear(x, weight if packed else w, a, b, 0.5, offsets)

    oracle, baseline = run(torch.float64, formed), run(dtype, formed)
    for name, value in run(dtype, ours).items():
        assert_as_accurate(value, baseline[name], oracle[name], name)


def test_a_dense_stack_needs_no_sync_with_the_device():
    x, offsets = torch.randn(64, K, device="cuda").bfloat16(), torch.tensor([10, 64], dtype=torch.int32, device="cuda")
    w, a, b = (torch.randn(2, *shape, device="cuda").bfloat16() for shape in ((N, K), (R, K), (N, R)))
    grouped_lora_linear(x, w, a, b, 1.0, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_lora_linear(x, w, a, b, 1.0, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
