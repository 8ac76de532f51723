"""NF4 weights: packed codes and their scales, bit for bit as in bitsandbytes.

A weight [N, K] is cut, flat, into blocks of `blocksize` values. A block keeps its largest magnitude
(`absmax`) and, for each value, the index of the nearest of sixteen levels, two indices a byte, the
first in the high nibble. With double quantization the scales are quantized too: their mean is
subtracted (`offset`), and each run of 256 shares a second-level scale (`absmax2`) over 8-bit levels
(`code2`). At blocksize 64 that is 4.13 bits a weight.

bitsandbytes is needed only to read and write its own objects.
Source: arXiv:2305.14314, section 3; arXiv:2110.02861 (the 8-bit levels).
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from fastlora import reference
from fastlora.kernels.operands import FLOAT_DTYPES, LEVELS, SCALES_A_RUN, Packed, check_blocksize, level_table
from fastlora.native.quantize import TABLE_STEPS, nf4_quantize, quantize_scales
from fastlora.ops.backend import backend
from fastlora.ops.dequantize import nf4_dequantize

_STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
_QUANTIZE_CHUNK = 1 << 22  # weights expanded at a time: bounds the memory of quantize()


@final
class NF4Weight(Packed):
    __doc__ = Packed.__doc__

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(tensor.nbytes for tensor in self.tensors() if tensor is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in `dtype` (default: that before quantization), rounded once from fp32."""
        dtype = dtype or self.dtype
        _check_float_dtype(dtype)
        return nf4_dequantize(self, dtype)

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device; itself if nothing moves."""
        moved = {
            name: value.to(device)
            for name in ("codes", "absmax", "absmax2", "code2", "offset")
            if (value := getattr(self, name)) is not None
        }
        if all(value is getattr(self, name) for name, value in moved.items()):
            return self
        return replace(self, **moved)

    def rows(self, begin: int, end: int) -> "NF4Weight":
        """Rows [begin, end) as a weight of their own.

        Codes share the memory of this weight, and so do the scales, except nested ones with no run of 256 that begins
        at `begin`: those are expanded to fp32.

        Raises:
            ValueError: a block of values crosses `begin` or `end`.
        """
        n, k = self.shape
        if not 0 <= begin <= end <= n or begin * k % self.blocksize or (end * k % self.blocksize and end != n):
            raise ValueError(
                f"rows [{begin}, {end}) of an NF4 weight {[n, k]} do not consist of whole blocks of {self.blocksize}"
            )
        first, last = begin * k // self.blocksize, -(end * k // -self.blocksize)
        codes, absmax = self.codes[begin * k // 2 : -(end * k // -2)], self.absmax[first:last]
        part: dict[str, Any] = {"codes": codes, "shape": (end - begin, k)}
        if self.absmax2 is None:
            return replace(self, absmax=absmax, **part)
        run, phase = divmod(first, SCALES_A_RUN)
        absmax2 = self.absmax2[run : -(last // -SCALES_A_RUN)]
        if phase == 0:
            return replace(self, absmax=absmax, absmax2=absmax2, **part)
        scales = reference.nf4_scales(absmax, absmax2, self.code2, self.offset, phase)
        return replace(self, absmax=scales, absmax2=None, code2=None, offset=None, **part)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors under the names under which bitsandbytes' `Linear4bit` saves them: `weight`, `weight.absmax`, ..."""
        state: dict[str, Tensor] = {
            "weight": self.codes.view(-1, 1),
            "weight.absmax": self.absmax,
            "weight.quant_map": torch.tensor(LEVELS, dtype=torch.float32, device=self.device),
        }
        facts: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.absmax2 is not None and self.code2 is not None and self.offset is not None:
            state["weight.nested_absmax"] = self.absmax2
            state["weight.nested_quant_map"] = self.code2
            facts |= {
                "nested_blocksize": SCALES_A_RUN,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
        state[_STATE_KEY] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=self.device)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "NF4Weight":
        """The inverse of `state_dict()`; also reads what bitsandbytes saved.

        Raises:
            ValueError: a key is missing, the weight is fp4, the parts do not fit together, or a scale is not finite.
        """
        if _STATE_KEY not in state:
            other = [key for key in state if "bitsandbytes__" in key]
            found = f"found {other[0]!r}: only nf4 is supported" if other else f"keys are {sorted(state)}"
            raise ValueError(f"no {_STATE_KEY!r} in the state of an NF4 weight; {found}")
        facts = _facts_of(state[_STATE_KEY])
        nested = "nested_offset" in facts
        needed = ["weight", "weight.absmax"] + ["weight.nested_absmax", "weight.nested_quant_map"] * nested
        missing = [key for key in needed if key not in state]
        if missing:
            raise ValueError(f"the state of an NF4 weight lacks {', '.join(missing)}")
        _check_nested_blocksize(facts.get("nested_blocksize", SCALES_A_RUN))
        if "weight.quant_map" in state and not _are_levels(state["weight.quant_map"]):
            raise ValueError("weight.quant_map holds other levels than NF4's: only nf4 is supported")
        codes = state["weight"].contiguous().flatten().view(torch.uint8)
        n, k = facts["shape"]
        weight = cls(
            codes=codes,
            absmax=state["weight.absmax"].flatten(),
            shape=(n, k),
            dtype=getattr(torch, facts["dtype"], None),
            blocksize=facts["blocksize"],
            absmax2=state["weight.nested_absmax"].flatten() if nested else None,
            code2=state["weight.nested_quant_map"].flatten() if nested else None,
            offset=torch.tensor(facts["nested_offset"], dtype=torch.float32, device=codes.device) if nested else None,
        )
        scales = reference.nf4_scales(*weight.tensors()[1:])
        if not torch.isfinite(scales).all():
            block = int(torch.isfinite(scales).logical_not().nonzero()[0])
            raise ValueError(
                f"the scale of block {block} of an NF4 weight {[n, k]} is {scales[block].item()}: the checkpoint is "
                "damaged; get it again, or quantize the original weight again"
            )
        return weight

    @classmethod
    def from_bnb(cls, params4bit: Any) -> "NF4Weight":
        """A view of a bitsandbytes `Params4bit`: the same memory, nothing copied.

        Raises:
            ValueError: not yet quantized, fp4, not a matrix, or repacked for CPU inference.
        """
        state = getattr(params4bit, "quant_state", None)
        if state is None:
            raise ValueError("this Params4bit is not quantized yet: move it to its device with .to(device) first")
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type is {state.quant_type!r}: load the model with bnb_4bit_quant_type='nf4'")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked this weight for CPU inference, which loses precision: reload the model, and "
                "pass it on before any forward pass in eval mode"
            )
        if len(state.shape) != 2:
            raise ValueError(f"an NF4 weight is a matrix [N, K]; this one has shape {list(state.shape)}")
        return cls.from_quant_state(params4bit.data, state)

    @classmethod
    def from_quant_state(cls, codes: Tensor, state: Any) -> "NF4Weight":
        """A view of packed codes and their `bitsandbytes.functional.QuantState`; of a stack [E, N, K] as [E N, K]."""
        second = state.state2
        if second is not None:
            _check_nested_blocksize(second.blocksize)
        return cls(
            codes=codes.view(torch.uint8).view(-1),
            absmax=state.absmax,
            shape=(math.prod(state.shape[:-1]), state.shape[-1]),
            dtype=state.dtype,
            blocksize=state.blocksize,
            absmax2=second.absmax if second is not None else None,
            code2=second.code if second is not None else None,
            offset=state.offset if second is not None else None,
        )

    def to_bnb(self) -> Any:
        """A bitsandbytes `Params4bit` over the same memory, as in `Linear4bit.weight`."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        second = None
        if self.absmax2 is not None:
            second = QuantState(absmax=self.absmax2, code=self.code2, blocksize=SCALES_A_RUN, dtype=torch.float32)
        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=torch.tensor(LEVELS, dtype=torch.float32, device=self.device),
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.offset,
            state2=second,
        )
        return Params4bit(
            self.codes.view(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type="nf4",
            bnb_quantized=True,
        )


def quantize(w: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantize a weight to NF4: the same codes and scales as bitsandbytes' `quantize_4bit`.

    Args:
        w: [N, K], fp32, fp16 or bf16, any strides, any device.
        blocksize: values that share a scale: 32, 64, ... 4096; blocks may cross rows.
        double_quant: quantize the scales too (0.37 bits a weight less at blocksize 64).
    Raises:
        ValueError: wrong dtype, not a matrix, empty, an unknown blocksize, or NaN or inf among the values.
    Source: arXiv:2305.14314, section 3.
    """
    check_blocksize(blocksize)
    _check_float_dtype(w.dtype)
    if w.ndim != 2 or w.numel() == 0:
        raise ValueError(f"quantize takes a weight [N, K] with at least one value; got shape {list(w.shape)}")
    flat = w.detach().contiguous().view(-1)
    in_cpp = backend(w.device).name == "cpp"
    codes, absmax = (_encode_with_cpp if in_cpp else _encode)(flat, blocksize)
    largest = absmax.max().item()  # NaN if there is any
    if not math.isfinite(largest):
        bad = int(torch.isfinite(flat).logical_not().nonzero()[0])
        row, column = divmod(bad, w.shape[1])
        raise ValueError(f"the weight holds {flat[bad].item()} at [{row}, {column}]: repair the checkpoint first")
    shape = (w.shape[0], w.shape[1])
    if not double_quant:
        return NF4Weight(codes, absmax, shape, w.dtype, blocksize)
    offset = _mean(absmax)
    levels, absmax2 = (_encode_scales_with_cpp if in_cpp else _encode_scales)(absmax, offset)
    weight = NF4Weight(codes, levels, shape, w.dtype, blocksize, absmax2, dynamic_code(w.device), offset)
    if largest > torch.finfo(w.dtype).max / 2:
        # The nearest level of a scale may be above it, and here above what the dtype holds. Then a lower one is taken.
        while (over := reference.nf4_scales(*weight.tensors()[1:]).to(w.dtype).isposinf()).any():
            levels -= over.to(torch.uint8)
    return weight


