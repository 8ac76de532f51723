"""Compile every Triton kernel for every architecture, with no GPU, and read the machine code, the CUDA library's too.

Registers, bytes spilled, shared memory, whether tensor cores are used, and, for the kernels that
expand NF4, thread instructions per weight: marginal between two tile sizes, so that prologue and
epilogue do not count. Rows go to a CSV: kernel, arch, registers, spills, shared_bytes,
sass_per_weight, tensor_core.
"""

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from bench.specimens import ARCHITECTURES, Specimen, specimens

SUMMARY = "compile every kernel for sm_80 to sm_120 and count registers, spills, shared memory, instructions"
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use
TENSOR_CORE = re.compile(r"^(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)")
_TENSOR_CORE_PTX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")
_PLACED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);")  # address, name, operands
IDLE = ("NOP", "BRA", "EXIT")


@dataclass(frozen=True)
class Row:
    """What the machine code of one kernel on one architecture shows."""

    kernel: str
    arch: int
    registers: int
    spills: int  # bytes of local memory a thread
    shared_bytes: int
    sass_per_weight: float | None
    tensor_core: bool


def _compiled_rows(archs: list[int], kernel: str) -> Iterator[Row]:
    """Rows of the CUDA library, if it has been built, of the kernels whose name contains `kernel`."""
    from bench import fatbin
    from fastlora.native import cuda

    loaded, text = cuda.status()
    if loaded:
        yield from (row for row in fatbin.rows(*cuda.static_facts(), archs) if kernel in row.kernel)
    else:
        print(f"no rows of the CUDA library: {text}")


def _compile(specimen: Specimen, arch: int, constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    unaligned = {
        "R",
        "threshold",
        "M",
        "splits",
        "h_splits",
        "h_programs",
        "experts",
        "row_tiles",
    }  # need not be multiples of 16
    unaligned |= {param.name for param in specimen.kernel.params if param.do_not_specialize_on_alignment}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in specimen.types.items()
        if (kind.startswith("*") or kind == "i32") and name not in unaligned
    }
    source = ASTSource(
        fn=specimen.kernel,
        signature={name: specimen.types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs=attributes,
    )
    options = {"num_warps": specimen.warps, **specimen.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cuobjdump_tool() -> Path:
    """The disassembler that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _cuobjdump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump_tool(), flag, file.name], capture_output=True, text=True, check=True).stdout


def _instructions(cubin: bytes) -> list[str]:
    names = _INSTRUCTION.findall(_cuobjdump(cubin, "-sass"))
    return [name for name in names if name.split(".")[0] not in IDLE]


def main_loop(cubin: bytes) -> list[str]:
    """Instructions of the shortest loop that looks levels up, with the tensor cores in it where any has them.

    A loop is what lies between the target of a backward branch and the branch.
    """
    found = _PLACED.findall(_cuobjdump(cubin, "-sass"))
    code = [(int(at, 16), name, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in found]
    loops = []
    for at, name, target in code:
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            body = [other for place, other, _ in code if int(target[1], 16) <= place <= at and other != "NOP"]
            if any(other.startswith("SHFL") for other in body):
                loops.append(body)
    return min([body for body in loops if any(map(TENSOR_CORE.match, body))] or loops, key=len, default=[])


def inspect(specimen: Specimen, arch: int) -> Row:
    """Compile one kernel for one architecture (80, 86, ... 120) and read its machine code."""
    compiled = _compile(specimen, arch, specimen.constants)
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "-res-usage")
    per_weight = None
    if specimen.main_loop:
        per_weight = round(len(main_loop(cubin)) * specimen.warps * 32 / specimen.weights, 2)
    elif specimen.weights:
        one, twin = (
            len(_instructions(_compile(specimen, arch, specimen.constants | change).asm["cubin"]))
            for change in ({}, specimen.twin)
        )
        per_weight = round((twin - one) * specimen.warps * 32 / specimen.weights, 2)
    return Row(
        kernel=specimen.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spills=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),  # type: ignore[index]
        shared_bytes=compiled.metadata.shared,
        sass_per_weight=per_weight,
        tensor_core=bool(_TENSOR_CORE_PTX.search(compiled.asm["ptx"])),  # disassembling every kernel takes minutes
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench static`."""
    parser.add_argument("--out", type=Path, default=Path("bench/results/static.csv"), help="CSV to write anew")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled side by side (all cores)")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print and write; 0 where every kernel compiled."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    names = [column.name for column in fields(Row)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        print(" ".join(f"{name:>15}" for name in names))
        chosen = [specimen for specimen in specimens() if arguments.kernel in specimen.name]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            pairs = [pair for pair in product(chosen, arguments.arch) if pair[1] in pair[0].archs]
            for found in pool.map(lambda pair: inspect(*pair), pairs):
                _report(found, writer)
        for found in _compiled_rows(arguments.arch, arguments.kernel):
            _report(found, writer)
    return 0


def _report(found: Row, writer: "csv.DictWriter[str]") -> None:
    row = asdict(found)
    writer.writerow(row)
    print(" ".join(f"{value!s:>15}" for value in row.values()), flush=True)
