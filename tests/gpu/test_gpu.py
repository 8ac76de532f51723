"""On a CUDA device: bf16 through the Triton kernels, streams, graphs, and what only a GPU shows."""

import subprocess
import sys

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4
from fastlora.ops.backend import backend
from fastlora.ops.linear import lora_linear, nf4_dequantize
from fastlora.ops.mixed import mixed_linear, several_linear
from fastlora.ops.operands import Lora
from tests.support.numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
SCALING = 2.0


def operands(m, k, n, r, dtype, adapter_dtype, base):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, std=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator, device="cuda") * std).to(dtype)

    weight = draw(n, k, std=k**-0.5)
    exact = weight
    if base == "nf4":
        weight = nf4.quantize(weight)
        exact = weight.dequantize(torch.float32)
    a, b = draw(r, k, std=k**-0.5, dtype=adapter_dtype), draw(n, r, std=r**-0.5, dtype=adapter_dtype)
    return draw(m, k), weight, exact, a, b, draw(m, n)


def results(function, x, weight, a, b, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    y = function(leaves[0], weight, leaves[1], leaves[2], SCALING)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(m, k, n, r, dtype, adapter_dtype, base):
    x, weight, exact, a, b, dy = operands(m, k, n, r, dtype, adapter_dtype, base)
    ours = results(lora_linear, x, weight, a, b, dy)
    baseline = results(reference.lora_linear, x, exact.to(dtype), a, b, dy)
    oracle = results(reference.lora_linear, x.double(), exact.double(), a.double(), b.double(), dy)
    for what, got, plain, truth in zip(("y", "dx", "dA", "dB"), ours, baseline, oracle, strict=True):
        assert_as_accurate(got, plain, truth, what)


def test_the_triton_path_is_taken():
    assert backend("cuda").name == "triton"


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k", "n", "r"), [(1, 1024, 1024, 16), (300, 1032, 520, 5), (2048, 2048, 1024, 64)])
def test_bf16_follows_the_oracle(base, adapter_dtype, m, k, n, r):
    check(m, k, n, r, torch.bfloat16, adapter_dtype, base)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_follow_the_oracle(base, dtype):
    check(256, 1024, 512, 16, dtype, torch.float32, base)


def test_large_ranks():
    check(256, 1024, 512, 256, torch.bfloat16, torch.float32, "nf4")


@pytest.mark.parametrize("nested", [True, False])
def test_dequantize_is_bitwise_bitsandbytes(nested):
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    for blocksize in (64, 128, 4096):
        codes, state = bnb.functional.quantize_4bit(
            w, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
        )
        ours = nf4.quantize(w, blocksize, nested)
        assert torch.equal(ours.codes, codes.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            state.dtype = dtype
            assert torch.equal(ours.dequantize(dtype), bnb.functional.dequantize_4bit(codes, state))


def test_the_gpu_expands_to_the_bits_of_the_cpu():
    weight = nf4.quantize(torch.randn(512, 1024))
    a, b = torch.randn(16, 1024), torch.randn(512, 16) * 0.01
    on_gpu = weight.to("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(on_gpu.dequantize(dtype).cpu(), weight.dequantize(dtype))
    merged = nf4_dequantize(on_gpu, torch.float32, a.cuda(), b.cuda(), 0.5).cpu()
    torch.testing.assert_close(merged, nf4_dequantize(weight, torch.float32, a, b, 0.5))


def test_dropout_draws_the_mask_of_the_cpu(monkeypatch):
    x, weight, exact, a, b, dy = operands(64, 256, 128, 8, torch.float32, torch.float32, "dense")
    seed = 1234567890123
    monkeypatch.setattr(torch, "randint", lambda *_, device, **__: torch.tensor([seed], device=device))
    mask = reference.dropout_mask(seed, 64, 256, 0.3).cuda()

    def dropped(*operands):
        return lora_linear(*operands, dropout_p=0.3, training=True)

    def plain(*operands):
        return reference.lora_linear(*operands, dropout_mask=mask)

    for ours, expected in zip(results(dropped, x, weight, a, b, dy), results(plain, x, exact, a, b, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("way", ["one adapter", "a mixed batch", "two adapters"])
def test_a_small_update_over_a_dense_weight_is_not_rounded_away(way):
    """Its share that reaches y and dx. cuBLAS's addmm, which rounds the base product before it adds, gives 0.24."""
    x, weight, _, a, b, dy = operands(2048, 1024, 1024, 16, torch.bfloat16, torch.float32, "dense")
    lora = Lora(a, b * 4e-4, 1.0)
    leaf = x.clone().requires_grad_()
    if way == "one adapter":
        y = lora_linear(leaf, weight, *lora[:3])
    elif way == "a mixed batch":
        batch = leaf.view(4, -1, leaf.shape[1])
        y = mixed_linear(batch, weight, None, {"one": lora}, ["one"] * 4).view(len(x), -1)
    else:
        y = several_linear(leaf, weight, None, [lora, Lora(a, torch.zeros_like(b), 1.0)])
    (dx,) = torch.autograd.grad(y, leaf, dy)
    left, right = lora.a.double(), lora.b.double()
    parts = [(y, x @ weight.t(), x.double() @ left.t() @ right.t())]
    if way != "two adapters":  # there autograd adds two parts of dx, in 16 bits
        parts.append((dx, dy @ weight, dy.double() @ right @ left))
    for ours, base, update in parts:
        assert 0 < update.square().mean().sqrt() < 1e-3 * base.double().square().mean().sqrt()
        gain = ((ours.double() - base.double()) * update).sum() / update.square().sum()
        assert abs(gain.item() - 1) < 0.1


def test_the_same_input_gives_the_same_bits():
    case = operands(2048, 1024, 1024, 16, torch.bfloat16, torch.float32, "nf4")
    x, weight, _, a, b, dy = case
    for first, second in zip(
        results(lora_linear, x, weight, a, b, dy), results(lora_linear, x, weight, a, b, dy), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_side_stream_and_a_captured_graph(base):
    x, weight, _, a, b, _ = operands(64, 512, 256, 16, torch.bfloat16, torch.float32, base)
    with torch.no_grad():
        expected = lora_linear(x, weight, a, b, SCALING)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_stream = lora_linear(x, weight, a, b, SCALING)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(on_stream, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = lora_linear(x, weight, a, b, SCALING)
        x.mul_(2)
        graph.replay()
        assert torch.equal(captured, lora_linear(x, weight, a, b, SCALING))


def test_a_graph_captured_with_the_first_call(tmp_path):
    """In a process whose first call of fastlora on the device is captured, but for what must be compiled and loaded."""
    code = (
        "import torch\nfrom fastlora.ops import nf4\nfrom fastlora.ops.linear import lora_linear\n"
        "from fastlora.kernels.operands import level_table\n"
        "w = nf4.quantize(torch.randn(256, 256)).to('cuda'); x = torch.randn(400, 256, device='cuda').bfloat16()\n"
        "assert level_table.cache_info().currsize\n"
        "a, b = torch.randn(8, 256, device='cuda'), torch.randn(256, 8, device='cuda')\n"
        "with torch.no_grad():\n"
        "    expected = lora_linear(x, w, a, b, 1.0)\n"
        "    graph = torch.cuda.CUDAGraph()\n"
        "    with torch.cuda.graph(graph):\n"
        "        y = lora_linear(x, w, a, b, 1.0)\n"
        "    y.zero_(); graph.replay(); assert torch.equal(y, expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_call_waits_for_the_device():
    x, weight, _, a, b, dy = operands(256, 512, 256, 16, torch.bfloat16, torch.float32, "nf4")

    def dropped(*operands):
        return lora_linear(*operands, dropout_p=0.1, training=True)

    results(dropped, x, weight, a, b, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(dropped, x, weight, a, b, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu(rehearsed=False)
def test_compile_fullgraph_gives_the_same():
    x, weight, _, a, b, dy = operands(256, 512, 256, 16, torch.bfloat16, torch.float32, "nf4")
    compiled = torch.compile(lora_linear, fullgraph=True)
    for ours, eager in zip(
        results(compiled, x, weight, a, b, dy), results(lora_linear, x, weight, a, b, dy), strict=True
    ):
        assert torch.equal(ours, eager)
