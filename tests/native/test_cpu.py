"""The compiled CPU library: bits of the format, accuracy of the products, every instruction set of this machine."""

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastlora.kernels.operands import Packed
from torch import Tensor

from fastlora.native import build, cpu
from fastlora.reference import NF4_CODE
from tests.support.numerics import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NF4 = torch.tensor(NF4_CODE)

loaded = pytest.mark.skipif(not cpu.status()[0], reason=cpu.status()[1])
pytestmark = pytest.mark.usefixtures("one_thread")


def random_weight(n: int, k: int, blocksize: int = 64, nested: bool = True, seed: int = 0) -> Packed:
    g = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // blocksize)
    codes = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, generator=g)
    if not nested:
        return Packed(codes, torch.rand(blocks, generator=g) + 0.1, (n, k), torch.float32, blocksize)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
    second = torch.rand(-(-blocks // 256), generator=g) * 0.1, torch.linspace(-1, 1, 256), torch.tensor(0.1234567)
    return Packed(codes, absmax, (n, k), torch.float32, blocksize, *second)


def scales(w: Packed) -> Tensor:
    if w.absmax2 is None or w.code2 is None or w.offset is None:
        return w.absmax
    products = w.code2[w.absmax.int()] * w.absmax2.repeat_interleave(256)[: w.absmax.numel()]
    return products + w.offset


def reference(w: Packed, n: int, k: int) -> Tensor:
    """[n, k] fp32, by the format's definition."""
    q = torch.stack([w.codes >> 4, w.codes & 15], dim=1).reshape(-1)[: n * k]
    return (NF4[q.int()] * scales(w).repeat_interleave(w.blocksize)[: n * k]).reshape(n, k)


def dequantize(w: Packed, n: int, k: int, dtype: torch.dtype, *adapter: Tensor | float) -> Tensor:
    out = torch.full((n, k), torch.nan, dtype=dtype)
    cpu.nf4_dequantize(w, out, *adapter)  # type: ignore[arg-type]
    return out


def test_loaded_wherever_there_is_a_compiler() -> None:
    try:
        build.find_compiler()
    except build.BuildError:
        pytest.skip("no compiler here")
    assert cpu.status()[0], cpu.status()[1]


# K that is not a multiple of the block, odd N*K, less than one group, several jobs of the thread pool.
SHAPES = [(1, 1), (1, 31), (3, 33), (7, 96), (5, 130), (64, 64), (33, 257), (300, 512), (129, 1030)]


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_dequantize_bits(isa: str, blocksize: int, nested: bool) -> None:
    for n, k in SHAPES:
        w = random_weight(n, k, blocksize, nested)
        expected = reference(w, n, k)
        for dtype in DTYPES:
            assert torch.equal(dequantize(w, n, k, dtype), expected.to(dtype)), (n, k, dtype)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(64, 128, 64), (31, 512, 128), (7, 96, 32), (5, 2048, 1024)])
def test_dequantize_is_bitsandbytes(isa: str, n: int, k: int, blocksize: int, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    codes, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    codes = codes.view(-1)
    second = (state.state2.absmax, state.state2.code, state.offset) if nested else (None, None, None)
    for dtype in DTYPES:
        state.dtype = dtype
        ours = dequantize(Packed(codes, state.absmax, (n, k), torch.float32, blocksize, *second), n, k, dtype)
        assert torch.equal(ours, functional.dequantize_4bit(codes, state)), dtype


@pytest.mark.parametrize("absmax", [1e6, 65520.0, 3e-5, 2e-7, 1e-39, torch.inf, -torch.inf, torch.nan])
def test_rounding_at_the_edges_of_each_format(isa: str, absmax: float) -> None:
    w = dataclasses.replace(random_weight(8, 64, nested=False), absmax=torch.full((8,), absmax))
    for dtype in DTYPES:
        ours, expected = dequantize(w, 8, 64, dtype), reference(w, 8, 64).to(dtype)
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(0.5), expected.nan_to_num(0.5))


def adapters(n: int, k: int, r: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(r)
    return torch.randn(r, k, generator=g) / k**0.5, torch.randn(n, r, generator=g) / r**0.5


@pytest.mark.parametrize("r", [1, 3, 16, 64, 256])
def test_merge_is_one_rounding_from_exact(isa: str, r: int) -> None:
    for n, k in [(1, 1), (3, 33), (7, 96), (33, 257), (66, 192)]:
        w, (a, b), scaling = random_weight(n, k), adapters(n, k, r), 2.0
        base = reference(w, n, k).double()
        oracle = base + scaling * (b.double() @ a.double())
        magnitude = base.abs() + scaling * (b.double().abs() @ a.double().abs())
        for dtype in DTYPES:
            ours = dequantize(w, n, k, dtype, a, b, scaling)
            allowed = torch.finfo(dtype).eps / 2 * oracle.abs() + (r + 2) * 2.0**-24 * magnitude
            if dtype is torch.float16:
                allowed += 2.0**-25  # half the smallest subnormal
            assert ((ours.double() - oracle).abs() <= allowed).all(), (n, k, dtype)


def test_merge_rounds_its_fp32_value_once(isa: str) -> None:
    n, k = 40, 200
    w, (a, b) = random_weight(n, k), adapters(n, k, 16)
    exact = dequantize(w, n, k, torch.float32, a, b, 0.5)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(w, n, k, dtype, a, b, 0.5), exact.to(dtype))


