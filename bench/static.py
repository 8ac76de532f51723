"""Compile every Triton kernel for every architecture, with no GPU, and read the machine code.

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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SUMMARY = "compile every kernel for sm_80 to sm_120 and count registers, spills, shared memory, instructions"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use
TENSOR_CORE = re.compile(r"^(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")
_IDLE = ("NOP", "BRA", "EXIT")
RANKS = (16, 64)


@dataclass(frozen=True)
class Specimen:
    """One kernel with the arguments of a typical launch."""

    name: str
    kernel: Any
    types: dict[str, str]  # arguments that are neither constexpr nor known constants
    constants: dict[str, Any]
    warps: int
    options: dict[str, Any] = field(default_factory=dict)
    weights: int = 0  # NF4 weights a program expands; 0 where it expands none
    twin: dict[str, Any] = field(default_factory=dict)  # constants of the larger tile that the marginal count needs
    uses_tensor_cores: bool = True


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


def _nf4_specimens() -> Iterator[Specimen]:
    from fastlora.kernels import nf4

    pointers = {"codes_ptr": "*u8", "absmax_ptr": "*u8", "absmax2_ptr": "*fp32", "code2_ptr": "*fp32"}
    pointers |= {"offset_ptr": "*fp32", "code_ptr": "*fp32"}
    sizes = {"scaling": "fp32", "N": "i32", "K": "i32", "R": "i32", "stride_ar": "i32", "stride_bn": "i32"}
    sizes |= {"stride_on": "i32"}
    shared = {"stride_ak": 1, "stride_br": 1, "BLOCKSIZE": 64, "NESTED": True}
    variants = [("nf4_dequantize", {"MERGE": False, "ALIGNED": True}, 16, "*bf16")]
    variants += [("nf4_dequantize_any", {"MERGE": False, "ALIGNED": False}, 16, "*bf16")]
    variants += [(f"nf4_dequantize_merge_r{r}", {"MERGE": True, "ALIGNED": True}, r, "*bf16") for r in (16, 32)]
    variants += [("nf4_dequantize_merge_r16_fp32", {"MERGE": True, "ALIGNED": True}, 16, "*fp32")]
    for name, flags, r, adapter in variants:
        constants = shared | flags | {"PRECISION": "tf32x3", "BLOCK_R": min(nf4.MERGE_BLOCK_R, r)}
        constants |= {"BLOCK_N": nf4.BLOCK_N, "BLOCK_K": nf4.BLOCK_K}
        yield Specimen(
            name,
            nf4._nf4_dequantize_kernel,
            pointers | {"lora_a_ptr": adapter, "lora_b_ptr": adapter, "out_ptr": "*bf16"} | sizes,
            constants,
            nf4.NUM_WARPS,
            {"enable_fp_fusion": False},
            weights=nf4.BLOCK_N * nf4.BLOCK_K,
            twin={"BLOCK_N": 2 * nf4.BLOCK_N},
            uses_tensor_cores=flags["MERGE"],
        )


def _lora_specimens() -> Iterator[Specimen]:
    from fastlora.kernels import lora

    for r in RANKS:
        for adapter, dropout in (("bf16", False), ("fp32", False), ("bf16", True), ("fp32", True)):
            how = "split" if adapter == "fp32" else "narrow"
            block_r = lora.block_r(r)
            rows, columns, warps = lora.tile(block_r, how)
            shrink_rows, shrink_columns, shrink_warps = lora.shrink_tile(block_r, how, dropout)
            suffix = f"_r{r}" + ("_fp32" if adapter == "fp32" else "") + ("_dropout" if dropout else "")
            precision = {"MODE": how, "INTERPRETED": False}
            drops = {"DROPOUT": dropout}
            seed = {"seed_ptr": "*i64"}
            yield Specimen(
                "lora_shrink" + suffix,
                lora._lora_shrink_kernel,
                {"x_ptr": "*bf16", "a_ptr": f"*{adapter}", **seed, "h_ptr": "*fp32", "M": "i32", "K": "i32", "R": "i32"}
                | {
                    "k_per_split": "i32",
                    "threshold": "i32",
                    "keep_scale": "fp32",
                    "stride_xm": "i32",
                    "stride_ar": "i32",
                },
                drops
                | precision
                | {
                    "stride_xk": 1,
                    "stride_ak": 1,
                    "BLOCK_M": shrink_rows,
                    "BLOCK_K": shrink_columns,
                    "BLOCK_R": block_r,
                },
                shrink_warps,
            )
            yield Specimen(
                "lora_x" + suffix,
                lora._lora_x_kernel,
                {"x_ptr": "*bf16", "g_ptr": "*fp32", **seed, "da_ptr": "*fp32", "M": "i32", "K": "i32", "R": "i32"}
                | {"m_per_split": "i32", "threshold": "i32", "keep_scale": "fp32", "stride_xm": "i32"},
                drops | precision | {"stride_xk": 1, "BLOCK_M": rows, "BLOCK_K": columns, "BLOCK_R": block_r},
                warps,
            )
            yield Specimen(
                "lora_expand" + suffix,
                lora._lora_expand_kernel,
                {"h_ptr": "*fp32", "b_ptr": f"*{adapter}", "bias_ptr": "*bf16", **seed, "out_ptr": "*bf16"}
                | {"M": "i32", "N": "i32", "R": "i32", "scaling": "fp32", "threshold": "i32", "stride_bn": "i32"},
                drops
                | precision
                | {"stride_br": 1, "HAS_BIAS": True}
                | {
                    "BLOCK_M": lora.EXPAND_ROWS,
                    "BLOCK_N": lora.EXPAND_COLUMNS,
                    "BLOCK_R": min(lora.MAX_EXPAND_BLOCK_R, block_r),
                },
                lora.EXPAND_WARPS,
            )
            if not dropout:
                yield Specimen(
                    "lora_dy" + suffix,
                    lora._lora_dy_kernel,
                    {"dy_ptr": "*bf16", "b_ptr": f"*{adapter}", "h_ptr": "*fp32", "g_ptr": "*fp32", "db_ptr": "*fp32"}
                    | {"M": "i32", "N": "i32", "R": "i32", "m_per_split": "i32", "scaling": "fp32"}
                    | {"stride_dm": "i32", "stride_bn": "i32"},
                    precision | {"stride_dn": 1, "stride_br": 1, "NEED_G": True, "NEED_DB": True}
                    | {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_R": block_r},
                    warps,
                )  # fmt: skip


def specimens() -> list[Specimen]:
    """Every Triton kernel of the package, in the variants that launches use."""
    return [*_nf4_specimens(), *_lora_specimens()]


def _compile(specimen: Specimen, arch: int, constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    aligned = ("R", "threshold", "M")  # sizes that need not be multiples of 16
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in specimen.types.items()
        if kind.startswith("*") or (kind == "i32" and name not in aligned)
    }
    source = ASTSource(
        fn=specimen.kernel,
        signature={name: specimen.types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs=attributes,
    )
    options = {"num_warps": specimen.warps, **specimen.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _cuobjdump(cubin: bytes, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _instructions(cubin: bytes) -> list[str]:
    names = _INSTRUCTION.findall(_cuobjdump(cubin, "-sass"))
    return [name for name in names if name.split(".")[0] not in _IDLE]


def inspect(specimen: Specimen, arch: int) -> Row:
    """Compile one kernel for one architecture (80, 86, ... 120) and read its machine code."""
    compiled = _compile(specimen, arch, specimen.constants)
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "-res-usage")
    instructions = _instructions(cubin)
    per_weight = None
    if specimen.weights:
        twin = _instructions(_compile(specimen, arch, specimen.constants | specimen.twin).asm["cubin"])
        per_weight = round((len(twin) - len(instructions)) * specimen.warps * 32 / specimen.weights, 2)
    return Row(
        kernel=specimen.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spills=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),  # type: ignore[index]
        shared_bytes=compiled.metadata.shared,
        sass_per_weight=per_weight,
        tensor_core=any(TENSOR_CORE.match(name) for name in instructions),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench static`."""
    parser.add_argument("--out", type=Path, default=Path("bench/results/static.csv"), help="CSV to write anew")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")


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
        for specimen in specimens():
            if arguments.kernel not in specimen.name:
                continue
            for arch in arguments.arch:
                row = asdict(inspect(specimen, arch))
                writer.writerow(row)
                print(" ".join(f"{value!s:>15}" for value in row.values()), flush=True)
    return 0
