"""Read the machine code of the compiled CUDA library, with no GPU: its rows of `bench static`.

The library holds one binary for each source file and architecture. Instructions per weight are those of the main loop:
one turn expands and multiplies a tile of 16 rows and 256 columns a warp, 128 weights a lane. Everything
in the loop counts, also what one warp of eight executes for all.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.static import IDLE, Row, cuobjdump_tool

WEIGHTS_A_LANE = 16 * 256 // 32
_PRODUCT = "HMMA.16816"  # of the tiles; h is a product in tf32
_KERNEL = re.compile(r"decode_(products|epilogue)I\w*?4(Bf16|Half)ELi(\d+)E(?:Lb([01])E)?")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_PLACED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);")
_SYMBOL = {"Bf16": "bf16", "Half": "fp16"}


def kernel_name(symbol: str) -> str:
    """`cuda_decode_bf16_m8`, up to 8 tokens; `_bs32` for blocks of 32; `_sum` for the second kernel; else empty."""
    if not (found := _KERNEL.search(symbol)):
        return ""
    part, kind, tokens, short = found.groups()
    suffix = "_sum" if part == "epilogue" else "_bs32" if short == "1" else ""
    return f"cuda_decode_{_SYMBOL[kind]}_m{tokens}{suffix}"


def rows(library: Path, shared: dict[int, int], archs: Iterable[int]) -> Iterator[Row]:
    """A row for each kernel and architecture, by architecture.

    Args:
        library: libfastlora_cuda.so.
        shared: bytes of shared memory that a launch for up to so many tokens asks for; 0: the second kernel's.
        archs: 80, 86, ...; one that the library was not compiled for has no rows.
    """
    with tempfile.TemporaryDirectory() as name:
        _run("-xelf", "all", str(library.resolve()), folder=name)
        for arch in archs:
            for cubin in sorted(Path(name).glob(f"*.sm_{arch}.cubin")):
                yield from _rows_of(cubin, shared, arch)


def _rows_of(cubin: Path, shared: dict[int, int], arch: int) -> Iterator[Row]:
    usage = {name: tuple(map(int, rest)) for name, *rest in _USAGE.findall(_run("-res-usage", str(cubin)))}
    code = dict(zip(*[iter(re.split(r"\s+Function : (\S+)", _run("-sass", str(cubin)))[1:])] * 2, strict=True))
    for symbol, (registers, stack, static, local) in sorted(usage.items()):
        if not (name := kernel_name(symbol)):
            continue
        loop = main_loop(code[symbol])
        tokens = int(name.split("_m")[1].split("_")[0])
        yield Row(
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
    code = [(int(at, 16), name, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in _PLACED.findall(sass)]
    loops = []
    for at, name, target in code:
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            body = [other for place, other, _ in code if int(target[1], 16) <= place <= at]
            if any(other.startswith(_PRODUCT) for other in body):
                loops.append([other for other in body if other.split(".")[0] not in IDLE])
    return min(loops, key=len, default=[])


def _run(*arguments: str, folder: str | None = None) -> str:
    command = [str(cuobjdump_tool()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
