"""Compile every Triton kernel for every architecture, without a GPU, and read the machine code; the CUDA library's too.

Registers, bytes spilled, shared memory, whether tensor cores are used, and, for kernels that expand NF4, thread
instructions per weight: the difference between two tile sizes, so that prologue and epilogue do not count. Rows go to
a CSV: kernel, arch, registers, spills, shared_bytes, sass_per_weight, tensor_core, divergent_shuffles (as
`bench.machine_code.convergence` says).
"""

import argparse
import csv
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

from bench.machine_code import fatbin
from bench.machine_code.convergence import divergent_shuffles
from bench.machine_code.sass import CodeFacts, dump, instructions, loops
from bench.machine_code.specimen import ARCHITECTURES, Specimen
from bench.machine_code.specimens import specimens
from fastlora.native import cuda

SUMMARY = "compile every kernel for sm_80 to sm_120 and count registers, spills, shared memory, instructions"
_TENSOR_CORE = re.compile(r"^(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)")
_TENSOR_CORE_PTX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_UNALIGNED = {"R", "threshold", "M", "splits", "h_splits", "h_programs", "experts", "row_tiles"}  # not multiples of 16


def _compiled_rows(archs: list[int], kernel: str) -> Iterator[CodeFacts]:
    """Rows of the CUDA library, if it has been built, of the kernels whose name contains `kernel`."""
    loaded, text = cuda.status()
    if loaded:
        yield from (row for row in fatbin.rows(*cuda.static_facts(), archs) if kernel in row.kernel)
    else:
        print(f"no rows of the CUDA library: {text}")


def compiled(specimen: Specimen, arch: int, constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    unaligned = (
        _UNALIGNED
        | specimen.odd
        | {param.name for param in specimen.kernel.params if param.do_not_specialize_on_alignment}
    )
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


def main_loop(cubin: bytes) -> list[str]:
    """Instructions of the shortest loop that looks levels up; one with tensor-core products where there is any."""
    bodies = [[name for name in body if name != "NOP"] for body in loops(dump(cubin, "-sass"))]
    lookups = [body for body in bodies if any(name.startswith("SHFL") for name in body)]
    return min([body for body in lookups if any(map(_TENSOR_CORE.match, body))] or lookups, key=len, default=[])


def inspect(specimen: Specimen, arch: int) -> CodeFacts:
    """Compile one kernel for one architecture (80, 86, ... 120) and read its machine code."""
    kernel = compiled(specimen, arch, specimen.constants)
    cubin = kernel.asm["cubin"]
    usage = dump(cubin, "-res-usage")
    per_weight = None
    if specimen.main_loop:
        per_weight = round(len(main_loop(cubin)) * specimen.warps * 32 / specimen.weights, 2)
    elif specimen.weights:
        one, twin = (
            len(instructions(dump(compiled(specimen, arch, specimen.constants | change).asm["cubin"], "-sass")))
            for change in ({}, specimen.twin)
        )
        per_weight = round((twin - one) * specimen.warps * 32 / specimen.weights, 2)
    return CodeFacts(
        kernel=specimen.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spills=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),  # type: ignore[index]
        shared_bytes=kernel.metadata.shared,
        sass_per_weight=per_weight,
        tensor_core=bool(_TENSOR_CORE_PTX.search(kernel.asm["ptx"])),  # disassembling every kernel takes minutes
        divergent_shuffles=len(divergent_shuffles(kernel.asm["ptx"])),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench static`."""
    parser.add_argument("--out", type=Path, default=Path("bench/results/static.csv"), help="CSV to overwrite")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="kernels compiled at the same time (all cores)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compile, print and write; 0 where every kernel compiled."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    names = [column.name for column in fields(CodeFacts)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        print(" ".join(f"{name:>15}" for name in names))
        chosen = [specimen for specimen in specimens() if arguments.kernel in specimen.name]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            pairs = [pair for pair in product(chosen, arguments.arch) if pair[1] in pair[0].archs]
            for found in pool.map(lambda pair: inspect(*pair), pairs):
                _write(found, writer)
        for found in _compiled_rows(arguments.arch, arguments.kernel):
            _write(found, writer)
    return 0


def _write(found: CodeFacts, writer: "csv.DictWriter[str]") -> None:
    row = asdict(found)
    writer.writerow(row)
    print(" ".join(f"{value!s:>15}" for value in row.values()), flush=True)
