"""NF4 quantization by the compiled CPU library, bit for bit bitsandbytes'; see `native.cpu` on calls.

    absmax[block] = max |w|,    code = the level nearest to w * (1 / absmax), on a tie the lower one

Every operation is rounded separately in fp32, as in bitsandbytes. The 8-bit levels of nested scales come from a table
of 65,536 steps over [-1, 1], which is how bitsandbytes finds them on the CPU.

Source: arXiv:2305.14314, section 3.
"""

import torch
from torch import Tensor

from fastlora.kernels.operands import check_blocksize
from fastlora.native.cpu import chosen_isa, loaded, raise_for_status
from fastlora.native.weight import DTYPES, require

TABLE_STEPS = 65536


def nf4_quantize(w: Tensor, blocksize: int, codes: Tensor, absmax: Tensor) -> None:
    """Codes and scales of a weight.

    Args:
        w: fp32, bf16 or fp16, any shape, contiguous; finite. A block that is not finite gets a scale that is not.
        blocksize: a power of two, 32..4096.
        codes: [ceil(numel/2)], uint8, contiguous; overwritten.
        absmax: [ceil(numel/blocksize)], fp32, contiguous; overwritten.
    Raises:
        ValueError: a tensor's dtype, size, device or layout, or the blocksize, is not as above; nothing is written.
        RuntimeError: the library is not loaded; see `native.cpu.status()`.
    """
    library = loaded()
    check_blocksize(blocksize)
    numel = w.numel()
    require("w", w, tuple(DTYPES))
    require("codes", codes, (torch.uint8,), (numel + 1) // 2)
    require("absmax", absmax, (torch.float32,), -(-numel // blocksize))
    log2_blocksize = blocksize.bit_length() - 1
    raise_for_status(
        library.fastlora_nf4_quantize(
            w.data_ptr(), DTYPES[w.dtype], numel, log2_blocksize, codes.data_ptr(), absmax.data_ptr(),
            chosen_isa(library), torch.get_num_threads(),
        )
    )  # fmt: skip


def quantize_scales(absmax: Tensor, offset: float, table: Tensor, levels: Tensor, absmax2: Tensor) -> None:
    """8-bit levels of scales minus their offset, in blocks of 256.

    Args:
        absmax: [blocks], fp32, contiguous; finite.
        table: [TABLE_STEPS], uint8, contiguous: the level of each step.
        levels: [blocks], uint8, contiguous; overwritten.
        absmax2: [ceil(blocks/256)], fp32, contiguous; overwritten.
    Raises:
        ValueError: a tensor's dtype, size, device or layout is not as above; nothing has been written.
        RuntimeError: the library is not loaded; see `native.cpu.status()`.
    """
    library = loaded()
    blocks = absmax.numel()
    require("absmax", absmax, (torch.float32,))
    require("table", table, (torch.uint8,), TABLE_STEPS)
    require("levels", levels, (torch.uint8,), blocks)
    require("absmax2", absmax2, (torch.float32,), -(-blocks // 256))
    raise_for_status(
        library.fastlora_nf4_quantize_scales(
            absmax.data_ptr(), blocks, offset, table.data_ptr(), levels.data_ptr(), absmax2.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
