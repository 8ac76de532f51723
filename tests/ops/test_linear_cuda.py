"""The path on CUDA devices: which kernels run for how many tokens, and that each of them follows the oracle."""

import pytest
import torch
from fastlora.kernels.operands import Lora
from torch import Tensor

from fastlora import reference
from fastlora.ops import nf4, operands
from fastlora.ops.operands import Gradients, Needs
from tests.support.numerics import assert_as_accurate

triton = pytest.importorskip("triton")
from fastlora.kernels import choice, search  # noqa: E402
from fastlora.kernels.choice import Choice  # noqa: E402

from fastlora.ops import backend as backends  # noqa: E402
from fastlora.ops import linear_cuda  # noqa: E402
from tests.support.kernel_cases import DEVICE, KERNELS  # noqa: E402

pytestmark = KERNELS
SEED = 2**60 + 98765
SCALING = 2.0
ALL = Needs(True, True, True)
DTYPES = [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """The environment forces Triton and nothing else."""
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    monkeypatch.delenv("FASTLORA_AUTOTUNE", raising=False)
    monkeypatch.setattr(search, "_found", {})


class Layer:
    """Operands of one adapted linear layer over NF4, and what the reference makes of them."""

    def __init__(self, m, k=128, n=144, r=8, dtype=torch.float16, adapter=torch.float32, bias=False, p=0.0):
        generator = torch.Generator().manual_seed(m * 7 + k)

        def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(dtype).to(DEVICE)

        self.x, self.dy = draw(m, k), draw(m, n)
        self.bias = draw(n) if bias else None
        self.weight = nf4.quantize(draw(n, k, std=k**-0.5).cpu()).to(DEVICE)
        self.exact = self.weight.dequantize(torch.float32)
        seed = torch.tensor([SEED], device=DEVICE) if p else None
        a, b = draw(r, k, std=k**-0.5, dtype=adapter), draw(n, r, std=r**-0.5, dtype=adapter)
        self.lora = Lora(a, b, SCALING, p, seed)
        self.mask = reference.dropout_mask(SEED, m, k, p).to(DEVICE) if p else None

    def reference(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """y, dx, dA, dB in a dtype, or each in its own."""
        leaves = [t.detach().clone().to(dtype or t.dtype) for t in (self.x, self.lora.a, self.lora.b)]
        for leaf in leaves:
            leaf.requires_grad_()
        bias = self.bias.to(leaves[0].dtype) if self.bias is not None else None
        weight = self.exact.to(leaves[0].dtype)
        y = reference.lora_linear(leaves[0], weight, leaves[1], leaves[2], SCALING, bias, self.mask)
        return y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))

    def ours(self, needs: Needs = ALL) -> tuple[Tensor, Gradients]:
        """y, then the gradients."""
        y, h = linear_cuda.forward(self.x, self.weight, self.lora, self.bias, save_h=needs.lora_b)
        assert (h is not None) == needs.lora_b
        return y, linear_cuda.backward(self.dy, self.x if needs.lora_a else None, h, self.weight, self.lora, needs)

    def check(self) -> None:
        """Hold y, dx, dA and dB against the tolerance rule."""
        y, grads = self.ours()
        results = zip(("y", "dx", "dA", "dB"), (y, *grads), self.reference(), strict=True)
        for (what, got, baseline), oracle in zip(results, self.reference(torch.float64), strict=True):
            assert got.dtype == baseline.dtype
            assert_as_accurate(got, baseline, oracle, what)


