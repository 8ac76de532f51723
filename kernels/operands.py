"""What kernels and compiled libraries take: a weight packed in NF4, a LoRA pair, and the sixteen levels.

A `Packed` is checked once, when it is made. Code that receives one can rely on the dtypes, sizes and layout of its
tensors, and checks only what it needs itself: a device, an alignment, whole blocks in a row.
Source: arXiv:2305.14314, section 3 and appendix E.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALES_A_RUN = 256  # first-level scales that share a second-level one
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# As in fastlora.reference, which imports nothing of what it judges; a test holds them equal.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(eq=False, frozen=True)
class Packed:
    """A weight [N, K] in NF4.

    Args:
        codes: [ceil(N*K/2)], uint8, flat, high nibble first.
        absmax: [blocks], fp32 scales; uint8 levels where nested.
        shape: (N, K).
        dtype: dtype before quantization.
        blocksize: values that share a scale: 32, 64, ... 4096.
        absmax2: nested: [ceil(blocks/256)], fp32.
        code2: nested: [256], fp32, the 8-bit levels.
        offset: nested: 0-d, fp32, the mean of the scales.
    Raises:
        ValueError: the parts do not fit together.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        self.check()
        if self.codes.is_cuda and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
            level_table(self.codes.device)  # a copy from the host, which a CUDA graph that is being captured forbids

    def check(self) -> None:
        """Raise ValueError where the parts do not fit together."""
        check_blocksize(self.blocksize)
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype of an NF4 weight must be fp32, fp16 or bf16, not {self.dtype}")
        n, k = self.shape
        if n < 0 or k < 0:
            raise ValueError(f"the shape of an NF4 weight must be [N, K]; got {[n, k]}")
        blocks = -(n * k // -self.blocksize)
        expected = [("codes", self.codes, torch.uint8, -(n * k // -2))]
        if self.absmax2 is None and self.code2 is None and self.offset is None:
            expected += [("absmax", self.absmax, torch.float32, blocks)]
        elif self.absmax2 is None or self.code2 is None or self.offset is None:
            raise ValueError("nested NF4 scales need absmax2, code2 and offset together")
        else:
            expected += [
                ("absmax", self.absmax, torch.uint8, blocks),
                ("absmax2", self.absmax2, torch.float32, -(blocks // -SCALES_A_RUN)),
                ("code2", self.code2, torch.float32, 256),
                ("offset", self.offset, torch.float32, 1),
            ]
        for name, tensor, dtype, numel in expected:
            if (
                tensor.dtype != dtype
                or tensor.numel() != numel
                or not tensor.is_contiguous()
                or tensor.device != self.codes.device
            ):
                raise ValueError(
                    f"{name} of an NF4 weight {list(self.shape)} with blocksize {self.blocksize} must be contiguous, "
                    f"{numel} x {dtype} on {self.codes.device}; got {tensor.numel()} x {tensor.dtype} on "
                    f"{tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
                )

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantized (bitsandbytes: `compress_statistics`)."""
        return self.absmax2 is not None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(codes, absmax, absmax2, code2, offset), the order in which operators take them."""
        return self.codes, self.absmax, self.absmax2, self.code2, self.offset


class Lora(NamedTuple):
    """A LoRA pair: y += scaling · (dropout(x) Aᵀ Bᵀ + bias)."""

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scaling: float = 1.0
    dropout_p: float = 0.0  # while training, else 0
    seed: Tensor | None = None  # int64, one element: the mask's, drawn for one call; None where nothing is dropped
    bias: Tensor | None = None  # [N], of B (peft's `lora_bias`)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the low-rank products: fp32 where either matrix is fp32."""
        a, b = self.a.dtype, self.b.dtype
        return a if a is b else torch.promote_types(a, b)

    @property
    def r(self) -> int:
        """The rank."""
        return self.a.shape[0]


def check_blocksize(blocksize: int) -> None:
    """Raise ValueError for a blocksize that NF4 does not have."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {blocksize}")


def check_product(x: Tensor, weight: Packed, lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError where a product x [M, K] with a weight, a LoRA and a bias does not fit together."""
    n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x is {list(x.shape)}, expected [M, K] with the weight's K = {k}")
    if weight.device != x.device:
        raise ValueError(f"the weight is on {weight.device}, expected {x.device}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b go together: one of them is None")
    if lora_a is not None and lora_b is not None:
        r = lora_a.shape[0]
        if lora_a.shape != (r, k) or lora_b.shape != (n, r):
            raise ValueError(
                f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit a weight of [{n}, {k}]: "
                f"expected [R, {k}] and [{n}, R]"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{n}]")


@functools.cache
def level_table(device: torch.device) -> Tensor:
    """The sixteen levels on a device: [16], fp32. One small copy for each device, made with the first weight there."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] as [M, N] with contiguous rows; a copy where its strides allow no other."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
