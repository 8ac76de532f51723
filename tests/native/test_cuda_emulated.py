"""The CUDA kernels on an emulated GPU: every lane, copy and barrier against the fp64 oracle; how they are laid out."""

import ctypes
import dataclasses
import itertools
import math
import random
import shutil

import pytest
import torch

from bench.machine_code.specimen import SHARED_LIMIT
from fastlora import reference
from fastlora.native import build, cuda
from fastlora.ops import nf4
from tests.support.emulation import Emulation, Operands, compile_objects, link
from tests.support.long_sums import check as check_sum
from tests.support.long_sums import drawn, other
from tests.support.numerics import assert_as_accurate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 2.0
NO_LORA = {"lora_a": None, "lora_b": None}
MACHINES = [(132, 2), (132, 1), (108, 1), (84, 1), (128, 1), (148, 2), (3, 1)]  # multiprocessors, blocks on each
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (512, 3584), (18944, 3584)]
SHAPES += [(1, 64), (33, 320), (4864, 896), (152064, 3584)]  # rows and columns


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    compile_objects(folder, build.source_dir())
    return folder


@pytest.fixture(scope="module")
def gpu(objects):
    return Emulation(link(objects))


def operands(m, k, n, r, dtype, adapter=FP32, blocksize=64, nested=True, bias=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=FP32, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    weight = nf4.quantize(draw(n, k, std=k**-0.5), blocksize, nested)
    a, b = (draw(r, k, dtype=adapter, std=k**-0.5), draw(n, r, dtype=adapter, std=r**-0.5)) if r else (None, None)
    x = draw(m, k, dtype=dtype)
    return Operands(x, weight, a, b, SCALING if r else 0.0, draw(n, dtype=bias) if bias else None)


def expected(given, dtype):
    """y in the reference's arithmetic of `dtype`; the oracle where it is fp64."""
    x, packed, a, b, scaling, bias = given
    codes, *scales = packed.tensors()
    weight = reference.nf4_dequantize(codes, reference.nf4_scales(*scales), packed.shape, packed.blocksize).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if a is None:
        return torch.nn.functional.linear(x.to(dtype), weight, bias)
    a, b = (a.double(), b.double()) if dtype == torch.float64 else (a, b)
    return reference.lora_linear(x.to(dtype), weight, a, b, scaling, bias)


def check(y, given):
    assert y.dtype == given.x.dtype
    assert_as_accurate(y, expected(given, y.dtype), expected(given, torch.float64), "y")


@pytest.mark.parametrize("m", range(1, 17))
def test_emulated_decode_follows_the_oracle(gpu, m):
    dtype, adapter = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)][m % 4]
    given = operands(m, 576, 130, 16, dtype, adapter, bias=dtype)
    check(gpu.decode(given), given)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("m", [2, 5, 16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("k", "n", "blocksize"), [(320, 100, 32), (1088, 133, 64), (2304, 66, 128), (512, 100, 512)])
def test_emulated_shapes_and_scales(gpu, m, k, n, blocksize, dtype, nested):
    given = operands(m, k, n, 5, dtype, FP32, blocksize, nested)
    check(gpu.decode(given), given)


@pytest.mark.parametrize("m", [1, 11])
@pytest.mark.parametrize("r", [0, 1, 3, 40, 70, 256])
def test_emulated_ranks(gpu, m, r):
    given = operands(m, 320, 300, r, BF16, bias=FP32)
    check(gpu.decode(given), given)


@pytest.mark.parametrize("k", [1_024, 200_000])
def test_emulated_long_sums(gpu, k):
    """No warp sums more than a chunk in order: see `long_sums`. x Wᵀ and x Aᵀ in one."""
    x, weight = drawn("drift", 4, k, dtype=BF16), nf4.quantize(other("drift", 16, k), 64, double_quant=False)
    a, b = other("drift", 2, k), torch.ones(16, 2)
    y = gpu.decode(Operands(x, weight, a, b, 1.0, None))
    check_sum("drift", k, y, x, weight.dequantize(FP32) + b @ a)


@pytest.mark.parametrize("m", [1, 3, 16])
def test_any_order_of_threads_and_copies_gives_the_same_bits(gpu, m):
    given = operands(m, 1600, 90, 20, BF16)
    first = gpu.decode(given, lot=1)
    for lot in range(2, 6):
        assert torch.equal(gpu.decode(given, lot=lot), first)


@pytest.mark.parametrize("machine", [(1, 1), (2, 2), (7, 1), (132, 2)])
def test_any_number_of_multiprocessors(gpu, machine):
    given = operands(4, 2816, 70, 33, BF16)
    check(gpu.decode(given, machine=machine), given)


def test_strides_addresses_and_no_tokens(gpu):
    given = operands(3, 128, 64, 8, BF16)
    y = gpu.decode(given)
    wide = torch.zeros(3, 200, dtype=BF16)
    for start in (8, 3):  # a stride that the kernel follows; an address that it cannot take
        x = wide[:, start : start + 128].copy_(given.x)
        gpu.library.emulate_memory(wide.data_ptr(), wide.nbytes, 0)
        assert torch.equal(decode_copying(gpu, given._replace(x=x)), y)
    one = operands(1, 128, 64, 8, BF16)
    odd = torch.as_strided(one.x, (1, 128), (3, 1))  # the stride of a single row means nothing
    assert torch.equal(decode_copying(gpu, one._replace(x=odd)), gpu.decode(one))
    codes = one.weight.codes
    shifted = torch.zeros(codes.numel() + 1, dtype=torch.uint8)[1:].copy_(codes)
    moved = one._replace(weight=dataclasses.replace(one.weight, codes=shifted))
    assert torch.equal(decode_copying(gpu, moved), gpu.decode(one))
    assert gpu.decode(given._replace(x=given.x[:0])).shape == (0, 64)


def decode_copying(gpu, given):
    """As `gpu.decode`, for calls that copy operands into memory of their own."""
    clone, contiguous = torch.Tensor.clone, torch.Tensor.contiguous

    def known(tensor):
        gpu.library.emulate_memory(tensor.data_ptr(), tensor.nbytes, 0)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda *args, **kwargs: known(clone(*args, **kwargs)))
        patch.setattr(torch.Tensor, "contiguous", lambda *args, **kwargs: known(contiguous(*args, **kwargs)))
        patch.setattr(gpu.library, "emulate", lambda *_: None)
        gpu.library.emulate_memory(given.x.data_ptr(), 2 * given.x.shape[0] * max(given.x.stride(0), 128), 0)
        return gpu.decode(given)