def test_merge_of_nothing_is_the_weight(isa: str) -> None:
    w, (a, b) = random_weight(20, 100), adapters(20, 100, 4)
    assert torch.equal(
        dequantize(w, 20, 100, torch.bfloat16, a, torch.zeros_like(b), 2.0), reference(w, 20, 100).bfloat16()
    )
    assert torch.equal(dequantize(w, 20, 100, torch.bfloat16, a, b, 0.0), reference(w, 20, 100).bfloat16())


PRODUCTS = {"gemv": cpu.nf4_gemv, "gemv_t": cpu.nf4_gemv_t}


def product(name: str, x: Tensor, w: Packed, n: int, k: int) -> Tensor:
    out = torch.full((x.shape[0], n if name == "gemv" else k), torch.nan, dtype=x.dtype)
    PRODUCTS[name](x, w, out)
    return out


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_as_accurate_as_fp32(isa: str, name: str, dtype: torch.dtype) -> None:
    for n, k in [(1, 1), (5, 130), (64, 64), (37, 1031), (700, 96)]:
        w = random_weight(n, k)
        weight = reference(w, n, k) if name == "gemv_t" else reference(w, n, k).T
        for m in (1, 2, 3, 4, 7, 16, 17):
            x = torch.randn(m, weight.shape[0], generator=torch.Generator().manual_seed(m)).to(dtype)
            oracle = x.double() @ weight.double()
            # The baseline has one rounding to dtype, as ours has, and fp32 sums.
            baseline = (x.float() @ weight).to(dtype)
            error = (product(name, x, w, n, k).double() - oracle).abs()
            sums = 2.0**-24 * weight.shape[0] * (x.double().abs() @ weight.double().abs())
            assert (error <= torch.finfo(dtype).eps / 2 * oracle.abs() + sums + 2.0**-25).all(), (n, k, m)
            if m * n * k > 10_000:
                assert_as_accurate(product(name, x, w, n, k), baseline, oracle, f"{name} {m}x{n}x{k}")


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_widen_every_half(isa: str, name: str) -> None:
    """A weight of one +1 passes x through: all fp16 and bf16 values, including subnormals and infinities."""
    w = Packed(torch.tensor([0xF0], dtype=torch.uint8), torch.ones(1), (1, 1), torch.float32, 64)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[:, None]
        out = torch.cat([product(name, part, w, 1, 1) for part in x.split(4096)])
        assert torch.equal(out.isnan(), x.isnan())
        # x times 1, summed from +0: only the sign of zero is lost.
        assert torch.equal(out.nan_to_num(0.5), x.nan_to_num(0.5))


def test_threads_do_not_change_the_bits(isa: str) -> None:
    n, k = 700, 1030
    w, (a, b), x, dy = random_weight(n, k), adapters(n, k, 8), torch.randn(3, k), torch.randn(3, n)

    def everything() -> list[Tensor]:
        merged = dequantize(w, n, k, torch.bfloat16, a, b, 2.0)
        return [dequantize(w, n, k, torch.float32), merged, product("gemv", x, w, n, k), product("gemv_t", dy, w, n, k)]

    alone = everything()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for one, other in zip(alone, everything(), strict=True))


@loaded
def test_calls_from_several_threads() -> None:
    def job(seed: int) -> bool:
        w = random_weight(300, 512, seed=seed)
        return torch.equal(dequantize(w, 300, 512, torch.float32), reference(w, 300, 512))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(16)))


@loaded
def test_works_in_a_forked_child() -> None:
    """The OpenMP threads the parent used do not exist in its child."""
    script = """
        import os, torch
        from fastlora.kernels.operands import Packed
        from fastlora.native import cpu
        torch.set_num_threads(2)
        codes, absmax = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8), torch.rand(1 << 13)
        def values():
            out = torch.empty(512, 1024)
            cpu.nf4_dequantize(Packed(codes, absmax, (512, 1024), torch.float32, 64), out)
            return out.numpy().tobytes()
        before = values()
        child = os.fork()
        if child == 0:
            os._exit(0 if values() == before else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert values() == before
    """
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60, cwd=root)


@loaded
def test_empty() -> None:
    for n, k in [(0, 5), (5, 0), (0, 0)]:
        w = random_weight(n, k)
        assert dequantize(w, n, k, torch.bfloat16).shape == (n, k)
        assert dequantize(w, n, k, torch.bfloat16, torch.ones(2, k), torch.ones(n, 2), 1.0).shape == (n, k)
        assert torch.equal(product("gemv", torch.ones(3, k), w, n, k), torch.zeros(3, n))
        assert torch.equal(product("gemv_t", torch.ones(3, n), w, n, k), torch.zeros(3, k))
    w = random_weight(4, 8)
    assert product("gemv", torch.ones(0, 8), w, 4, 8).shape == (0, 4)


