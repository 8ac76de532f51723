"""NF4 bit for bit: codes, scales and values against bitsandbytes; bad input is named."""

import copy
import io
import itertools
import json
import random

import pytest
import torch
from fastlora.kernels.operands import BLOCKSIZES

from fastlora.ops import nf4
from fastlora.ops.nf4 import NF4Weight, quantize

bnb = pytest.importorskip("bitsandbytes")
BF = bnb.functional
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(64, 64), (128, 256), (33, 70), (5, 7), (1, 4097)]


def weight(shape, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    values[0, : min(3, shape[1])] = 0
    return values.to(dtype)


def bnb_values(codes, state, dtype):
    """What bitsandbytes dequantizes to, by its operators for any device.

    Its compiled CPU kernel is left aside: with AVX-512 it takes the wrong scale where blocks are longer than rows.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = BF.dequantize_blockwise(state.absmax, state.state2) + state.offset
    compute = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    return compute(codes.flatten(), absmax, state.code, state.blocksize, state.shape, dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_codes_and_scales_are_bitsandbytes_own(blocksize, double_quant):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        w = weight(shape, dtype)
        codes, state = BF.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
        ours = quantize(w, blocksize, double_quant)
        assert torch.equal(ours.codes, codes.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        assert ours.nested == double_quant
        if double_quant:
            assert torch.equal(ours.absmax2, state.state2.absmax)
            assert torch.equal(ours.code2, state.state2.code)
            assert torch.equal(ours.offset, state.offset)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_values_are_bitsandbytes_own(path, blocksize, double_quant):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        if path == "triton" and dtype == torch.bfloat16:
            continue  # the interpreter truncates to bf16 where a GPU rounds
        w = weight(shape)
        codes, state = BF.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
        ours = NF4Weight.from_bnb(bnb.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, quant_type="nf4"))
        assert torch.equal(ours.dequantize(dtype), bnb_values(codes, state, dtype))


def test_values_are_those_of_bitsandbytes_compiled_kernel_too():
    w = weight((256, 512))
    codes, state = BF.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(quantize(w).dequantize(dtype), BF.dequantize_4bit(codes, state))


def test_eight_bit_levels_are_bitsandbytes_own():
    assert torch.equal(nf4.dynamic_code(), BF.create_dynamic_map())


def test_quantizing_in_chunks_changes_nothing(monkeypatch):
    w = weight((96, 130))
    whole = quantize(w)
    monkeypatch.setattr(nf4, "_QUANTIZE_CHUNK", 4096)
    parts = quantize(w)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.absmax, parts.absmax)


def test_strided_weights_quantize_by_value():
    w = weight((64, 128))
    assert torch.equal(quantize(w.t().contiguous().t()).codes, quantize(w).codes)


def test_error_of_the_format_is_as_published():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    plain, nested = quantize(w, double_quant=False), quantize(w)
    error = (plain.dequantize() - w).abs().mean().item()
    assert 0.070 < error < 0.075  # mean |error| of N(0, 1) at blocksize 64: bitsandbytes' own tests state 0.0728
    assert abs((nested.dequantize() - w).abs().mean().item() - error) < 1e-3
    assert nested.nbytes < 0.52 * w.numel()


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_round_trip(double_quant):
    ours = quantize(weight((33, 70), torch.bfloat16), double_quant=double_quant)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    back = NF4Weight.from_state_dict(torch.load(buffer))
    assert (back.shape, back.dtype, back.blocksize) == (ours.shape, ours.dtype, ours.blocksize)
    assert torch.equal(back.dequantize(), ours.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_our_state_and_we_read_theirs(double_quant):
    w = weight((64, 128), torch.bfloat16)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=double_quant)
    layer.weight = bnb.nn.Params4bit(w, quant_type="nf4", compress_statistics=double_quant, requires_grad=False)
    layer = layer.to("cpu")
    ours = quantize(w, double_quant=double_quant)
    assert set(layer.state_dict()) == set(ours.state_dict())
    read = NF4Weight.from_state_dict(layer.state_dict())
    assert torch.equal(read.dequantize(), ours.dequantize())
    statistics = {key.removeprefix("weight."): value for key, value in ours.state_dict().items() if key != "weight"}
    theirs = bnb.nn.Params4bit.from_prequantized(ours.state_dict()["weight"], statistics, device="cpu")
    assert torch.equal(BF.dequantize_4bit(theirs.data, theirs.quant_state), ours.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_to_bnb_and_back_shares_memory(double_quant):
    ours = quantize(weight((64, 128), torch.bfloat16), double_quant=double_quant)
    theirs = ours.to_bnb()
    assert torch.equal(BF.dequantize_4bit(theirs.data, theirs.quant_state), ours.dequantize())
    back = NF4Weight.from_bnb(theirs)
    assert back.codes.data_ptr() == ours.codes.data_ptr()
    assert back.absmax.data_ptr() == ours.absmax.data_ptr()


def test_storage_in_another_dtype_is_read_as_bytes():
    w = weight((64, 128), torch.bfloat16)
    codes, state = BF.quantize_4bit(w, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16)
    assert codes.dtype == torch.bfloat16
    theirs = bnb.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, quant_type="nf4")
    assert torch.equal(NF4Weight.from_bnb(theirs).dequantize(), quantize(w).dequantize())


def test_to_moves_and_copies_only_what_moves():
    ours = quantize(weight((64, 128)))
    assert ours.to("cpu") is ours
    meta = ours.to("meta")
    assert meta.device.type == "meta"
    assert meta.shape == ours.shape
    assert torch.equal(copy.deepcopy(ours).codes, ours.codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    w = weight((64, 70))
    w[3, 5] = value
    with pytest.raises(ValueError, match=r"holds -?(nan|inf) at \[3, 5\]"):
        quantize(w)


HUGE = {torch.float32: (1e30, 1e37, 3.4e38), torch.float16: (65504.0,), torch.bfloat16: (1e37, 3.38e38)}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_weight_becomes_finite_numbers(path, dtype, double_quant):
    """Sums of scales, and scales rounded up, would overflow; on each path, and the same bits."""
    if path == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bf16 where a GPU rounds")
    for value, rows in itertools.product(HUGE[dtype], (slice(None), slice(0, 1), slice(None, None, 2), slice(1, None))):
        for sign in (1, -1):
            w = weight((64, 320), dtype)
            w[rows] = (sign * value * torch.linspace(0.99, 1, 320)).to(dtype)
            ours = quantize(w, double_quant=double_quant)
            values = ours.dequantize()
            assert torch.isfinite(values).all(), (value, rows)
            assert (values[rows] - w[rows]).abs().max() <= 0.02 * value, (value, rows)


def test_a_mean_that_does_not_overflow_is_torchs():
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e34
    assert torch.equal(nf4._mean(absmax), absmax.mean())
    biggest = torch.full((3000,), torch.finfo(torch.float32).max)
    assert nf4._mean(biggest) == biggest[0]
    torch.testing.assert_close(nf4._mean(absmax * 3e4), absmax.mean() * 3e4)


@pytest.mark.parametrize("lowest", [0.0, 1.0])
def test_a_level_above_the_largest_number_is_lowered(path, lowest):
    """One low scale among many of the largest number, near which levels are closer than the grid they are found on."""
    largest = torch.finfo(torch.float32).max
    w = torch.full((4, 64 * 10_000), largest)
    w[0, :64] = lowest
    assert torch.isfinite(quantize(w).dequantize()).all()


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), {}, "fp32, fp16 and bf16, not torch.float64"),
        (torch.zeros(4, 4, dtype=torch.int8), {}, "not torch.int8"),
        (torch.zeros(4), {}, r"weight \[N, K\]"),
        (torch.zeros(0, 4), {}, "at least one value"),
        (torch.zeros(4, 4), {"blocksize": 48}, "blocksize must be one of 32, 64"),
    ],
)
def test_bad_weights_are_named(w, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(w, **options)


def test_zero_weights_survive():
    assert torch.equal(quantize(torch.zeros(4, 64)).dequantize(), torch.zeros(4, 64))


def test_fp4_is_refused():
    codes, state = BF.quantize_4bit(weight((64, 64)), quant_type="fp4")
    fp4 = bnb.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, quant_type="fp4")
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='nf4'"):
        NF4Weight.from_bnb(fp4)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="only nf4 is supported"):
        NF4Weight.from_state_dict(layer.state_dict())


def test_a_weight_repacked_for_cpu_inference_is_refused():
    ours = quantize(weight((64, 64))).to_bnb()
    ours.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked this weight for CPU inference"):
        NF4Weight.from_bnb(ours)


def test_an_unquantized_weight_is_refused():
    with pytest.raises(ValueError, match="not quantized yet"):
        NF4Weight.from_bnb(bnb.nn.Params4bit(torch.zeros(4, 4)))


def test_a_state_with_parts_missing_is_refused():
    state = quantize(weight((64, 64))).state_dict()
    del state["weight.nested_absmax"]
    with pytest.raises(ValueError, match=r"lacks weight\.nested_absmax"):
        NF4Weight.from_state_dict(state)
    with pytest.raises(ValueError, match=r"no 'weight\.quant_state"):
        NF4Weight.from_state_dict({"weight": state["weight"]})


def facts_of(state):
    return json.loads(bytes(state[nf4._STATE_KEY].tolist()))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_state_whose_scales_are_not_finite_is_refused(path, double_quant):
    parts = ("absmax2", "code2", "offset") if double_quant else ("absmax",)
    for part, value in itertools.product(parts, (torch.nan, torch.inf, -torch.inf)):
        damaged = quantize(weight((64, 64)), double_quant=double_quant)
        getattr(damaged, part).fill_(value)
        with pytest.raises(ValueError, match=r"the scale of block 0 .* is -?(nan|inf): the checkpoint is damaged"):
            NF4Weight.from_state_dict(damaged.state_dict())
        assert not torch.isfinite(damaged.dequantize()).all()  # it shows, and nothing is read outside


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-64, -64]},
        {"shape": [64]},
        {"shape": [64.0, 64.0]},
        {"shape": "ab"},
        {"shape": [10**30, 64]},
        {"dtype": "load"},
        {"dtype": None},
        {"dtype": "float64"},
        {"blocksize": 64.0},
        {"blocksize": 0},
        {"blocksize": None},
        {"nested_offset": "0"},
        {"nested_blocksize": None},
    ],
    ids=str,
)
def test_facts_that_make_no_weight_are_refused(change):
    state = quantize(weight((64, 64))).state_dict()
    state[nf4._STATE_KEY] = torch.tensor(list(json.dumps(facts_of(state) | change).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"NF4 weight|blocksize must be|nested scales"):
        NF4Weight.from_state_dict(state)


def test_a_description_without_end_is_refused():
    state = quantize(weight((64, 64))).state_dict()
    state[nf4._STATE_KEY] = torch.full((200_000,), ord("["), dtype=torch.uint8)
    with pytest.raises(ValueError, match="of an NF4 weight cannot be read"):
        NF4Weight.from_state_dict(state)


def test_whatever_bytes_arrive_make_a_weight_or_a_value_error():
    generator = random.Random(0)
    for _ in range(300):
        state = {key: value.clone() for key, value in quantize(weight((64, 64))).state_dict().items()}
        for _ in range(generator.randint(1, 4)):
            part = state[generator.choice(list(state))].view(torch.uint8)
            part.view(-1)[generator.randrange(part.numel())] = generator.randrange(256)
        try:
            read = NF4Weight.from_state_dict(state)
        except ValueError:
            continue
        assert torch.isfinite(read.dequantize(torch.float32)).all()


def test_other_levels_are_refused():
    state = quantize(weight((64, 64))).state_dict()
    state["weight.quant_map"] = state["weight.quant_map"].bfloat16()
    assert NF4Weight.from_state_dict(state).shape == (64, 64)
    state["weight.quant_map"] = state["weight.quant_map"].flip(0)
    with pytest.raises(ValueError, match="other levels than NF4's"):
        NF4Weight.from_state_dict(state)


def test_parts_that_do_not_fit_are_refused():
    ours = quantize(weight((64, 64)))
    with pytest.raises(ValueError, match="codes of an NF4 weight"):
        NF4Weight(ours.codes[:-1], ours.absmax, ours.shape, ours.dtype, 64, ours.absmax2, ours.code2, ours.offset)
    with pytest.raises(ValueError, match="absmax2, code2 and offset together"):
        NF4Weight(ours.codes, ours.absmax, ours.shape, ours.dtype, 64, ours.absmax2)
    with pytest.raises(ValueError, match="absmax of an NF4 weight"):
        NF4Weight(ours.codes, ours.absmax, ours.shape, ours.dtype, 64)


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("k", [64, 192, 4096])
def test_rows_are_weights_of_their_own(k, double_quant):
    weight = nf4.quantize(torch.randn(40, k, generator=torch.Generator().manual_seed(0)), double_quant=double_quant)
    whole = weight.dequantize()
    for begin, end in ((0, 40), (0, 7), (4, 20), (33, 40)):
        part = weight.rows(begin, end)
        assert torch.equal(part.dequantize(), whole[begin:end])
        assert part.codes.data_ptr() == weight.codes.data_ptr() + begin * k // 2
    assert weight.rows(9, 9).shape == (0, k)
    assert weight.rows(4, 20).nested is (double_quant and k == 4096)  # 4 rows hold a whole run of 256 scales
    uneven = nf4.quantize(torch.randn(6, 96))
    assert torch.equal(uneven.rows(2, 6).dequantize(), uneven.dequantize()[2:])
    for begin, end in ((1, 6), (0, 3), (-1, 2), (2, 8)):
        with pytest.raises(ValueError, match="do not consist of whole blocks of 64"):
            uneven.rows(begin, end)
