"""The grouped linear as an operator over the Triton kernels: values, every gradient, what is saved, compilation."""

import itertools

import pytest
import torch

from fastlora.ops import nf4
from fastlora.ops.grouped import computed_by, grouped_lora_linear
from tests.support.numerics import assert_as_accurate

triton = pytest.importorskip("triton")
from fastlora.kernels import choice, grouped  # noqa: E402

from fastlora.ops import grouped_cuda  # noqa: E402
from tests.support.kernel_cases import DEVICE, KERNELS  # noqa: E402

pytestmark = KERNELS
EXPERTS, N, K, R, ROWS, SCALING = 4, 40, 64, 3, 30, 0.5
ENDS = [7, 7, 20, 28]  # the second expert has no row; the last two rows have no expert
LEAVES = ("x", "a", "b", "bias")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """The environment forces Triton and nothing else."""
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")


class Layer:
    """Operands of an adapted stack."""

    def __init__(self, kind="dense", dtype=torch.bfloat16, adapter=torch.float32, bias=torch.bfloat16):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

        self.offsets = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
        self.stack = draw(EXPERTS, N, K)
        self.values = self.stack
        if kind == "nf4":
            self.stack = nf4.quantize(self.stack.view(-1, K).cpu()).to(DEVICE)
            self.values = self.stack.dequantize(dtype).view(EXPERTS, N, K)
        elif kind == "transposed":
            self.stack = self.stack.mT.contiguous().mT
        self.leaves = {
            "x": draw(ROWS, K),
            "a": draw(EXPERTS, R, K, dtype=adapter) / 8,
            "b": draw(N, R * EXPERTS, dtype=adapter) / 2,  # as peft packs it
            "bias": draw(EXPERTS, N, dtype=bias),
        }
        self.dy = draw(ROWS, N)

    def by_expert(self, b):
        return b.reshape(N, R, EXPERTS).permute(2, 0, 1)

    def ours(self, x, a, b, bias):
        return grouped_lora_linear(x, self.stack, a, self.by_expert(b), SCALING, self.offsets, bias)

    def formed(self, x, a, b, bias):
        b, w = self.by_expert(b), self.values.to(x.dtype)
        out = []
        for expert, (begin, end) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
            mine = x[begin:end] @ w[expert].t()
            update = SCALING * (x[begin:end].to(a.dtype) @ a[expert].t() @ b[expert].t())
            out.append(mine + update.to(x.dtype) + bias[expert].to(x.dtype))
        return torch.cat([*out, out[-1].new_zeros(ROWS - ENDS[-1], N)])

    def run(self, compute, dtype=None, needs=LEAVES):
        given = {name: t.to(dtype or t.dtype).requires_grad_(name in needs) for name, t in self.leaves.items()}
        given = {name: t.detach().clone().requires_grad_(name in needs) for name, t in given.items()}
        y = compute(**given)
        y.backward(self.dy.to(y.dtype))
        return {"y": y.detach()} | {name: given[name].grad for name in needs}

    def check(self, found):
        baseline, oracle = self.run(self.formed), self.run(self.formed, torch.float64)
        for name, value in found.items():
            assert value.dtype == baseline[name].dtype
            assert_as_accurate(value, baseline[name], oracle[name], name)

    def operands(self):
        packed = isinstance(self.stack, nf4.NF4Weight)
        stack = self.stack.tensors() if packed else (self.stack, None, None, None, None)
        leaves = {name: t.detach().requires_grad_() for name, t in self.leaves.items()}
        sizes = (N, K, self.stack.blocksize if packed else 0)
        adapters = leaves["a"], self.by_expert(leaves["b"])
        return leaves["x"], leaves["bias"], self.offsets, *stack, *sizes, *adapters, SCALING, True


@pytest.fixture
def launched(monkeypatch):
    """Which kind of stack each product got, in order."""
    found = []
    for name in ("grouped_linear", "grouped_linear_t"):
        function = getattr(grouped, name)
        monkeypatch.setattr(
            grouped, name, lambda x, stack, *rest, call=function: found.append(type(stack)) or call(x, stack, *rest)
        )
    return found


@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "adapter", "bias"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_values_and_gradients(kind, dtype, adapter, bias, launched):
    layer = Layer(kind, dtype, adapter, bias)
    layer.check(layer.run(layer.ours))
    assert launched == [nf4.NF4Weight if kind == "nf4" else torch.Tensor] * 2


