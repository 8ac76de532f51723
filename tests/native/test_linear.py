"""Whole LoRA linears in the compiled CPU library: the tolerance rule, bits of the weight, threads, refusals."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastlora.kernels.operands import Lora, Packed
from torch import Tensor

from fastlora import reference
from fastlora.native import cpu, linear
from fastlora.ops import nf4
from tests.support.numerics import assert_as_accurate, rms

BF16, FP32 = torch.bfloat16, torch.float32
SCALING = 2.0

pytestmark = [
    pytest.mark.usefixtures("one_thread", "poison"),
    pytest.mark.skipif(cpu.isas()[-1:] != ("avx512bf16",), reason="this processor, or this build, has no AVX512_BF16"),
]


def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def inside_nan(t: Tensor) -> Tensor:
    """The same values, amid NaN on every side, rows an odd number of elements apart."""
    around = torch.full((t.shape[0] + 2, t.shape[1] + 7), torch.nan, dtype=t.dtype)
    inner = around[1:-1, 3:-4]
    inner.copy_(t)
    return inner


class Case:
    """Random operands of one linear, and the results of the library, the reference and the fp64 oracle."""

    def __init__(
        self, m: int, k: int, n: int, r: int, adapter_dtype: torch.dtype, packed: bool, bias: bool, p: float = 0.0
    ) -> None:
        self.x, self.dy = inside_nan(normal(m, k)), inside_nan(normal(m, n))
        self.lora_a = normal(r, k, std=k**-0.5, dtype=adapter_dtype)
        self.lora_b = normal(n, r, std=r**-0.5, dtype=adapter_dtype)
        self.bias = normal(n).float() if bias else None
        dense = normal(n, k, std=k**-0.5)
        self.weight: Tensor | Packed = inside_nan(dense)
        self.exact_weight = dense.double()
        if packed:
            quantized = nf4.quantize(dense)
            self.weight = quantized
            self.exact_weight = quantized.dequantize(FP32).double()
        self.lora = Lora(self.lora_a, self.lora_b, SCALING)
        self.mask = None
        if p:
            seed = 0x123456789ABCDEF0
            self.mask = reference.dropout_mask(seed, m, k, p)
            self.lora = self.lora._replace(seed=torch.tensor([seed]), dropout_p=p)

    def ours(self) -> list[Tensor]:
        """y, dx, dA, dB."""
        y, h = linear.linear(self.x, self.weight, self.lora, self.bias, True)
        return [y, *linear.linear_backward(self.dy, self.x, h, self.weight, self.lora, True, True, True)]

    def expected(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same by the reference, in `dtype`, or each tensor in its own."""
        leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (self.x, self.lora_a, self.lora_b)]
        bias = None if self.bias is None else self.bias.to(dtype or BF16)
        weight = self.exact_weight.to(dtype or BF16)
        y = reference.lora_linear(leaves[0], weight, leaves[1], leaves[2], SCALING, bias, self.mask)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))]

    def check(self, what: object) -> None:
        """Hold y and every gradient against the tolerance rule."""
        results = zip(("y", "dx", "dA", "dB"), self.ours(), self.expected(), strict=True)
        for (name, ours, baseline), oracle in zip(results, self.expected(torch.float64), strict=True):
            assert_as_accurate(ours, baseline, oracle, f"{name} {what}")


# M, K, N, R: few and many tokens on either side of every bound, tails of panel, tile, vector, depth, job and block.
SHAPES = [
    (1, 192, 2070, 8),
    (3, 1024, 2048, 16),
    (4, 96, 1026, 4),
    (5, 192, 134, 6),
    (8, 2080, 514, 16),
    (9, 128, 514, 3),
    (16, 256, 512, 16),
    (31, 4128, 66, 16),
    (33, 544, 130, 20),
    (64, 64, 48, 1),
    (65, 128, 578, 40),
    (300, 512, 384, 16),
    (601, 544, 130, 16),
    (1030, 96, 258, 100),
    (2055, 544, 1030, 3),
    (3, 18, 34, 5),
    (66, 544, 33282, 2),
    (129, 128, 96, 256),
]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_as_accurate_as_the_reference(packed: bool, adapter_dtype: torch.dtype, p: float) -> None:
    shapes = [shape for shape in SHAPES if not (packed and shape[1] % 32)]
    for index, (m, k, n, r) in enumerate(shapes):
        Case(m, k, n, r, adapter_dtype, packed, index % 2 == 0, p).check((m, k, n, r))