MUTATIONS = {
    "a barrier left out": ("block.h", "  sync_block();\n  if (at.warp == turn.warp)", "  if (at.warp == turn.warp)"),
    "a copy not waited for": ("decode.h", "wait_copies<kStages - 2>()", "wait_copies<kStages - 1>()"),
    "operands swapped": ("decode.h", "x[0], x[1], T{}", "x[1], x[0], T{}"),
    "a row beyond the last": ("decode.h", "+ 4 * i, p.shape.rows - 1)", "+ 4 * i, p.shape.rows)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_emulation_can_fail(objects, name, tmp_path):
    file, right, wrong = MUTATIONS[name]
    shutil.copytree(build.source_dir(), tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / file
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    for unchanged in objects.glob("*.o"):
        shutil.copy(unchanged, tmp_path)
    compile_objects(tmp_path, tmp_path / "csrc", "bf16")
    mutant = Emulation(link(tmp_path))
    given = operands(3, 1600, 90, 20, BF16)

    def run():
        for lot in range(1, 6):
            check(mutant.decode(given, lot=lot), given)

    with pytest.raises((AssertionError, RuntimeError), match=r"not finite|error|outside the memory"):
        run()


def test_every_weight_is_taken_once_and_work_is_even(gpu):
    for (rows, cols), machine, m in itertools.product(SHAPES, MACHINES, (1, 16)):
        multiprocessors, each = machine
        ranges, groups, warps, _ = gpu.call("plan", m, rows, cols, 16, *machine, count=4)
        tiles, chunks = math.ceil(rows / 16), math.ceil(cols / 256)
        for count, parts in ((chunks, ranges), (tiles, groups)):
            cut = [gpu.call("part", count, parts, i, count=2) for i in range(parts)]
            assert [begin for begin, _ in cut] + [count] == [0] + [end for _, end in cut]
            assert all(begin < end for begin, end in cut)
        assert 1 <= warps <= 8
        assert warps == math.ceil(chunks / ranges)
        assert ranges * groups <= multiprocessors * each or groups == 1
        busiest = math.ceil(ranges * groups / multiprocessors) * math.ceil(tiles / groups) * warps
        if tiles * chunks >= 16 * multiprocessors and multiprocessors > 3:
            assert busiest * multiprocessors <= 1.25 * tiles * chunks, (rows, cols, machine)


def test_parts_of_h_stay_small(gpu):
    for rank, m in itertools.product((1, 16, 64, 256), (1, 8, 16)):
        ranges, _, _, parts = gpu.call("plan", m, 4096, 14336, rank, 132, 2, count=4)
        assert parts in (1, 2, 4)
        assert parts == 1 or ranges * parts * m * math.ceil(rank / 16) * 16 <= 8192


def banks(offsets, size):
    """How often the busiest bank is accessed, over what the width of the access makes unavoidable."""
    lanes = 128 // size  # served at once
    worst = 0
    for first in range(0, len(offsets), lanes):
        words = [offset // 4 + i for offset in offsets[first : first + lanes] for i in range(size // 4)]
        worst = max(worst, max(sum(word % 32 == bank for word in set(words)) for bank in range(32)))
    return worst


def test_no_two_lanes_share_a_bank(gpu):
    code, sums = gpu.library.code_offset_of, gpu.library.sum_offset_of
    draw = random.Random(0)
    assert banks([gpu.library.table_offset_of(draw.randrange(256), lane) for lane in range(32)], 4) == 1
    for block in range(4):
        columns = [64 * block + gpu.library.first_column_of(0, lane % 4, 0) for lane in range(32)]
        assert banks([code(lane // 4, columns[lane] // 2) for lane in range(32)], 8) == 1
        for h in range(2):
            columns = [64 * block + gpu.library.first_column_of(1, lane % 4, h) for lane in range(32)]
            assert banks([code(lane // 4, columns[lane] // 2) for lane in range(32)], 4) == 1
    for rows in range(0, 16, 4):
        assert banks([code(rows + lane // 8, lane % 8 * 16) for lane in range(32)], 16) == 1
    for i in range(4):
        assert banks([sums(lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2) for lane in range(32)], 4) == 1


def test_layout_has_a_place_for_everything(gpu):
    code, sums, slot = gpu.library.code_offset_of, gpu.library.sum_offset_of, gpu.library.slot_offset_of
    for short in (0, 1):
        first = [gpu.library.first_column_of(short, t, h) for h in range(2) for t in range(4)]
        assert sorted(column + i for column in first for i in range(8)) == list(range(64))
    assert all(gpu.library.first_column_of(1, t, h) // 32 == h for t in range(4) for h in range(2))
    assert sorted(sums(row, token) for row in range(16) for token in range(8)) == list(range(0, 512, 4))
    taken = [gpu.library.table_offset_of(byte, lane) + i for byte in range(256) for lane in range(32) for i in range(4)]
    for stage, warp in itertools.product(range(3), range(8)):
        taken += [slot(stage, warp) + code(row, byte) for row in range(16) for byte in range(128)]
    assert len(taken) == len(set(taken))
    for tokens in (2, 8, 16):
        sums_bytes = 2 * 8 * (2 if tokens > 8 else 1) * 512
        assert max(taken) < gpu.library.shared_bytes_of(tokens) - sums_bytes - 1024  # the levels of nested scales
        assert gpu.library.shared_bytes_of(tokens) <= min(SHARED_LIMIT.values()) * 1024
        assert 2 * (gpu.library.shared_bytes_of(8) + 1024) <= 228 * 1024  # two blocks on a Hopper


@pytest.mark.parametrize(("half", "bits"), [(0, 8), (1, 11)])
def test_rounded_levels_are_nearer_than_rounded_weights(gpu, half, bits):
    """The rms error and the bias of a normally distributed weight, over its rms."""
    gpu.library.rounded_level.restype = ctypes.c_double
    levels = torch.tensor(reference.NF4_CODE, dtype=torch.float64)
    error = torch.tensor([gpu.library.rounded_level(half, i) for i in range(16)], dtype=torch.float64) - levels
    w = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = (
        torch.bincount(nf4._nearest_levels(w.flatten(), w.abs().amax(1), 64, levels).int(), minlength=16) / w.numel()
    )
    size = (share * levels.square()).sum().sqrt()
    assert (share * error.square()).sum().sqrt() / size < 0.6 * 2**-bits / 3**0.5
    assert abs((share * error).sum()) / size < 0.03 * 2**-bits


def test_interfaces_agree(gpu):
    assert gpu.library.sizeof_arguments() == ctypes.sizeof(cuda._Decode)
    header = (build.source_dir() / "fastlora_cuda.h").read_text()
    assert f"#define FASTLORA_CUDA_ABI_VERSION {build.CUDA_ABI_VERSION}\n" in header
    assert gpu.library.fastlora_cuda_abi_version() == build.CUDA_ABI_VERSION


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(17, 128, dtype=BF16)}, "17 tokens"),
        ({"x": torch.zeros(1, 128)}, "float32"),
        ({"x": torch.zeros(128, dtype=BF16)}, r"expected \[M, K\]"),
        ({"x": torch.zeros(1, 192, dtype=BF16)}, "the weight's K = 128"),
        ({"x": torch.zeros(1, 96, dtype=BF16), "weight": (64, 96, 32), **NO_LORA}, "multiples of 64"),
        ({"weight": (64, 128, 256)}, "multiples of 256"),
        ({"weight": (64, 128, 64, "meta")}, "the weight is on meta, expected cpu"),
        ({"lora_a": None}, "go together"),
        ({"lora_b": None}, "go together"),
        ({"lora_b": torch.zeros(64, 7)}, "do not fit a weight"),
        ({"lora_a": torch.zeros(8, 128, dtype=torch.int8)}, "lora_a is torch.int8"),
        ({"bias": torch.zeros(63)}, r"expected \[64\]"),
        ({"bias": torch.zeros(64, dtype=torch.int8)}, "bias is torch.int8"),
    ],
)
def test_what_does_not_fit_is_refused(gpu, changes, message):
    """A weight whose parts do not fit together cannot be made: tests/kernels/test_operands.py."""
    given = operands(1, 128, 64, 8, BF16)
    if "weight" in changes:
        n, k, blocksize, *device = changes["weight"]
        weight = nf4.quantize(torch.ones(n, k), blocksize)
        changes = changes | {"weight": weight.to(*device) if device else weight}
    with pytest.raises(ValueError, match=message):
        gpu.decode(given._replace(**changes))


def test_the_library_refuses_what_python_lets_through(gpu):
    arguments = cuda._Decode(tokens=1)
    for cols, log2, dtype, word in ((96, 6, 1, "multiple of 64"), (128, 8, 1, "blocksize"), (128, 6, 0, "bf16")):
        arguments.weight.rows, arguments.weight.cols, arguments.weight.log2_blocksize = 64, cols, log2
        arguments.x_dtype = dtype
        result = gpu.library.fastlora_cuda_decode(arguments, None)
        assert result < 0
        assert word in cuda._message(gpu.library, result)
        assert gpu.library.fastlora_cuda_decode_workspace(1, 64, cols, log2, 0, dtype, 0) == result
