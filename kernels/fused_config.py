"""How a launch of the fused dequantize-GEMM is cut on each architecture, from its machine code and a small model.

`python -m bench tune` times the candidates on a GPU and writes the winners to `choice.csv`.
"""

import functools
from typing import NamedTuple

import triton

MAX_SPLITS = 32
PROGRAM_STEPS, SUM_STEPS, SUM_BYTES_A_STEP = 3, 10, 8192  # the model of `split_sum`


class Config(NamedTuple):
    """How a launch is cut: output tile [block_m, block_n], step of the sum block_k."""

    block_m: int
    block_n: int
    block_k: int
    splits: int  # parts of the sum; 0: as many as fill the chip
    warps: int
    stages: int
    tma: bool  # activation and words by tensor maps, sm_90 and up; ignored where alignment does not allow it


def uses_mma_sync(capability: tuple[int, int], block_m: int) -> bool:
    """Whether Triton multiplies by mma.sync rather than by wgmma (9.0) or tcgen05 (10.x)."""
    return capability[0] not in (9, 10) or block_m < 64


def _shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory a program may have."""
    return {(8, 0): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(capability, 99) << 10


def shared_bytes(config: Config) -> int:
    """An upper bound of a launch's shared memory: the stages, and the expanded tile."""
    weights = config.block_n * config.block_k
    scales = 8 * max(config.block_n, config.block_k) * max(1, min(config.block_n, config.block_k) // 32)
    stage = 2 * config.block_m * config.block_k + weights // 2 + scales
    return config.stages * stage + 2 * weights


def accumulators(config: Config) -> int:
    """Registers of a thread that hold sums."""
    return config.block_m * config.block_n // (32 * config.warps)


def default_config(op: str, m: int, n: int, k: int, capability: tuple[int, int]) -> Config:
    """A configuration for m tokens, from the machine code; `python -m bench tune` measures better ones.

    op: "linear" or "linear_t". Tiles have 16, 32 or 64 tokens, and 128 where the sums do not go through mma.sync's
    registers, so that a weight is expanded seldom. Warps and tiles let two programs or more share a multiprocessor:
    one expands while the other multiplies. 128 x 128 leaves no registers for pointers and uses tensor maps.
    """
    mma_sync = uses_mma_sync(capability, 64)
    block_m = next((rows for rows in (16, 32, 64) if m <= rows), 64 if mma_sync else 128)
    return Config(block_m, 128, 64, 0, 8 if mma_sync and block_m == 64 else 4, 3, tma=block_m == 128)


def candidates(op: str, m: int, n: int, k: int, capability: tuple[int, int]) -> list[Config]:
    """Configurations worth timing for m tokens, the default first; all fit the device."""
    first = default_config(op, m, n, k, capability)
    found = [first, first._replace(stages=5), first._replace(block_k=128)]
    if capability[0] >= 9:
        found += [config._replace(tma=not first.tma) for config in found]
    found += [first._replace(block_n=64), first._replace(block_n=256, warps=8), first._replace(warps=12 - first.warps)]
    if m > 16:
        found.append(first._replace(block_m=first.block_m // 2, warps=4))
    if m > 64 > first.block_m // 2:
        found.append(first._replace(block_m=128, warps=8))
    found += [first._replace(splits=splits) for splits in (1, 2, 4, 8)]
    limit = _shared_limit(capability)
    return [config for config in dict.fromkeys(found) if shared_bytes(config) <= limit and accumulators(config) <= 128]


@functools.lru_cache(4096)
def split_sum(tiles: int, steps: int, config: Config, processors: int) -> int:
    """Into how many parts to cut a sum of `steps` steps, so that tiles x parts fill the chip: the cheapest by a model.

    A multiprocessor runs its programs one after another, at full rate only with `resident` of them; the beginning and
    the end of each cost PROGRAM_STEPS steps. More than one part costs another launch, and fp32 sums written and read.
    """
    resident = max(1, min(16 // config.warps, 2048 // (config.warps * (accumulators(config) + 64))))
    sums = 8 * tiles * config.block_m * config.block_n / (processors * SUM_BYTES_A_STEP)

    def cost(parts: int) -> float:
        programs = max(resident, triton.cdiv(tiles * parts, processors))
        return programs * (triton.cdiv(steps, parts) + PROGRAM_STEPS) + (parts > 1) * (SUM_STEPS + parts * sums)

    return min(range(1, min(steps, MAX_SPLITS) + 1), key=cost)
