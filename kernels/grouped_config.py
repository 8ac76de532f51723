"""What the grouped products take, and how a launch is cut: derived from the machine code, not measured."""

import torch
from fastlora.kernels import fused_config
from fastlora.kernels.fused_config import Config
from fastlora.kernels.operands import Packed
from torch import Tensor

MAX_R = 256
MAX_EXPERTS = 1023  # a program holds all offsets in registers


def default_config(
    op: str, rows: int, packed: bool, n: int, k: int, capability: tuple[int, int], is_aligned: bool = True
) -> Config:
    """How to cut a product with `rows` rows an expert on average; derived, not measured.

    A row tile holds the average: 16, 32 or 64 rows, else 128. For few rows only the weights' bytes count: 64 columns
    make enough programs, and steps of 128 keep loads in flight. Other tiles over NF4 are cut as in `fused`. The stages
    fit into 99 KB on GPUs that give a program no more. Operands without alignment are loaded number by number, and
    large tiles have too few registers for that.
    """
    tma, small = capability[0] in (9, 10), capability in ((8, 6), (8, 9)) or capability[0] == 12
    if not is_aligned:
        return Config(16 if rows <= 16 else 32, 64, 64, 1, 4, 2, tma=False)
    if rows <= 16:
        return Config(16, 64, 128, 1, 4, 3 if packed else 4, tma=False)
    if packed:
        return fused_config.default_config(op, rows, n, k, capability)._replace(splits=1)
    if rows <= 64:
        return Config(32 if rows <= 32 else 64, 128, 64, 1, 4, 3, tma=tma and rows > 32)
    return Config(128, 128, 32 if small else 64, 1, 8, 4 if tma or small else 3, tma=tma)


def aligned(x: Tensor, weight: Tensor | Packed, columns: int, length: int) -> bool:
    """Whether Triton can tell that rows of the operands begin where 16 numbers can be loaded at once."""
    strides = [x.stride(0), columns, length, *(weight.stride() if isinstance(weight, Tensor) else ())]
    pointers = [x.data_ptr(), *([weight.data_ptr()] if isinstance(weight, Tensor) else [])]
    loose = [stride for stride in strides if stride % 16]
    return not any(pointer % 16 for pointer in pointers) and loose == [1] * (not isinstance(weight, Packed))


def supports(x: torch.dtype, weight: torch.dtype | None, experts: int, k: int, blocksize: int, r: int) -> str:
    """Why these kernels cannot multiply by a stack of dtype `weight` (None: NF4 of this blocksize) with LoRA of rank r
    (0: none); or ""."""
    if x not in (torch.bfloat16, torch.float16):
        return f"rows must be bf16 or fp16, not {x}"
    if weight is not None and weight != x:
        return f"rows are {x}, but the stack is {weight}"
    if weight is None and k % blocksize:
        return f"a block must not cross rows: K = {k} is not a multiple of the blocksize {blocksize}"
    if experts > MAX_EXPERTS:
        return f"{experts} experts are more than {MAX_EXPERTS}"
    return f"rank {r} is above {MAX_R}" if r > MAX_R else ""