def test_the_largest_rank() -> None:
    for adapter_dtype in (BF16, FP32):
        Case(70, 256, 96, linear.MAX_RANK, adapter_dtype, True, False).check("rank")


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_nf4_has_the_bits_of_dequantize(blocksize: int, double_quant: bool) -> None:
    """Identities pass the weight through, for few tokens and for many. Rows hold a part of a block, one, or several."""
    for n, k in [(66, 32), (130, 96), (34, 2112)]:
        weight = nf4.quantize(normal(n, k), blocksize, double_quant)
        expected = weight.dequantize(BF16)
        for step in (1, 2, 3, 4, 5, 6, 7, 8, 40, 4096):
            columns = [linear.linear(x, weight, None, None)[0] for x in torch.eye(k, dtype=BF16).split(step)]
            rows = [
                linear.linear_backward(dy, None, None, weight, None, True)[0]
                for dy in torch.eye(n, dtype=BF16).split(step)
            ]
            assert torch.equal(torch.cat(columns).t(), expected), (n, k, step)
            assert torch.equal(torch.cat(rows), expected), (n, k, step)


@pytest.mark.parametrize("m", [1, 8, 9, 64, 65, 300])
def test_base_and_update_are_rounded_once(m: int) -> None:
    """Rounded apart and added, one element in forty would differ, for an update a thousandth of what rounding moves."""
    n = k = 1024
    x, weight = normal(m, k), normal(n, k, std=0.02)
    lora_a, lora_b = normal(16, k, dtype=FP32), normal(n, 16, dtype=FP32)
    lora_b *= 7e-5 * 0.02 / rms(lora_b @ lora_a)
    lora = Lora(lora_a, lora_b)
    y, _ = linear.linear(x, weight, lora, None)
    dx, *_ = linear.linear_backward(x, None, None, weight, lora, True)
    merged = weight.double() + lora_b.double() @ lora_a.double()
    plain = (x.double() @ weight.double().t()).bfloat16()
    once = (x.double() @ merged.t()).bfloat16()
    assert (plain != once).float().mean() > 0.015
    assert (y != once).float().mean() < 0.003
    assert (dx != (x.double() @ merged).bfloat16()).float().mean() < 0.003


def test_threads_do_not_change_the_bits() -> None:
    cases = [
        Case(m, k, 642, 20, adapter_dtype, packed, True, 0.1)
        for (m, k), (adapter_dtype, packed) in zip(
            [(1, 544), (7, 544), (16, 544), (5, 576), (70, 544), (1, 576), (520, 544), (1100, 576)],
            itertools.cycle([(BF16, False), (FP32, True)]),
        )
    ]
    alone = [case.ours() for case in cases]
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for case, expected in zip(cases, alone, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(case.ours(), expected, strict=True)), threads


def test_calls_from_several_threads() -> None:
    cases = [Case(m, 256, 130, 8, FP32, m % 2 == 0, True) for m in (1, 5, 16, 40, 90)]
    expected = [case.ours() for case in cases]

    def job(index: int) -> bool:
        pairs = zip(cases[index % 5].ours(), expected[index % 5], strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(40)))


def test_parts_can_be_left_out() -> None:
    case = Case(20, 64, 96, 4, BF16, False, False)
    y, *grads = case.ours()
    assert torch.equal(linear.linear(case.x, case.weight, case.lora, None)[0], y)
    _, h = linear.linear(case.x, case.weight, case.lora, None, True)
    for wanted in itertools.product([False, True], repeat=3):
        x, saved = case.x if wanted[1] else None, h if wanted[2] else None
        found = linear.linear_backward(case.dy, x, saved, case.weight, case.lora, *wanted)
        for ours, expected, want in zip(found, grads, wanted, strict=True):
            assert torch.equal(ours, expected) if want else ours is None, wanted


def test_empty() -> None:
    case = Case(3, 64, 48, 4, FP32, True, False)
    y, h = linear.linear(case.x[:0], case.weight, case.lora, None, True)
    assert (y.shape, h.shape) == ((0, 48), (0, 4))
    dx, da, db = linear.linear_backward(case.dy[:0], case.x[:0], h, case.weight, case.lora, True, True, True)
    assert dx.shape == (0, 64)
    assert not da.any()
    assert not db.any()


def test_no_columns() -> None:
    weight, lora = normal(48, 0), Lora(normal(4, 0, dtype=FP32), normal(48, 4, dtype=FP32))
    dy, h = normal(3, 48), torch.ones(3, 4)
    dx, _, db = linear.linear_backward(dy, None, h, weight, lora, True, False, True)
    assert dx.shape == (3, 0)
    torch.testing.assert_close(db, dy.float().sum(0)[:, None].expand(48, 4))