def _mean(absmax: Tensor) -> Tensor:
    """The mean of scales, 0-d: torch's, or where the sum of very large ones overflows, that of their parts."""
    mean = absmax.mean()
    return mean if torch.isfinite(mean) else (absmax / absmax.numel()).sum().clamp(max=absmax.max())


def _encode(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and absmax of a flat weight."""
    codes = torch.empty(-(flat.numel() // -2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(flat.numel() // -blocksize), dtype=torch.float32, device=flat.device)
    code = level_table(flat.device)
    for start in range(0, flat.numel(), _QUANTIZE_CHUNK):
        part = flat[start : start + _QUANTIZE_CHUNK].float()
        part_absmax = _block_absmax(part, blocksize)
        absmax[start // blocksize :][: part_absmax.numel()] = part_absmax
        levels = _nearest_levels(part, part_absmax, blocksize, code)
        if levels.numel() % 2:
            # bitsandbytes pads an odd weight with the value zero
            levels = torch.cat((levels, levels.new_full((1,), LEVELS.index(0.0))))
        codes[start // 2 :][: levels.numel() // 2] = (levels[::2] << 4) | levels[1::2]
    return codes, absmax


def _encode_with_cpp(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(-(flat.numel() // -2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(flat.numel() // -blocksize), dtype=torch.float32, device="cpu")
    nf4_quantize(flat, blocksize, codes, absmax)
    return codes, absmax


def _encode_scales(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit levels of scales minus their offset, and the second-level scales."""
    on_cpu = absmax.device.type == "cpu"
    centred = absmax - offset
    absmax2 = _block_absmax(centred, SCALES_A_RUN)
    levels = _nearest_levels(centred, absmax2, SCALES_A_RUN, dynamic_code(absmax.device), grid=on_cpu)
    if on_cpu:  # where all scales are equal, bitsandbytes divides 0 by 0 and ends at level 0; the value is the same
        levels[(absmax2 == 0).repeat_interleave(SCALES_A_RUN)[: levels.numel()]] = 0
    return levels, absmax2


def _encode_scales_with_cpp(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.empty_like(absmax, dtype=torch.uint8)
    absmax2 = absmax.new_empty(-(absmax.numel() // -SCALES_A_RUN))
    quantize_scales(absmax, offset.item(), _level_of_step(), levels, absmax2)
    return levels, absmax2


@functools.cache
def _level_of_step() -> Tensor:
    """The 8-bit level nearest to each of the steps over [-1, 1] to which bitsandbytes rounds: [65536], uint8."""
    code = dynamic_code()
    steps = torch.arange(TABLE_STEPS, dtype=torch.float32, device="cpu") / 32767.5 - 1
    return torch.bucketize(steps, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


def dynamic_code(device: torch.device | str = "cpu") -> Tensor:
    """The 256 levels of the signed dynamic 8-bit type, sorted: [256], fp32.

    Decade `i` of seven holds 2^i midpoints of equal parts of [0.1, 1] times 10^(i-6), with both signs;
    0 and 1 complete them.
    Source: arXiv:2110.02861, section 2.1 ("dynamic quantization").
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


def _block_absmax(values: Tensor, blocksize: int) -> Tensor:
    """Largest magnitude of each block of a flat fp32 tensor, the last of which may be short."""
    full = values.numel() - values.numel() % blocksize
    whole = values[:full].view(-1, blocksize).abs().amax(dim=1)
    return whole if full == values.numel() else torch.cat((whole, values[full:].abs().amax().view(1)))


def _nearest_levels(values: Tensor, absmax: Tensor, blocksize: int, code: Tensor, grid: bool = False) -> Tensor:
    """The index of the level nearest to each value over its block's scale, on a tie the lower one: uint8, flat.

    With `grid`, values are first rounded to 65536 steps over [-1, 1]: on the CPU bitsandbytes finds
    8-bit levels in a table of that size; on other devices it compares with the midpoints.
    """
    inverse = (1.0 / absmax.clamp(min=1e-38)).repeat_interleave(blocksize)[: values.numel()]
    scaled = (values * inverse).clamp_(-1, 1)
    if grid:
        scaled = ((scaled + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


def _facts_of(text: Tensor) -> dict[str, Any]:
    """What bitsandbytes' JSON says of a weight.

    Raises:
        ValueError: it is not JSON, or lacks a fact, or one is not of its kind.
    """
    try:
        facts = json.loads(bytes(text.cpu().tolist()))
        kinds = {"shape": list, "dtype": str, "blocksize": int}
        if "nested_offset" in facts:
            kinds["nested_offset"] = float
        wrong = [name for name, kind in kinds.items() if not isinstance(facts[name], kind)]
        if not wrong and [type(side) for side in facts["shape"]] != [int, int]:
            wrong = ["shape"]
        if wrong:
            raise ValueError(f"{wrong[0]} is {facts[wrong[0]]!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{_STATE_KEY!r} of an NF4 weight cannot be read, get the checkpoint again: {error}"
        ) from error
    return facts


def _are_levels(quant_map: Tensor) -> bool:
    """Whether a codebook is NF4's, perhaps rounded to 16 bits."""
    levels = level_table(quant_map.device)
    return quant_map.numel() == levels.numel() and torch.allclose(quant_map.flatten().float(), levels, atol=0.01)


def _check_nested_blocksize(blocksize: int) -> None:
    if blocksize != SCALES_A_RUN:
        raise ValueError(f"nested scales come in blocks of {SCALES_A_RUN}; this weight has {blocksize}")


def _check_float_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"NF4 works with fp32, fp16 and bf16, not {dtype}: convert the weight first")
