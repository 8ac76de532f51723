"""A packed weight refuses to be made of parts that do not fit, so that no launcher needs to check them again."""

import dataclasses
import itertools

import pytest
import torch
from fastlora.kernels.operands import LEVELS, Lora, Packed, check_product, level_table

from fastlora import reference
from fastlora.ops import nf4

NESTED = ("absmax2", "code2", "offset")


def parts_of(nested=True, n=33, k=501, blocksize=64):
    """Arguments of a valid weight, whose last byte, block and run of scales are not full."""
    weight = nf4.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), blocksize, nested)
    return {field.name: getattr(weight, field.name) for field in dataclasses.fields(Packed)}


def apart(tensor):
    """The same values, every other one in memory."""
    return tensor.view(-1).repeat_interleave(2)[::2]


def grown(tensor):
    """One element more."""
    return torch.cat((tensor.view(-1), tensor.view(-1)[:1]))


def shorter(tensor):
    """One element less."""
    return tensor.view(-1)[1:]


def test_the_levels_are_those_of_the_oracle():
    assert LEVELS == reference.NF4_CODE
    table = level_table(torch.device("cpu"))
    assert table.dtype == torch.float32
    assert table.tolist() == list(LEVELS)
    assert level_table(torch.device("cpu")) is table, "one copy a device"