def force(monkeypatch, forward: str, backward: str) -> None:
    chosen = {"linear": Choice(forward), "linear_t": Choice(backward)}
    monkeypatch.setattr(choice, "choose", lambda op, *_: chosen[op])


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the functions that reach a kernel, in the order of their calls."""
    made: list[str] = []
    watched = [(linear_cuda.fused, name) for name in ("linear", "linear_t")]
    watched += [(linear_cuda.kernel, name) for name in ("shrink", "expand", "dy_parts", "x_parts")]
    watched += [(linear_cuda.decode, "decode"), (linear_cuda.cuda, "decode")]
    for module, name in watched:
        monkeypatch.setattr(module, name, spy(getattr(module, name), name, made))
    monkeypatch.setattr(operands, "nf4_expand", spy(operands.nf4_expand, "dequantize", made))
    return made


def spy(function, name, made):
    def watched(*args, **kwargs):
        made.append(name)
        return function(*args, **kwargs)

    return watched


@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 448, 520), (16, 192, 136)])  # an rms over fewer values would be noise
def test_decode_follows_the_oracle(monkeypatch, dtype, adapter, m, k, n):
    force(monkeypatch, "decode", "fused")
    Layer(m, k, n, dtype=dtype, adapter=adapter, bias=m == 16).check()


@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kernel", ["fused", "dequantize"])
def test_fused_and_dequantize_follow_the_oracle(monkeypatch, dtype, adapter, p, kernel):
    force(monkeypatch, kernel, kernel)
    Layer(24, dtype=dtype, adapter=adapter, p=p, bias=p == 0).check()


@pytest.mark.parametrize("kernel", ["fused", "dequantize"])
def test_a_large_rank_and_more_than_one_tile_of_tokens(monkeypatch, kernel):
    force(monkeypatch, kernel, kernel)
    Layer(70, r=40, p=0.25, bias=True).check()


@pytest.mark.parametrize("shape", [(20, 130, 70), (3, 70, 130), (40, 64, 33)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_shapes_that_are_no_whole_tiles_or_blocks(shape, p):
    m, k, n = shape
    Layer(m, k, n, r=3, p=p, bias=True).check()


@pytest.mark.parametrize("m", [2, 40])
def test_fp32_goes_where_it_can(m):
    Layer(m, dtype=torch.float32, bias=True).check()


@pytest.mark.parametrize("needs", [Needs(*map(bool, map(int, bits))) for bits in ("100", "010", "001", "110", "011")])
@pytest.mark.parametrize("kernel", ["fused", "dequantize"])
def test_only_what_is_needed_is_computed(monkeypatch, needs, kernel):
    force(monkeypatch, kernel, kernel)
    layer = Layer(24, 64, 40)
    _, some = layer.ours(needs)
    _, every = layer.ours()
    for asked, found, expected in zip(needs, some, every, strict=True):
        assert (found is not None) == asked
        assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("m", [4, 24, 300])
def test_a_layer_without_adapters(m):
    layer = Layer(m, bias=True)
    exact = layer.exact.double()
    for dtype in (torch.float16, torch.bfloat16) if m == 24 else (torch.float16,):
        x, dy, bias = (t.to(dtype) for t in (layer.x, layer.dy, layer.bias))
        y, h = linear_cuda.forward(x, layer.weight, None, bias, False)
        dx, da, db = linear_cuda.backward(dy, None, None, layer.weight, None, Needs(True, False, False))
        assert h is da is db is None
        rounded = layer.exact.to(dtype)
        y_oracle, dx_oracle = x.double() @ exact.t() + bias.double(), dy.double() @ exact
        assert_as_accurate(y, torch.nn.functional.linear(x, rounded, bias), y_oracle, "y")
        assert_as_accurate(dx, dy @ rounded, dx_oracle, "dx")


def test_activations_with_any_strides():
    for m in (4, 24):
        layer, plain = Layer(m), Layer(m)
        for name in ("x", "dy"):
            rows = getattr(layer, name)
            wide = torch.full((m, 2 * rows.shape[1]), float("nan"), dtype=rows.dtype, device=DEVICE)
            wide[:, ::2] = rows
            setattr(layer, name, wide[:, ::2])
        layer.check()
        layer.dy = plain.dy = plain.dy[:, :1].expand(plain.dy.shape)  # as the gradient of a sum comes
        layer.check()


@pytest.mark.parametrize(
    ("m", "p", "expected"),
    [
        (16, 0.0, ["decode"]),
        (16, 0.25, ["shrink", "linear"]),
        (17, 0.0, ["shrink", "linear"]),
        (288, 0.25, ["shrink", "linear"]),
        (289, 0.0, ["dequantize"]),
        (289, 0.25, ["shrink", "dequantize", "expand"]),
    ],
)
def test_the_table_decides_and_h_is_computed_only_where_it_is_needed(monkeypatch, calls, m, p, expected):
    monkeypatch.setattr(choice, "gpu_of", lambda device: ("unknown", (8, 0)))
    layer = Layer(m, 64, 48, p=p)
    linear_cuda.forward(layer.x, layer.weight, layer.lora, None, save_h=False)
    assert calls == expected
    calls.clear()
    linear_cuda.forward(layer.x, layer.weight, layer.lora, None, save_h=True)
    assert sorted(calls) == sorted({*expected, "shrink"})


@pytest.mark.parametrize(
    ("m", "p", "expected"),
    [
        (16, 0.0, ["dy_parts", "x_parts", "linear_t"]),
        (288, 0.25, ["dy_parts", "x_parts", "linear_t"]),
        (289, 0.0, ["dy_parts", "x_parts", "dequantize"]),
        (289, 0.25, ["dy_parts", "x_parts", "dequantize", "expand"]),
    ],
)
def test_backward_reads_each_activation_once(monkeypatch, calls, m, p, expected):
    monkeypatch.setattr(choice, "gpu_of", lambda device: ("unknown", (8, 0)))
    layer = Layer(m, 64, 48, p=p)
    h = torch.randn(m, 8, device=DEVICE)
    linear_cuda.backward(layer.dy, layer.x, h, layer.weight, layer.lora, ALL)
    assert calls == expected
    if p == 0.0 and m > 288:  # a merged weight needs no g
        calls.clear()
        linear_cuda.backward(layer.dy, None, None, layer.weight, layer.lora, Needs(True, False, False))
        assert calls == ["dequantize"]


def test_what_a_kernel_refuses_goes_to_the_next(monkeypatch, calls):
    force(monkeypatch, "decode-cuda", "fused")
    layer = Layer(4)
    refused: set[str] = set()
    monkeypatch.setattr(linear_cuda, "refusal", lambda kernel, *_: "no" if kernel in refused else "")
    monkeypatch.setattr(linear_cuda.cuda, "decode", lambda *_: calls.append("cuda") or layer.dy)
    for refuses, expected in ((None, "cuda"), ("decode-cuda", "decode"), ("decode", "linear"), ("fused", "dequantize")):
        refused |= {refuses} if refuses else set()
        backends.forget_choices()
        calls.clear()
        linear_cuda.forward(layer.x, layer.weight, layer.lora, None, False)
        assert calls[-1] == expected


def test_a_dense_weight_goes_to_cublas(monkeypatch, calls):
    monkeypatch.setattr(choice, "choose", lambda *_: pytest.fail("the table is for NF4"))
    layer = Layer(24)
    weight = layer.exact.half()
    linear_cuda.forward(layer.x, weight, layer.lora, None, False)
    linear_cuda.backward(layer.dy, layer.x, torch.randn(24, 8, device=DEVICE), weight, layer.lora, ALL)
    assert calls == ["shrink", "expand", "dy_parts", "x_parts", "expand"]


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_autotuning_gives_the_right_result_and_searches_once(monkeypatch, p):
    monkeypatch.setenv("FASTLORA_AUTOTUNE", "1")
    monkeypatch.setattr(linear_cuda.fused, "candidates", lambda *_: [None])
    timed = []
    monkeypatch.setattr(search, "_milliseconds", lambda call, device: timed.append(call()) or len(timed))
    layer = Layer(9, 64, 40, p=p)
    layer.ours()
    searched = len(timed)
    assert searched >= (5 if p == 0 else 4)  # linear: the table's, dequantize, decode, fused; linear_t: no decode
    layer.check()
    assert len(timed) == searched  # the second call remembers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_product_of_many_rows_is_kept_in_parts(monkeypatch, dtype, bias):
    layer = Layer(700, dtype=dtype, bias=bias)
    dense = layer.exact.to(dtype)

    def run():
        y, h = linear_cuda.forward(layer.x, dense, layer.lora, layer.bias, True)
        return y, *linear_cuda.backward(layer.dy, layer.x, h, dense, layer.lora, ALL)

    whole, rows = run(), []
    product = linear_cuda.wide_product
    monkeypatch.setattr(linear_cuda, "wide_product", lambda x, w: rows.append(x.shape[0]) or product(x, w))
    monkeypatch.setattr(linear_cuda, "MOST_BASE_VALUES", 256 * 144)
    for parts, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(parts, expected)
    assert rows == [256, 256, 188] * 2
