"""The fused dequantize-GEMM on a CUDA device: bf16, every candidate configuration, bits, streams and graphs."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from fastlora import reference
from fastlora.ops import nf4
from tests.support.numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
SCALING = 0.5
N, K, R = 1000, 1152, 40  # neither a multiple of all tiles
OPS = ("linear", "linear_t")


def draw(*shape, dtype=torch.bfloat16, seed=0, std=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * std).to(dtype)


class Case:
    """Operands of a product and of the product with the transposed weight; the same draws for every config."""

    def __init__(
        self, op, m, n=N, k=K, r=R, dtype=torch.bfloat16, adapter=torch.float32, blocksize=64, nested=True, p=0.0
    ):
        from fastlora.kernels.lora_plan import Dropout

        self.op, self.dtype = op, dtype
        self.weight = nf4.quantize(draw(n, k, dtype=torch.float32, std=k**-0.5), blocksize, nested)
        length, columns = (k, n) if op == "linear" else (n, k)
        self.x = draw(m, length, dtype=dtype, seed=1)
        self.h = draw(m, r, dtype=torch.float32, seed=2)
        self.b = draw(columns, r, dtype=adapter, seed=3, std=r**-0.5)
        self.bias = draw(columns, dtype=dtype, seed=4) if op == "linear" else None
        seed = torch.tensor([1234567890123], device="cuda")
        self.dropout = Dropout(p, seed if p and op == "linear_t" else None)
        self.mask = torch.ones((), device="cuda")
        if self.dropout.active:
            self.mask = reference.dropout_mask(int(seed), m, columns, p).cuda()

    def __call__(self, config=None):
        from fastlora.kernels import fused

        if self.op == "linear":
            return fused.linear(self.x, self.weight, self.h, self.b, SCALING, self.bias, config)
        return fused.linear_t(self.x, self.weight, SCALING * self.h, self.b.t(), self.dropout, config)

    def expected(self, dtype):
        w = self.weight.dequantize(torch.float32).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else self.b.dtype
        update = self.mask.to(wide) * (self.h.to(wide) @ self.b.to(wide).t()) * SCALING
        base = self.x.to(dtype) @ (w.t() if self.op == "linear" else w)
        base = base + update.to(dtype)
        return base if self.bias is None else base + self.bias.to(dtype)

    def check(self, config=None, result=None):
        result = self(config) if result is None else result
        what = f"{self.op}, {len(self.x)} tokens, {config}"
        assert_as_accurate(result, self.expected(self.dtype), self.expected(torch.float64), what)


def side_by_side(calls):
    """The results of some calls, each made in a thread, so that their kernels compile at the same time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda call: call(), calls))


def default_config(op, m):
    from fastlora.kernels import fused

    return fused.default_config(op, m, N, K, torch.cuda.get_device_capability())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [24, 200])
def test_every_candidate_gives_a_right_answer(op, m):
    from fastlora.kernels import fused

    found = fused.candidates(op, m, N, K, torch.cuda.get_device_capability())
    case = Case(op, m, n=1024, k=1152)
    results = side_by_side([partial(case, config) for config in found])
    for config, result in zip(found, results, strict=True):
        case.check(config, result)


@pytest.mark.parametrize("op", OPS)
def test_the_default_config_follows_the_oracle(op):
    cases = [Case(op, m, adapter=kind) for m in (1, 17, 64, 129) for kind in (torch.float32, torch.bfloat16)]
    for case, result in zip(cases, side_by_side(cases), strict=True):
        case.check(None, result)


@pytest.mark.parametrize("op", OPS)
def test_other_weights_ranks_and_types(op):
    cases = [
        Case(op, 16, blocksize=32, nested=False),
        Case(op, 100, blocksize=128, nested=False, r=5),
        Case(op, 16, blocksize=256, k=1280, r=130),
        Case(op, 100, dtype=torch.float16),
        Case(op, 16, dtype=torch.float16, adapter=torch.float16),
    ]
    for case, result in zip(cases, side_by_side(cases), strict=True):
        case.check(None, result)


def test_dropout_draws_the_mask_of_the_cpu():
    kinds = ((16, torch.bfloat16), (64, torch.float32), (200, torch.float32))
    cases = [Case("linear_t", m, adapter=kind, p=0.25) for m, kind in kinds]
    for splits in (1, 3):
        configs = [default_config("linear_t", len(case.x))._replace(splits=splits) for case in cases]
        results = side_by_side([partial(case, config) for case, config in zip(cases, configs, strict=True)])
        for case, config, result in zip(cases, configs, results, strict=True):
            case.check(config, result)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [16, 64, 128])
def test_the_weight_is_bit_for_bit_the_expanded_one(op, m):
    """Products with rows of the identity matrix, by pointers and by tensor maps."""
    from fastlora.kernels import fused

    function, length = (fused.linear, K) if op == "linear" else (fused.linear_t, N)
    weight = nf4.quantize(draw(N, K, dtype=torch.float32))
    exact = weight.dequantize(torch.bfloat16)
    exact = exact.t() if op == "linear" else exact
    unit = torch.eye(length, dtype=torch.bfloat16, device="cuda")
    for tma in (False, True):
        config = default_config(op, m)._replace(tma=tma)
        for rows in (slice(0, m), slice(length // 2, length // 2 + m), slice(length - m, length)):
            ours = function(unit[rows], weight, config=config)
            assert torch.equal(ours, exact[rows])


def test_strides_and_addresses_without_alignment():
    from fastlora.kernels import fused

    config = default_config("linear", 64)._replace(splits=1)
    case = Case("linear", 64)
    expected = case(config)
    padded = draw(64, K + 5, seed=9)
    padded[:, 3 : K + 3] = case.x
    codes = torch.empty(case.weight.codes.numel() + 1, dtype=torch.uint8, device="cuda")
    codes[1:] = case.weight.codes
    weight = dataclasses.replace(case.weight, codes=codes[1:])
    for x in (padded[:, 3 : K + 3], case.x.t().contiguous().t()):
        for tma in (False, True):
            ours = fused.linear(x, weight, case.h, case.b, SCALING, case.bias, config._replace(tma=tma))
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [16, 128])
def test_the_same_input_gives_the_same_bits(op, m):
    case = Case(op, m, n=4096, k=4096, p=0.25)
    first = case()
    assert all(torch.equal(case(), first) for _ in range(5))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tma", [False, True])
def test_a_side_stream_and_a_captured_graph(op, tma):
    config = default_config(op, 64)._replace(splits=3, tma=tma)
    case = Case(op, 64)
    expected = case(config)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = case(config)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case(config)
    case.x.mul_(2)
    graph.replay()
    assert torch.equal(captured, case(config))
    assert not torch.equal(captured, expected)


def test_no_call_waits_for_the_device():
    case = Case("linear_t", 64, p=0.25)
    case()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case()
    finally:
        torch.cuda.set_sync_debug_mode("default")