N, K = 6, 64
GOOD = random_weight(N, K)


@loaded
def test_a_weight_elsewhere_is_refused() -> None:
    w = Packed(*(t if not isinstance(t, Tensor) else t.to("meta") for t in vars(GOOD).values()))
    out, y, dx = torch.zeros(N, K), torch.zeros(2, N), torch.zeros(2, K)
    with pytest.raises(ValueError, match=r"the weight is on meta.*move it with \.cpu"):
        cpu.nf4_dequantize(w, out)
    with pytest.raises(ValueError, match="the weight is on meta"):
        cpu.nf4_gemv(torch.ones(2, K), w, y)
    with pytest.raises(ValueError, match="the weight is on meta"):
        cpu.nf4_gemv_t(torch.ones(2, N), w, dx)
    assert not any(t.any() for t in (out, y, dx))


@loaded
@pytest.mark.parametrize(
    ("part", "change"),
    [(part, lambda old: old[: len(old) // 2]) for part in ("codes", "absmax", "absmax2", "code2")]
    + [("absmax", lambda old: old.float())],
)
def test_a_weight_with_other_data_in_a_part_is_refused(part: str, change) -> None:
    """`NF4Weight` is frozen, but the `.data` of its tensors is not."""
    w = random_weight(N, K)
    tensor = getattr(w, part)
    tensor.data = change(tensor)
    with pytest.raises(ValueError, match=f"{part} of an NF4 weight"):
        cpu.nf4_dequantize(w, torch.zeros(N, K))


@loaded
@pytest.mark.parametrize("part", ["codes", "absmax", "absmax2", "code2", "offset"])
def test_a_weight_whose_memory_has_been_freed_is_refused(part: str) -> None:
    """As FSDP frees what it will gather again: its address is null."""
    w = random_weight(N, K)
    getattr(w, part).untyped_storage().resize_(0)
    out = torch.zeros(N, K)
    with pytest.raises(ValueError, match="has been freed"):
        cpu.nf4_dequantize(w, out)
    with pytest.raises(ValueError, match="has been freed"):
        cpu.nf4_gemv(torch.ones(2, K), w, torch.zeros(2, N))
    assert not out.any()


@loaded
def test_bad_operands_are_refused() -> None:
    a, b, out = torch.ones(2, K), torch.ones(N, 2), torch.zeros(N, K)
    bad: list[tuple[str, tuple]] = [
        ("lora_a and lora_b go together", (out, a)),
        ("lora_a is torch.float16", (out, a.half(), b)),
        ("lora_b is not contiguous", (out, a, torch.ones(2, N).T)),
        ("do not fit a weight", (out, a[:1], b)),
        ("R at least 1", (out, a[:0], b[:, :0])),
        ("out is torch.float64", (out.double(),)),
        ("out has shape", (out.flatten(),)),
        ("out is not contiguous", (torch.zeros(K, N).T,)),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            cpu.nf4_dequantize(GOOD, *arguments)
    assert not out.any()
    with pytest.raises(ValueError, match="x has 2 rows and out has 3"):
        cpu.nf4_gemv(torch.ones(2, K), GOOD, torch.zeros(3, N))
    with pytest.raises(ValueError, match=r"x \[2, 63\] and out \[2, 6\]: with this weight they must have 64 and 6"):
        cpu.nf4_gemv(torch.ones(2, K - 1), GOOD, torch.zeros(2, N))
    with pytest.raises(ValueError, match="must have 6 and 64 columns"):
        cpu.nf4_gemv_t(torch.ones(2, N), GOOD, torch.zeros(2, N))
    with pytest.raises(ValueError, match=r"out is \[6, 32\], but the weight is \[6, 64\]"):
        cpu.nf4_dequantize(GOOD, torch.zeros(N, K // 2))


@loaded
def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CPU_ISA", "avx1024")
    assert not cpu.status()[0]
    with pytest.raises(ValueError, match=r"FASTLORA_CPU_ISA='avx1024': this machine has portable"):
        cpu.nf4_dequantize(GOOD, torch.zeros(N, K))


@pytest.fixture
def fresh_load() -> Iterator[None]:
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


@pytest.mark.usefixtures("fresh_load")
def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "library_path", lambda: tmp_path / "none.so")
    live, reason = cpu.status()
    assert not live
    assert "none.so has not been built" in reason
    assert build.REBUILD in reason
    assert cpu.isas() == ()
    with pytest.raises(RuntimeError, match="has not been built"):
        cpu.nf4_dequantize(GOOD, torch.zeros(N, K))


@loaded
@pytest.mark.usefixtures("fresh_load")
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    version = build.ABI_VERSION
    monkeypatch.setattr(build, "ABI_VERSION", version + 1)
    live, reason = cpu.status()
    assert not live
    assert f"is stale: it has interface {version}, this fastlora needs {version + 1}" in reason
    assert build.REBUILD in reason


@pytest.mark.usefixtures("fresh_load")
def test_a_file_that_is_not_a_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(build, "library_path", lambda: path)
    live, reason = cpu.status()
    assert not live
    assert "cannot be loaded" in reason
