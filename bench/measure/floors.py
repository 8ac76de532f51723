"""The least time that a layer can take: bytes over bandwidth, FLOP over rate.

    NF4 weight as it is stored      0.5 + 1/64 + 4/(64 · 256) = 0.516 bytes a weight (blocksize 64, nested scales)
    expanded to bf16                0.516 read + 2 written = 2.516 bytes a weight
    y = x Wᵀ over NF4, M tokens     max(0.516 N K / bandwidth, 2 M N K / rate) while M is below the balance;
                                    above, the bare bf16 product, as measured
    the balance                     M = rate / bandwidth, FLOP over bytes: there a bf16 product takes as long to read
                                    its weight as to multiply (181 tokens on an H200)

Below the balance the bare product is bound by reading 2 bytes a weight, of which NF4 needs a quarter, so it is not a
floor. Forward + backward has two products. Above the balance, and over a bf16 weight, the floor is the bare product.
"""

from typing import NamedTuple

from bench.measure.operands import DEQUANTIZE

PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
BF16_BYTES = 2
EXPAND_BYTES = PACKED_BYTES + BF16_BYTES


class Rates(NamedTuple):
    """What a machine reaches: bytes a second in a copy (read and written both counted), bf16 FLOP a second."""

    bytes_per_s: float
    flop_per_s: float

    @property
    def balance(self) -> float:
        """Tokens at which reading a bf16 weight takes as long as multiplying with it."""
        return self.flop_per_s / self.bytes_per_s


def products(mode: str) -> int:
    """How many products with W a mode has."""
    return 2 if mode == "both" else 1


def dequantize_ms(k: int, n: int, rates: Rates) -> float:
    """Reading an NF4 weight and writing it in bf16."""
    return EXPAND_BYTES * k * n / rates.bytes_per_s * 1e3


def packed_product_ms(m: int, k: int, n: int, rates: Rates) -> float:
    """One product that reads an NF4 weight once."""
    return max(PACKED_BYTES * k * n / rates.bytes_per_s, 2 * m * k * n / rates.flop_per_s) * 1e3


def floor_ms(kernel: str, mode: str, m: int, k: int, n: int, rates: Rates, bare_ms: float | None) -> float | None:
    """The floor of a case in milliseconds.

    Args:
        bare_ms: the bare bf16 products of the same mode as measured; None where they were not.
    Returns:
        None where the floor is the bare product, and that was not measured.
    """
    if kernel == DEQUANTIZE:
        return dequantize_ms(k, n, rates)
    if kernel == "nf4_linear" and m < rates.balance:
        return products(mode) * packed_product_ms(m, k, n, rates)
    return bare_ms


def share_of_floor(floor: float | None, p50: float) -> float | None:
    """The floor's time over a provider's: 1 is the floor's speed. None where the floor was not measured."""
    return None if floor is None else floor / p50
