"""The operations of fastlora in plain torch: the oracle in fp64, the baseline in other dtypes, the fall-back anywhere.

    NF4:   W[n, k] = code[q[n, k]] * absmax[(n K + k) // blocksize]
           absmax[b] = code2[absmax_u8[b]] * absmax2[b // 256] + offset        (nested scales)
    LoRA:  y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias

Written for reading, not for speed: every product is separate, and each rounding is where peft has it.
Source: arXiv:2106.09685, section 4.1 (LoRA); arXiv:2305.14314, section 3 (NF4, double quantization).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Quantiles of N(0, 1) scaled to [-1, 1]: arXiv:2305.14314, appendix E.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NESTED_BLOCKSIZE = 256  # scales per second-level scale

PHILOX_ROUNDS = 7  # the fewest that pass BigCrush, according to the paper
DROPOUT_GROUP = 8  # elements that share a Philox call, 16 bits each
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def nf4_scales(
    absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None, first: int = 0
) -> Tensor:
    """The fp32 scale of every block, [blocks]: `absmax` itself, or its nested form expanded.

    `absmax` begins with block `first` of those that `absmax2` covers. The product and the sum round separately, as in
    bitsandbytes.
    """
    if absmax2 is None:
        return absmax
    assert code2 is not None
    assert offset is not None
    outer = absmax2.repeat_interleave(NESTED_BLOCKSIZE)[first : first + absmax.numel()]
    return code2[absmax.long()] * outer + offset


def nf4_dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, int], blocksize: int) -> Tensor:
    """Expand packed NF4 codes to fp32.

    Args:
        codes: [ceil(N*K/2)], uint8, two codes a byte, high nibble first.
        scales: [ceil(N*K/blocksize)], fp32; blocks run flat over the tensor.
        shape: (N, K).
    Returns:
        [N, K], fp32.
    """
    numel = shape[0] * shape[1]
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[:numel]
    values = code[pairs.int()]
    full = numel - numel % blocksize
    blocks = full // blocksize
    whole = values[:full].view(blocks, blocksize) * scales[:blocks, None]
    if full == numel:
        return whole.view(shape)
    return torch.cat((whole.flatten(), values[full:] * scales[blocks])).view(shape)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + scaling · (mask ∘ x) Aᵀ Bᵀ + bias, in peft's order of operations.

    Args:
        x: [..., K]. weight: [N, K], dtype of x. lora_a: [R, K]. lora_b: [N, R]. bias: [N].
        dropout_mask: [..., K], 0 where dropped and 1 / (1 - p) elsewhere.
    Returns:
        [..., N], dtype of x; the low-rank products run in the adapters' dtype.
    """
    base = F.linear(x, weight, bias)  # [..., N]
    wide = torch.promote_types(lora_a.dtype, lora_b.dtype)
    dropped = x.to(wide)
    if dropout_mask is not None:
        dropped = dropped * dropout_mask.to(wide)
    update = F.linear(F.linear(dropped, lora_a.to(wide)), lora_b.to(wide)) * scaling
    return base + update.to(base.dtype)


def philox_4x32(seed: int, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words for each counter: Philox-4x32 with seven rounds.

    Args:
        seed: 64 bits, the key.
        counters: int64, of which the low 32 bits count.
    Returns:
        four int64 tensors with values in [0, 2**32), shape of `counters`.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0 = counters & _MASK32
    c1, c2, c3 = (torch.zeros_like(c0) for _ in range(3))
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(PHILOX_ROUNDS):
        high_0, low_0 = _multiply_32(c0, _PHILOX_MULTIPLIERS[0])
        high_1, low_1 = _multiply_32(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK32, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply_32(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of an unsigned product, in int64 arithmetic that cannot overflow."""
    low_part = (value & 0xFFFF) * factor
    high_part = (value >> 16) * factor + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def dropout_threshold(p: float) -> int:
    """A 16-bit number below this is a dropped element: p in steps of 2**-16."""
    return round(p * 65536)


def dropout_mask(seed: int, rows: int, cols: int, p: float) -> Tensor:
    """The mask of dropout that every backend derives from the seed.

    Columns are taken in groups of eight: group g of row m uses the four Philox words of counter
    m * ceil(cols / 8) + g, low half before high half.

    Returns:
        [rows, cols], fp32, 0 where dropped and 1 / (1 - p) elsewhere.
    """
    groups = -(cols // -DROPOUT_GROUP)
    words = torch.stack(philox_4x32(seed, torch.arange(rows * groups, device="cpu")), dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).view(rows, groups * DROPOUT_GROUP)
    threshold = dropout_threshold(p)
    return (halves[:, :cols] >= threshold).float() * (65536 / (65536 - threshold))
