"""An NF4 weight as the C++ and CUDA libraries take it, and the checks that precede every call into them.

After these checks an address is passed on, and a wrong one is a wild read. A `Packed` checks itself when it is made;
everything else is checked here and in the modules of this folder, on the way to compiled code.
Source: arXiv:2305.14314, section 3.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.operands import SCALES_A_RUN, Packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU = torch.device("cpu")


class Weight(ctypes.Structure):
    """fastlora::Nf4Weight of csrc/nf4.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax2", ctypes.c_void_p),
        ("code2", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("log2_blocksize", ctypes.c_int64),
    )


def pointer_of(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element; None for None."""
    return None if tensor is None else tensor.data_ptr()


def require(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    numel: int | None = None,
    strided: bool = False,
    device: torch.device = _CPU,
) -> None:
    """Refuses a tensor of another dtype, device, layout or size.

    Raises:
        ValueError: it is not as required.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        hint = "; this library is for CPU tensors: move it with .cpu()" if device == _CPU else f", expected {device}"
        raise ValueError(f"{name} is on {tensor.device}{hint}")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, expected {numel}")


def require_matrix(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES), strided: bool = False
) -> None:
    """As `require`, and refuses a tensor that does not have two dimensions."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected two dimensions")
    require(name, tensor, dtypes, strided=strided)


def weight_of(weight: Packed, device: torch.device = _CPU) -> Weight:
    """An NF4 weight as the libraries take it; it borrows the tensors' memory, whose sizes `Packed` has checked.

    Raises:
        ValueError: the weight is not on `device`.
    """
    return Weight(*fields_of(weight, device))


def fields_of(weight: Packed, device: torch.device = _CPU) -> tuple[Any, ...]:
    """The fields of `Weight`: five addresses, rows, columns, log2 of the blocksize.

    Raises:
        ValueError: the weight is not on `device`, its memory has been freed, or a part has been given other `.data`
            that does not fit.
    """
    codes, absmax2, code2, offset = weight.codes, weight.absmax2, weight.code2, weight.offset
    if codes.device != device:
        hint = "; this library is for CPU tensors: move it with .cpu()" if device == _CPU else f", expected {device}"
        raise ValueError(f"the weight is on {codes.device}{hint}")
    rows, columns = weight.shape
    blocks = -(rows * columns // -weight.blocksize)
    if (
        codes.nbytes != (rows * columns + 1) // 2
        or weight.absmax.nbytes != (4 * blocks if absmax2 is None else blocks)
        or (absmax2 is not None and absmax2.nbytes != 4 * -(blocks // -SCALES_A_RUN))
        or (code2 is not None and code2.nbytes != 4 * 256)
    ):
        weight.check()
    addresses = (
        codes.data_ptr(), weight.absmax.data_ptr(), pointer_of(absmax2), pointer_of(code2), pointer_of(offset),
    )  # fmt: skip
    if 0 in addresses and rows and columns:
        raise ValueError("the memory of an NF4 weight has been freed (its storage was resized to 0): load it again")
    return *addresses, rows, columns, weight.blocksize.bit_length() - 1
