"""An NF4 weight as the C++ and CUDA libraries take it, and the checks that go before every call into them.

Past these checks an address is passed on, and a wrong one is a wild read: they are the one place that looks at dtypes,
shapes, layouts and devices on the way to compiled code.
Source: arXiv:2305.14314, section 3.
"""

import ctypes

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

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
    """Where a tensor's first element lies; None for None."""
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
        ValueError: it is not as asked for.
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
    """Likewise, and one that has not two dimensions."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected two dimensions")
    require(name, tensor, dtypes, strided=strided)


def weight_of(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    N: int,
    K: int,
    device: torch.device = _CPU,
) -> Weight:
    """An NF4 weight [N, K] as the libraries take it; it borrows the tensors.

    Raises:
        ValueError: a tensor is not as `nf4_dequantize` asks for.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize is {blocksize}, expected a power of two from 32 to 4096")
    blocks = -(-N * K // blocksize)
    require("codes", codes, (torch.uint8,), (N * K + 1) // 2, device=device)
    if absmax2 is None and code2 is None and offset is None:
        require("absmax", absmax, (torch.float32,), blocks, device=device)
    elif absmax2 is None or code2 is None or offset is None:
        raise ValueError("absmax2, code2 and offset go together: pass all three (nested scales) or none (plain)")
    else:
        require("absmax", absmax, (torch.uint8,), blocks, device=device)
        require("absmax2", absmax2, (torch.float32,), -(-blocks // 256), device=device)
        require("code2", code2, (torch.float32,), 256, device=device)
        require("offset", offset, (torch.float32,), 1, device=device)
    return Weight(
        codes.data_ptr(), absmax.data_ptr(), pointer_of(absmax2), pointer_of(code2), pointer_of(offset), N, K,
        blocksize.bit_length() - 1,
    )  # fmt: skip