def test_only_what_is_needed_is_computed(launched):
    layer = Layer()
    everything = layer.run(layer.ours)
    for count in (1, 2):
        for needs in itertools.combinations(LEAVES, count):
            launched.clear()
            found = layer.run(layer.ours, needs=needs)
            assert all(torch.equal(value, everything[name]) for name, value in found.items())
            assert len(launched) == 1 + ("x" in needs)
    with torch.no_grad():
        assert torch.equal(layer.ours(**layer.leaves), everything["y"])


def test_a_stack_without_adapters_or_bias():
    layer = Layer()
    x = layer.leaves["x"].clone().requires_grad_()
    y = grouped_lora_linear(x, layer.stack, None, None, 0.0, layer.offsets)
    y.backward(layer.dy)
    nothing = {name: t * (name == "x") for name, t in layer.leaves.items()}
    layer.leaves = nothing
    layer.check({"y": y.detach(), "x": x.grad})


def test_many_rows_an_expert_expand_the_stack_once(monkeypatch, launched):
    layer = Layer("nf4")
    asked = []
    monkeypatch.setattr(choice, "choose", lambda op, m, *_: asked.append((op, m)) or choice.Choice("dequantize"))
    layer.check(layer.run(layer.ours))
    assert launched == [torch.Tensor] * 2
    assert asked == [("linear", 8), ("linear_t", 8)]  # 30 rows, 4 experts


def test_what_is_saved():
    layer = Layer("nf4")
    packed = layer.stack.codes.numel() + 4 * layer.stack.absmax.numel()
    sizes = {}
    for needs in (("x",), ("a",), ("b",)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            layer.ours(**{name: t.detach().requires_grad_(name in needs) for name, t in layer.leaves.items()})
        shapes = [tuple(t.shape) for t in saved]
        sizes[needs[0]] = ((ROWS, K) in shapes, (ROWS, R) in shapes)
        assert sum(t.numel() for t in saved) < packed + 3 * ROWS * K + 2 * EXPERTS * R * (N + K)
    assert sizes == {"x": (False, False), "a": (True, False), "b": (False, True)}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_opcheck(kind):
    checked = torch.library.opcheck(torch.ops.fastlora.grouped_lora_linear, Layer(kind).operands())
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_torch_compile_sees_two_operators(kind):
    layer = Layer(kind)
    plain = layer.run(layer.ours)
    found = layer.run(torch.compile(layer.ours, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def test_no_rows():
    layer = Layer()
    leaves = {name: t[:0] if name == "x" else t for name, t in layer.leaves.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    layer.offsets = torch.zeros_like(layer.offsets)
    y = layer.ours(**leaves)
    y.sum().backward()
    assert y.shape == (0, N)
    assert not any(leaves[name].grad.any() for name in LEAVES)


def test_a_second_derivative_is_refused():
    layer = Layer()
    x = layer.leaves["x"].clone().requires_grad_()
    y = layer.ours(**layer.leaves | {"x": x})
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_it_does_not_take_goes_to_another_path(launched):
    layer = Layer()
    layer.stack.requires_grad_()
    layer.run(layer.ours)
    assert layer.stack.grad is not None
    layer = Layer(dtype=torch.float32, bias=torch.float32)
    layer.run(layer.ours)
    assert launched == []
    operands = layer.leaves["x"], layer.stack, EXPERTS, layer.leaves["a"], layer.leaves["b"]
    assert "bf16 or fp16" in grouped_cuda.refusal(*operands)
    layer = Layer()
    operands = layer.leaves["x"], layer.stack, EXPERTS, layer.leaves["a"].half(), layer.leaves["b"]
    assert "neither in fp32 nor" in grouped_cuda.refusal(*operands)


def test_the_paths_in_words(monkeypatch):
    here, shape = torch.device(DEVICE), (EXPERTS, 512, 1024)
    assert computed_by(here, torch.bfloat16, *shape, 0, 16) == ("grouped_cuda", "grouped product (Triton)")
    _, said = computed_by(here, torch.float16, *shape, 64, 16)
    assert "rows an expert grouped fused dequantize-GEMM, above dequantize, then grouped product (Triton)" in said
    assert computed_by(here, torch.float32, *shape, 64, 16) == ("grouped_loop", "expert by expert")
    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    cpu = torch.device("cpu")
    assert computed_by(cpu, torch.bfloat16, *shape, 0, 16) == ("grouped_loop", "expert by expert")
