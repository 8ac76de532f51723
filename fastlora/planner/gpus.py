"""Cards by name: memory as torch reports it, dense 16-bit tensor rate and bandwidth from the vendor's data sheets."""

import re
from dataclasses import dataclass

_TABLE = """
t4            75   14.6    65   0.32
v100-16gb     70   15.8   125   0.90
v100-32gb     70   31.7   125   0.90
rtx-3060      86   11.6    51   0.36
rtx-3090      86   23.7   142   0.94
rtx-4060-ti   89   15.6    88   0.29
rtx-4070      89   11.7   117   0.50
rtx-4080      89   15.6   195   0.72
rtx-4090      89   23.5   330   1.01
rtx-5070-ti  120   15.5   176   0.90
rtx-5080     120   15.5   225   0.96
rtx-5090     120   31.4   419   1.79
rtx-a6000     86   47.4   155   0.77
rtx-6000-ada  89   47.4   364   0.96
rtx-pro-6000 120   94.9   504   1.79
a10g          86   22.1   125   0.60
l4            89   22.0   121   0.30
l40s          89   44.4   362   0.86
a100-40gb     80   39.4   312   1.56
a100-80gb     80   79.1   312   2.04
h100-80gb     90   79.1   989   3.35
h200          90  139.8   989   4.80
b200         100  178.3  2250   8.00
"""
_ALIASES = {"a100": "a100-80gb", "h100": "h100-80gb", "v100": "v100-32gb", "a10": "a10g", "a6000": "rtx-a6000"}
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU. memory: bytes; rate: multiply-adds counted twice, a second, in 16 bits; bandwidth: bytes a second."""

    name: str
    capability: int
    memory: int
    rate: float
    bandwidth: float


def _cards() -> dict[str, Card]:
    found = {}
    for line in _TABLE.strip().splitlines():
        name, capability, memory, rate, bandwidth = line.split()
        found[name] = Card(
            name, int(capability), round(float(memory) * GIB), float(rate) * 1e12, float(bandwidth) * 1e12
        )
    return found


CARDS = _cards()


def card(name: str) -> Card:
    """A card by its name, or by its memory as `24gb`.

    Raises:
        ValueError: neither; the message lists the names.
    """
    words = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    words = re.sub(r"^rtx(?=\d)", "rtx-", words)
    words = _ALIASES.get(words, words)
    if words in CARDS:
        return CARDS[words]
    if f"rtx-{words}" in CARDS:
        return CARDS[f"rtx-{words}"]
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)-?gi?b", words):
        return Card(f"{size[1]} GB", 80, round(float(size[1]) * GIB), 0.0, 0.0)
    raise ValueError(f"gpu: {name!r} is not known; known are {', '.join(CARDS)}, or a size such as 24gb")
