"""The machine code of the compiled CUDA library, read without a GPU: its rows of `bench static`.

The library holds one binary for each source file and architecture. Instructions per weight are those of the main loop:
one turn expands and multiplies a tile of 16 rows and 256 columns a warp, 128 weights a lane. Everything in the loop
counts, also what one warp of eight executes for all.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.machine_code.sass import CodeFacts, cuobjdump, is_idle, loops

WEIGHTS_A_LANE = 16 * 256 // 32
_PRODUCT = "HMMA.16816"  # of the tiles; h is a product in tf32
_KERNEL = re.compile(r"decode_(products|epilogue)I\w*?4(Bf16|Half)ELi(\d+)E(?:Lb([01])E)?")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SYMBOL = {"Bf16": "bf16", "Half": "fp16"}


def kernel_name(symbol: str) -> str:
    """`cuda_decode_bf16_m8`, up to 8 tokens; `_bs32` for blocks of 32; `_sum` for the second kernel; else ""."""
    if not (found := _KERNEL.search(symbol)):
        return ""
    part, kind, tokens, short = found.groups()
    suffix = "_sum" if part == "epilogue" else "_bs32" if short == "1" else ""
    return f"cuda_decode_{_SYMBOL[kind]}_m{tokens}{suffix}"


def rows(library: Path, shared: dict[int, int], archs: Iterable[int]) -> Iterator[CodeFacts]:
    """A row for each kernel and architecture, by architecture.

    Args:
        library: libfastlora_cuda.so.
        shared: bytes of shared memory that a launch for up to so many tokens asks for; 0: the second kernel's.
        archs: 80, 86, ...; one that the library was not compiled for has no rows.
    """
    with tempfile.TemporaryDirectory() as name:
        cuobjdump("-xelf", "all", str(library.resolve()), folder=name)
        for arch in archs:
            for cubin in sorted(Path(name).glob(f"*.sm_{arch}.cubin")):
                yield from _rows_of(cubin, shared, arch)


def _rows_of(cubin: Path, shared: dict[int, int], arch: int) -> Iterator[CodeFacts]:
    usage = {name: tuple(map(int, rest)) for name, *rest in _USAGE.findall(cuobjdump("-res-usage", str(cubin)))}
    code = dict(zip(*[iter(re.split(r"\s+Function : (\S+)", cuobjdump("-sass", str(cubin)))[1:])] * 2, strict=True))
    for symbol, (registers, stack, static, local) in sorted(usage.items()):
        if not (name := kernel_name(symbol)):
            continue
        loop = main_loop(code[symbol])
        tokens = int(name.split("_m")[1].split("_")[0])
        yield CodeFacts(
            kernel=name,
            arch=arch,
            registers=registers,
            spills=stack + local,
            shared_bytes=static + shared[tokens if loop else 0],
            sass_per_weight=round(len(loop) / WEIGHTS_A_LANE, 2) if loop else None,
            tensor_core=_PRODUCT in code[symbol],
        )


def main_loop(sass: str) -> list[str]:
    """Names of the instructions of the shortest loop with a 16-bit product; empty where there is none."""
    products = (body for body in loops(sass) if any(name.startswith(_PRODUCT) for name in body))
    return min(([name for name in body if not is_idle(name)] for body in products), key=len, default=[])