@pytest.mark.parametrize("m", [1, 8, 20])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=str)
def test_h_is_not_needed_for_y(m: int, adapter_dtype: torch.dtype) -> None:
    case = Case(m, 576, 130, 12, adapter_dtype, True, True, 0.1)
    y, h = linear.linear(case.x, case.weight, case.lora, case.bias)
    assert h is None
    assert torch.equal(y, case.ours()[0])


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear.supports(1, 48, 64, 16, True)
    assert linear.supports(linear.FEW_TOKENS, 2, 2, 0, False)
    for m, n, k, rank, packed in [(1, 47, 64, 4, False), (1, 48, 63, 4, False), (1, 48, 80, 4, True)]:
        assert not linear.supports(m, n, k, rank, packed)
    assert not linear.supports(1, 48, 64, linear.MAX_RANK + 1, False)
    monkeypatch.setenv("FASTLORA_CPU_ISA", "avx512")
    assert not linear.supports(1, 48, 64, 16, False)
    with pytest.raises(RuntimeError, match="returned 2"):
        Case(3, 64, 48, 4, BF16, False, False).ours()


M, N, K, R = 3, 48, 64, 4
GOOD: dict[str, Any] = {"x": torch.ones(M, K, dtype=BF16), "weight": torch.ones(N, K, dtype=BF16), "bias": None}
ADAPTERS = {"lora_a": torch.ones(R, K), "lora_b": torch.ones(N, R)}
WEIGHT = nf4.quantize(torch.ones(N, K))
BAD: dict[str, dict[str, Any]] = {
    r"x is \[3, 64\] torch.float16": {"x": GOOD["x"].half()},
    r"x is \[3, 62\]": {"x": GOOD["x"][:, :62]},
    r"x is .* with strides \[1, 3\]": {"x": torch.ones(K, M, dtype=BF16).t()},
    "x is .* on meta": {"x": GOOD["x"].to("meta")},
    "weight is .* torch.float32": {"weight": torch.ones(N, K)},
    r"weight is .* strides \[1, 48\]": {"weight": torch.ones(K, N, dtype=BF16).t()},
    r"the weight is \[47, 64\]: N and K must be even": {"weight": torch.ones(47, K, dtype=BF16)},
    r"the weight is \[48, 80\].* multiple of 32": {"weight": nf4.quantize(torch.ones(N, 80))},
    "the weight is on meta": {"weight": WEIGHT.to("meta")},
    r"lora_a is \[4, 63\]": {"lora_a": torch.ones(R, K - 1)},
    r"lora_a is \[0, 64\]": {"lora_a": torch.ones(0, K), "lora_b": torch.ones(N, 0)},
    "lora_a is .* torch.float16": {"lora_a": torch.ones(R, K).half()},
    r"lora_b is \[48, 5\]": {"lora_b": torch.ones(N, R + 1)},
    r"lora_b is .* torch.bfloat16 .* expected \[48, 4\] in torch.float32": {"lora_b": torch.ones(N, R).bfloat16()},
    "lora_b is .* contiguous": {"lora_b": torch.ones(R, N).t()},
    r"bias is \[47\]": {"bias": torch.ones(N - 1)},
    r"bias is \[48\] torch.bfloat16": {"bias": torch.ones(N, dtype=BF16)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_operands_are_refused(message: str) -> None:
    operands = {**GOOD, **ADAPTERS, **BAD[message]}
    lora = Lora(operands["lora_a"], operands["lora_b"])
    with pytest.raises(ValueError, match=message):
        linear.linear(operands["x"], operands["weight"], lora, operands["bias"], True)


def test_what_gradients_need_is_required() -> None:
    x, weight, lora = GOOD["x"], GOOD["weight"], Lora(ADAPTERS["lora_a"], ADAPTERS["lora_b"])
    h, dy = torch.zeros(M, R), torch.ones(M, N, dtype=BF16)
    bad: list[tuple[str, tuple]] = [
        (r"dy is \[3, 64\]", (x, x, h, weight, lora, True, True, True)),
        ("need the adapters", (dy, x, h, weight, None, True, True, False)),
        (r"dA needs x of \[3, 64\]; got None", (dy, None, h, weight, lora, True, True, True)),
        (r"dA needs x of \[3, 64\]; got \[2, 64\]", (dy, x[1:], h, weight, lora, True, True, True)),
        ("dB needs h", (dy, x, None, weight, lora, True, True, True)),
        (r"h is \[3, 3\]", (dy, x, h[:, 1:], weight, lora, True, True, True)),
        ("h is .* torch.bfloat16", (dy, x, h.bfloat16(), weight, lora, True, True, True)),
        ("p is 1.0", (dy, x, h, weight, lora._replace(seed=torch.tensor([3]), dropout_p=1.0), True, True, True)),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            linear.linear_backward(*arguments)
