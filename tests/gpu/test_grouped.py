"""The grouped product on a CUDA device: every configuration of the default, layouts, gradients, graphs, no waiting."""

import pytest
import torch

from fastlora.ops import grouped_cuda, nf4
from fastlora.ops.grouped import grouped_lora_linear
from tests.support.numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
EXPERTS, N, K, R, SCALING = 6, 320, 448, 16, 0.5  # sizes that are not multiples of a tile


def draw(*shape, dtype=torch.bfloat16, seed=0, std=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * std).to(dtype)


class Layer:
    """An adapted stack, and rows: one expert has none, and the last rows have no expert."""

    def __init__(self, rows, kind="dense", dtype=torch.bfloat16, adapter=torch.float32, n=N, k=K):
        shares = torch.tensor([5, 0, 1, 9, 2, 3])
        lengths = rows * shares // shares.sum()
        self.ends = [0, *lengths.cumsum(0).tolist()]
        self.offsets = lengths.cumsum(0).to(device="cuda", dtype=torch.int32)
        self.stack = self.values = draw(EXPERTS, n, k, dtype=dtype, std=k**-0.5)
        if kind == "nf4":
            self.stack = nf4.quantize(self.stack.view(-1, k))
            self.values = self.stack.dequantize(dtype).view(EXPERTS, n, k)
        elif kind == "transposed":
            self.stack = self.stack.mT.contiguous().mT
        self.x, self.dy = draw(rows, k, dtype=dtype, seed=1), draw(rows, n, dtype=dtype, seed=2)
        self.a = draw(EXPERTS, R, k, dtype=adapter, seed=3, std=k**-0.5)
        self.b = draw(n, R, EXPERTS, dtype=adapter, seed=4, std=R**-0.5)  # as peft packs it
        self.bias = draw(EXPERTS, n, dtype=dtype, seed=5)

    def ours(self, x, a, b, bias):
        return grouped_lora_linear(x, self.stack, a, b.permute(2, 0, 1), SCALING, self.offsets, bias)

    def formed(self, x, a, b, bias):
        out = []
        for expert, (begin, end) in enumerate(zip(self.ends, self.ends[1:], strict=False)):
            mine, w = x[begin:end], self.values[expert].to(x.dtype)
            update = SCALING * (mine.to(a.dtype) @ a[expert].t() @ b[:, :, expert].t())
            out.append(mine @ w.t() + update.to(x.dtype) + bias[expert].to(x.dtype))
        return torch.cat([*out, x.new_zeros(len(x) - self.ends[-1], bias.shape[1])])

    def run(self, compute, dtype=None):
        leaves = [t.to(dtype or t.dtype).detach().clone().requires_grad_() for t in (self.x, self.a, self.b, self.bias)]
        y = compute(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))

    def check(self, found=None):
        found = found or self.run(self.ours)
        baseline, oracle = self.run(self.formed), self.run(self.formed, torch.float64)
        for name, *values in zip(("y", "dx", "dA", "dB", "dbias"), found, baseline, oracle, strict=True):
            assert_as_accurate(*values, f"{name}, {len(self.x)} rows")


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Counts calls of the Triton path, which every test here is about."""
    calls = []
    way = grouped_cuda.grouped_linear
    monkeypatch.setattr(grouped_cuda, "grouped_linear", lambda *args: calls.append(1) or way(*args))
    yield
    assert calls


@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4"])
@pytest.mark.parametrize("rows", [8, 150, 350, 1200, 6000])  # tiles of 16, 32, 64, 128; NF4 expanded
def test_as_exact_as_torch_expert_by_expert(rows, kind):
    Layer(rows, kind).check()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
def test_other_types(dtype, adapter, kind):
    for rows in (40, 900):
        Layer(rows, kind, dtype, adapter).check()


@pytest.mark.parametrize("kind", ["dense", "transposed"])
@pytest.mark.parametrize("rows", [40, 900])
def test_sizes_without_alignment(rows, kind):
    Layer(rows, kind, n=130, k=196).check()


@pytest.mark.parametrize("op", ["linear", "linear_t"])
def test_the_weight_is_bit_for_bit_the_expanded_one(op):
    from fastlora.kernels import grouped
    from fastlora.kernels.segments import by_offsets

    layer = Layer(16, "nf4")
    length, function = (K, grouped.grouped_linear) if op == "linear" else (N, grouped.grouped_linear_t)
    exact = layer.values.mT if op == "linear" else layer.values
    unit = torch.eye(length, dtype=torch.bfloat16, device="cuda").repeat(EXPERTS, 1)
    offsets = length * torch.arange(1, EXPERTS + 1, dtype=torch.int32, device="cuda")
    for rows in (16, 64, 128):
        config = grouped.default_config(op, rows, True, N, K, torch.cuda.get_device_capability())
        found = function(unit, layer.stack, by_offsets(offsets, len(unit)), config=config)
        assert torch.equal(found, exact.reshape(found.shape))
    layer.check()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_same_bits_in_a_graph_and_for_other_numbers_of_rows(kind):
    layer = Layer(600, kind)
    expected = layer.run(layer.ours)
    assert all(torch.equal(*pair) for pair in zip(layer.run(layer.ours), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer.ours(layer.x, layer.a, layer.b, layer.bias)
    graph.replay()
    assert torch.equal(y, expected[0])
    layer.offsets.copy_(layer.offsets.flip(0).sub(layer.offsets[-1]).neg())  # the experts' shares the other way round
    layer.ends = [0, *layer.offsets.tolist()]
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, layer.ours(layer.x, layer.a, layer.b, layer.bias))
    layer.check()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("rows", [40, 6000])
def test_nothing_waits_for_the_device(kind, rows):
    layer = Layer(rows, kind)
    layer.run(layer.ours)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run(layer.ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu(rehearsed=False)
def test_compiled():
    layer = Layer(300)
    layer.check(layer.run(torch.compile(layer.ours, fullgraph=True)))
