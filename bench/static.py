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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

SUMMARY = "compile every kernel for sm_80 to sm_120 and count registers, spills, shared memory, instructions"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may use
TENSOR_CORE = re.compile(r"^(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")
_PLACED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);")  # address, name, operands
IDLE = ("NOP", "BRA", "EXIT")
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
    main_loop: bool = False  # count the loop around the product instead of the difference to a twin
    archs: tuple[int, ...] = ARCHITECTURES  # where launches use it


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

    plain = _nf4_specimen("nf4_dequantize", nf4.FLAT, counted=True)
    yield plain
    yield replace(plain, name="nf4_dequantize_gather", constants=plain.constants | {"LOOKUP": "gather"})
    for out in ("fp16", "fp32"):
        yield _nf4_specimen(f"nf4_dequantize_to_{out}", nf4.FLAT, types={"out_ptr": f"*{out}"})
    yield _nf4_specimen("nf4_dequantize_any", nf4.SMALL, {"ALIGNED": False, "EVEN": False})
    yield _nf4_specimen("nf4_dequantize_extend", nf4.tile("none", 16, True), {"EXTEND": True})
    fp32 = {"lora_a_ptr": "*fp32", "lora_b_ptr": "*fp32"}
    for r, how, counted in ((16, "narrow", True), (32, "narrow", False), (16, "split", True), (64, "split", False)):
        cut = nf4.tile(how, r, True)
        flags = {"MERGE": True, "PRECISION": how, "WHOLE_R": r <= cut.block_r}
        name = f"nf4_dequantize_merge_r{r}" + ("_fp32" if how == "split" else "")
        merged = _nf4_specimen(name, cut, flags, fp32 if how == "split" else {}, counted)
        yield merged
        if name == "nf4_dequantize_merge_r16":
            for suffix, change in (("gather", {"LOOKUP": "gather"}), ("row_scale", {"ROW_SCALE": True})):
                yield replace(merged, name=f"{name}_{suffix}", constants=merged.constants | change, weights=0)