@pytest.mark.parametrize("kind", [Packed, nf4.NF4Weight])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(33, 501, 64), (5, 7, 4096), (300, 64, 32), (0, 64, 64)])
def test_parts_that_fit_make_a_weight(kind, nested, n, k, blocksize):
    blocks = -(n * k // -blocksize)
    parts = {
        "codes": torch.zeros(-(n * k // -2), dtype=torch.uint8),
        "absmax": torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32),
        "absmax2": torch.zeros(-(blocks // -256)) if nested else None,
        "code2": torch.zeros(256) if nested else None,
        "offset": torch.zeros(()) if nested else None,
    }
    weight = kind(**parts, shape=(n, k), dtype=torch.bfloat16, blocksize=blocksize)
    assert weight.nested == nested
    assert weight.device == torch.device("cpu")
    assert all(found is part for found, part in zip(weight.tensors(), parts.values(), strict=True))


def test_codes_may_be_at_any_address():
    parts = parts_of()
    shifted = torch.empty(parts["codes"].numel() + 1, dtype=torch.uint8)[1:].copy_(parts["codes"])
    assert Packed(**{**parts, "codes": shifted}).codes is shifted


@pytest.mark.parametrize("change", [apart, grown, shorter, torch.Tensor.half])
@pytest.mark.parametrize("nested", [True, False])
def test_a_part_of_another_size_dtype_or_layout_is_named(nested, change):
    parts = parts_of(nested)
    for name in ("codes", "absmax", *NESTED * nested):
        if (name, change) == ("offset", apart):
            continue  # a single element has no layout
        with pytest.raises(ValueError, match=rf"^{name} of an NF4 weight \[33, 501\] with blocksize 64 must be"):
            Packed(**{**parts, name: change(parts[name])})


def test_the_message_says_what_was_expected_and_what_came():
    parts = parts_of()
    with pytest.raises(ValueError, match=r"codes .* 8267 x torch.uint8 on cpu; got 8266 x torch.uint8 on cpu$"):
        Packed(**{**parts, "codes": parts["codes"][1:]})
    with pytest.raises(ValueError, match=r"code2 .* 256 x torch.float32 on cpu; got .* on cpu, not contiguous$"):
        Packed(**{**parts, "code2": apart(parts["code2"])})


@pytest.mark.parametrize("nested", [True, False])
def test_scales_of_the_other_kind_are_refused(nested):
    parts, other = parts_of(nested), parts_of(not nested)
    with pytest.raises(ValueError, match=r"^absmax of an NF4 weight"):
        Packed(**{**parts, "absmax": other["absmax"]})


@pytest.mark.parametrize("name", ["absmax", *NESTED])
def test_parts_on_different_devices_are_refused(name):
    parts = parts_of()
    with pytest.raises(ValueError, match=rf"^{name} of an NF4 weight .* on cpu; got .* on meta"):
        Packed(**{**parts, name: parts[name].to("meta")})
    with pytest.raises(ValueError, match=r"^absmax of an NF4 weight .* on meta; got .* on cpu"):
        Packed(**{**parts, "codes": parts["codes"].to("meta")})


@pytest.mark.parametrize("missing", [*itertools.combinations(NESTED, 1), *itertools.combinations(NESTED, 2)])
def test_half_given_nested_scales_are_refused(missing):
    with pytest.raises(ValueError, match="nested NF4 scales need absmax2, code2 and offset together"):
        Packed(**{**parts_of(), **dict.fromkeys(missing)})


@pytest.mark.parametrize("blocksize", [-64, 0, 1, 16, 48, 96, 8192])
def test_an_unknown_blocksize_is_refused(blocksize):
    with pytest.raises(ValueError, match=f"blocksize must be one of 32, 64, .*, 4096; got {blocksize}"):
        Packed(**{**parts_of(), "blocksize": blocksize})


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 128])
def test_a_blocksize_that_the_parts_do_not_have_is_refused(blocksize, nested):
    with pytest.raises(ValueError, match=f"^absmax of an NF4 weight .* with blocksize {blocksize} must be"):
        Packed(**{**parts_of(nested), "blocksize": blocksize})


@pytest.mark.parametrize("shape", [(33, 499), (34, 501), (501, 34)])
def test_a_shape_that_the_parts_do_not_have_is_refused(shape):
    with pytest.raises(ValueError, match=rf"^codes of an NF4 weight \[{shape[0]}, {shape[1]}\]"):
        Packed(**{**parts_of(), "shape": shape})


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype of an NF4 weight must be fp32, fp16 or bf16, not {dtype}"):
        Packed(**{**parts_of(), "dtype": dtype})


def test_a_weight_is_checked_again_when_a_part_is_replaced_and_never_changed_in_place():
    weight = nf4.quantize(torch.randn(33, 501))
    halved = dataclasses.replace(weight, dtype=torch.float16)
    assert isinstance(halved, nf4.NF4Weight)
    assert halved.codes is weight.codes
    with pytest.raises(ValueError, match=r"^codes of an NF4 weight"):
        dataclasses.replace(weight, codes=weight.codes[1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.codes = weight.codes[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(64)}, r"x is \[64\], expected \[M, K\]"),
        ({"x": torch.zeros(3, 32)}, "the weight's K = 64"),
        ({"x": torch.zeros(3, 64, device="meta")}, "the weight is on cpu, expected meta"),
        ({"lora_a": None}, "go together"),
        ({"lora_b": None}, "go together"),
        ({"lora_a": torch.zeros(4, 63)}, r"expected \[R, 64\] and \[40, R\]"),
        ({"lora_b": torch.zeros(40, 5)}, r"lora_b \[40, 5\] do not fit a weight of \[40, 64\]"),
        ({"lora_b": torch.zeros(39, 4)}, "do not fit"),
        ({"bias": torch.zeros(64)}, r"bias has shape \[64\], expected \[40\]"),
        ({"bias": torch.zeros(1, 40)}, "bias has shape"),
    ],
)
def test_operands_of_a_product_that_do_not_fit_are_refused(change, message):
    given = {"x": torch.zeros(3, 64), "weight": nf4.quantize(torch.ones(40, 64))}
    given |= {"lora_a": torch.zeros(4, 64), "lora_b": torch.zeros(40, 4), "bias": torch.zeros(40)}
    check_product(**given)
    check_product(given["x"], given["weight"], None, None, None)
    with pytest.raises(ValueError, match=message):
        check_product(**given | change)


def test_the_dtype_of_a_pair_is_fp32_where_either_has_it():
    fp32, bf16 = torch.float32, torch.bfloat16
    for a, b, expected in ((bf16, bf16, bf16), (fp32, bf16, fp32), (bf16, fp32, fp32), (fp32, fp32, fp32)):
        pair = Lora(torch.zeros(4, 64, dtype=a), torch.zeros(40, 4, dtype=b))
        assert pair.dtype == expected
        assert pair.r == 4