def _nf4_specimen(
    name: str, cut: Any, flags: Mapping[str, Any] = {}, types: Mapping[str, str] = {}, counted: bool = False
) -> Specimen:
    """A launch of the dequantize kernel: nested scales, aligned and even shapes, unless `flags` say otherwise."""
    from fastlora.kernels import nf4

    kinds = {"codes_ptr": "*u8", "absmax_ptr": "*u8", "absmax2_ptr": "*fp32", "code2_ptr": "*fp32"}
    kinds |= {"offset_ptr": "*fp32", "code_ptr": "*fp32", "row_scale_ptr": "*fp32", "out_ptr": "*bf16"}
    kinds |= {"lora_a_ptr": "*bf16", "lora_b_ptr": "*bf16", "scaling": "fp32", "K": "i32", "R": "i32"}
    kinds |= {"stride_ar": "i32", "stride_bn": "i32", "stride_on": "i32"}
    constants: dict[str, Any] = {"stride_ak": 1, "stride_br": 1, "BLOCKSIZE": 64}
    constants |= {"NESTED": True, "ALIGNED": True, "EVEN": True}
    constants |= {"MERGE": False, "EXTEND": False, "ROW_SCALE": False, "LOOKUP": "shfl", "PRECISION": "none"}
    constants |= {"INTERPRETED": False, "WHOLE_R": True, "STEPS": cut.steps, "BLOCK_R": cut.block_r}
    constants |= {"BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k}
    if cut == nf4.FLAT:
        constants["N"] = 1
    else:
        kinds["N"] = "i32"
    return Specimen(
        name,
        nf4._nf4_dequantize_kernel,
        kinds | dict(types),
        constants | dict(flags),
        cut.warps,
        {"enable_fp_fusion": False},
        weights=cut.block_n * cut.block_k * cut.steps if counted else 0,
        twin={"BLOCK_K": 2 * cut.block_k} if cut == nf4.FLAT else {"STEPS": 2 * cut.steps},
        uses_tensor_cores="merge" in name,
    )


def _lora_specimens() -> Iterator[Specimen]:
    for r in RANKS:
        for adapter, dropout in product(("bf16", "fp32"), (False, True)):
            yield from _low_rank(r, adapter, dropout)
    yield from _low_rank(16, "bf16", False, segments=128)  # experts
    yield from _low_rank(16, "fp32", True, segments=32, owned=True)  # samples with different adapters


def _low_rank(r: int, adapter: str, dropout: bool, segments: int = 0, owned: bool = False) -> Iterator[Specimen]:
    """The four kernels for one rank; `segments`: for rows with adapters of their own."""
    from fastlora.kernels import lora, lora_plan

    how = "split" if adapter == "fp32" else "narrow"
    block_r = lora.block_r(r)
    rows, columns, warps = lora_plan.tile(block_r, how)
    shrink_rows, shrink_columns, shrink_warps = lora_plan.shrink_tile(block_r, how, dropout)
    suffix = f"_r{r}" + ("_fp32" if adapter == "fp32" else "") + ("_dropout" if dropout else "")
    suffix += "_segments" if segments else ""
    common: dict[str, Any] = {"MODE": how, "INTERPRETED": False, "SEGMENTS": segments, "OWNED": owned}
    common |= {"FACTOR": 0 if owned else -1, "BLOCK_R": block_r}
    masked, columns_last = common | {"DROPOUT": dropout}, {"stride_xk": 1}
    kinds = {"ends_ptr": "*i32", "owner_ptr": "*i32", "facts_ptr": "*fp32", "segments": "i32", "adapters": "i32"}
    kinds |= {"stride_adapter": "i32", "M": "i32", "R": "i32"}
    seeded = kinds | {"seed_ptr": "*i64", "threshold": "i32"}
    rows_of_x = seeded | {"x_ptr": "*bf16", "keep_scale": "fp32", "stride_xm": "i32", "K": "i32"}
    yield Specimen(
        "lora_shrink" + suffix,
        lora._lora_shrink_kernel,
        rows_of_x | {"a_ptr": f"*{adapter}", "h_ptr": "*fp32", "k_per_split": "i32", "stride_ar": "i32"},
        masked | columns_last | {"stride_ak": 1, "BLOCK_M": shrink_rows, "BLOCK_K": shrink_columns},
        shrink_warps,
    )
    yield Specimen(
        "lora_x" + suffix,
        lora._lora_x_kernel,
        rows_of_x | {"g_ptr": "*fp32", "da_ptr": "*fp32", "m_per_split": "i32", "stride_dr": "i32"},
        masked | columns_last | {"stride_dk": 1, "BLOCK_M": rows, "BLOCK_K": columns},
        warps,
    )
    expanded = {"BLOCK_M": lora.EXPAND_ROWS, "BLOCK_N": lora.EXPAND_COLUMNS, "stride_br": 1, "HAS_BIAS": True}
    yield Specimen(
        "lora_expand" + suffix,
        lora._lora_expand_kernel,
        seeded
        | {"h_ptr": "*fp32", "b_ptr": f"*{adapter}", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
        | {"N": "i32", "scaling": "fp32", "stride_bn": "i32"},
        masked | expanded | {"BLOCK_R": min(lora.MAX_EXPAND_BLOCK_R, block_r)},
        lora.EXPAND_WARPS,
    )
    if dropout and not segments:
        return
    yield Specimen(
        "lora_dy" + suffix,
        lora._lora_dy_kernel,
        kinds
        | {"dy_ptr": "*bf16", "b_ptr": f"*{adapter}", "h_ptr": "*fp32", "g_ptr": "*fp32", "db_ptr": "*fp32"}
        | {"N": "i32", "m_per_split": "i32", "scaling": "fp32", "stride_dm": "i32", "stride_bn": "i32"},
        common | {"stride_dn": 1, "stride_br": 1, "NEED_G": True, "NEED_DB": True}
        | {"BLOCK_M": rows, "BLOCK_N": columns},
        warps,
    )  # fmt: skip


def _fused_specimens() -> Iterator[Specimen]:
    """Few tokens, with the sum split, and as many as a tile takes; adapters of both widths; each as launches cut it."""
    from fastlora.kernels import fused

    launches: tuple[tuple[str, int, str, dict[str, bool]], ...] = (
        ("linear", 16, "fp32", {"SPLIT": True}),
        ("linear", 128, "bf16", {"HAS_BIAS": True}),
        ("linear_t", 16, "bf16", {}),
        ("linear_t", 128, "fp32", {}),
        ("linear_t", 64, "fp32", {"DROPOUT": True}),
    )
    for archs in ((80, 86, 89, 120), (90, 100)):
        for op, m, adapter, flags in launches:
            yield _fused_specimen(op, m, adapter, flags, archs)
    types = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("size", "N", "splits"), "i32")
    constants = {"HAS_BIAS": True, "BLOCK": fused.SUM_BLOCK}
    yield Specimen("nf4_fused_sum", fused._sum_splits_kernel, types, constants, 4, uses_tensor_cores=False)


def _fused_specimen(op: str, m: int, adapter: str, flags: Mapping[str, Any], archs: tuple[int, ...]) -> Specimen:
    """A launch of the fused product for m tokens: nested scales and even shapes."""
    from fastlora.kernels import fused
    from fastlora.kernels.fused_config import uses_mma_sync

    transposed, capability = op == "linear_t", (archs[0] // 10, archs[0] % 10)
    cut = fused.default_config(op, m, 4096, 4096, capability)
    rows, columns = (cut.block_k, cut.block_n) if transposed else (cut.block_n, cut.block_k)
    types = {"x_ptr": "*bf16", "codes_ptr": "*u8", "absmax_ptr": "*u8", "absmax2_ptr": "*fp32", "code2_ptr": "*fp32"}
    if cut.tma:
        types |= {"x_ptr": f"tensordesc<bf16[{cut.block_m}, {cut.block_k}]>"}
        types |= {"codes_ptr": f"tensordesc<i32[{rows}, {columns // 8}]>"}
    types |= {"offset_ptr": "*fp32", "code_ptr": "*fp32", "h_ptr": "*fp32", "b_ptr": f"*{adapter}", "seed_ptr": "*i64"}
    types |= {"bias_ptr": "*bf16", "out_ptr": "*fp32" if "SPLIT" in flags else "*bf16", "scaling": "fp32"}
    types |= dict.fromkeys(("M", "N", "K", "R", "row_words", "per_split", "threshold", "stride_xm"), "i32")
    types |= {"stride_br" if transposed else "stride_bn": "i32"}
    constants: dict[str, Any] = {"TRANSPOSED": transposed, "BLOCKSIZE": 64}
    constants |= {"stride_bn" if transposed else "stride_br": 1}
    constants |= {"NESTED": True, "LOOKUP": "shfl", "TMA": cut.tma}
    constants |= {"MMA_SYNC": uses_mma_sync(capability, cut.block_m), "LORA": True, "INTERPRETED": False}
    constants |= {"EVEN_SUM": True, "EVEN_OUT": True}
    constants |= {"FP32_ADAPTERS": adapter == "fp32", "DROPOUT": False, "HAS_BIAS": False, "SPLIT": False}
    constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k}
    options = {"num_stages": cut.stages, "enable_fp_fusion": False}
    name = f"nf4_{op}_m{m}" + ("_fp32" if adapter == "fp32" else "") + ("_dropout" if "DROPOUT" in flags else "")
    return Specimen(
        name, fused._nf4_fused_kernel, types, constants | dict(flags), cut.warps, options,
        weights=rows * columns, main_loop=True, archs=archs,
    )  # fmt: skip


def _decode_specimens() -> Iterator[Specimen]:
    from fastlora.kernels import decode

    kinds = {"x_ptr": "*bf16", "codes_ptr": "*u8", "absmax_ptr": "*u8", "absmax2_ptr": "*fp32", "code2_ptr": "*fp32"}
    kinds |= {"offset_ptr": "*fp32", "code_ptr": "*fp32", "base_ptr": "*fp32", "h_ptr": "*fp32", "M": "i32"}
    kinds |= dict.fromkeys(("N", "K", "R", "k_per_split", "k_per_h", "stride_xm", "stride_ar"), "i32")
    kinds |= dict.fromkeys(("splits", "h_splits", "h_programs"), "i32")
    constants = {"stride_ak": 1, "BLOCKSIZE": 64, "NESTED": True, "LOOKUP": "shfl", "EVEN": True, "DTYPE": "bf16"}
    constants |= {"INTERPRETED": False, "BLOCK_HK": decode.BLOCK_HK}
    for tokens, (block_n, block_k) in decode.TILE.items():
        for adapter, how, block_r in (("bf16", "narrow", 16), ("fp32", "split", decode.MAX_BLOCK_R)):
            yield Specimen(
                f"decode_m{tokens}" + ("_fp32" if adapter == "fp32" else ""),
                decode._decode_kernel,
                kinds | {"a_ptr": f"*{adapter}"},
                constants | {"MODE": how, "TOKENS": tokens, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": block_r},
                decode.NUM_WARPS,
                {"num_stages": decode.NUM_STAGES},
                weights=block_n * block_k,
                main_loop=True,
            )
    sizes = dict.fromkeys(("M", "N", "R", "splits", "h_splits", "stride_bn"), "i32")
    pointers = {"base_ptr": "*fp32", "h_ptr": "*fp32", "b_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    blocks = {"BLOCK_N": decode.SUM_BLOCK_N, "BLOCK_R": decode.SUM_BLOCK_R}
    for tokens in (1, 16):
        yield Specimen(
            f"decode_sum_m{tokens}",
            decode._decode_sum_kernel,
            pointers | sizes | {"scaling": "fp32"},
            {"stride_br": 1, "HAS_BIAS": True, "TOKENS": tokens, **blocks},
            decode.NUM_WARPS,
            uses_tensor_cores=False,
        )


def specimens() -> list[Specimen]:
    """Every Triton kernel of the package, in the variants that launches use."""
    from bench import grouped_specimens

    found = [*_nf4_specimens(), *_fused_specimens(), *_lora_specimens(), *_decode_specimens()]
    return [*found, *grouped_specimens.specimens()]


def _compiled_rows(archs: list[int], kernel: str) -> Iterator[Row]:
    """Rows of the CUDA library, if it has been built, of the kernels whose name contains `kernel`."""
    from bench import fatbin
    from fastlora import cuda_native

    loaded, text = cuda_native.status()
    if loaded:
        yield from (row for row in fatbin.rows(*cuda_native.static_facts(), archs) if kernel in row.kernel)
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
    instructions = _instructions(cubin)
    per_weight = None
    if specimen.main_loop:
        per_weight = round(len(main_loop(cubin)) * specimen.warps * 32 / specimen.weights, 2)
    elif specimen.weights:
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
