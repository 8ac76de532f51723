"""The grouped products for `bench static`: few rows an expert and many, both directions, adapters of both widths."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.machine_code.specimen import ARCHITECTURES, NF4_TYPES, Specimen

N, K, EXPERTS = 2048, 2048, 128


def specimens() -> Iterator[Specimen]:
    """Launches for few and many rows an expert, each cut as its architectures cut it; NF4 until it is expanded."""
    kinds: tuple[tuple[int, ...], ...] = ((80,), (86, 89, 120), (90, 100))
    for archs in kinds:
        for op in ("linear", "linear_t"):
            for rows, adapter in ((16, "fp32"), (64, "fp32"), (512, "fp32"), (512, "bf16")):
                yield _dense(op, rows, adapter, archs)
    kinds = ((80, 86, 89, 120), (90, 100))
    for archs in kinds:
        for op in ("linear", "linear_t"):
            for rows, adapter in ((16, "fp32"), (64, "bf16"), (128, "fp32")):
                yield _packed(op, rows, adapter, archs)


def odd() -> Iterator[Specimen]:
    """Launches over sizes and strides that are no multiples of 16; blocks of NF4 divide rows."""
    for op in ("linear", "linear_t"):
        for rows in (16, 64):
            yield _loose(_dense(op, rows, "fp32", ARCHITECTURES, False), {"EVEN_SUM": False, "EVEN_OUT": False})
            of_n = "EVEN_OUT" if op == "linear" else "EVEN_SUM"
            yield _loose(_packed(op, rows, "fp32", ARCHITECTURES, False), {of_n: False}, frozenset({"K"}))


def _loose(specimen: Specimen, flags: dict[str, Any], even: frozenset[str] = frozenset()) -> Specimen:
    numbers = frozenset(name for name, kind in specimen.types.items() if kind == "i32") - even
    changed: dict[str, Any] = {"constants": specimen.constants | {"LOOSE": True} | flags, "odd": numbers, "weights": 0}
    return replace(specimen, name=f"{specimen.name}_odd", main_loop=False, **changed)


def _common(cut: Any, op: str, adapter: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants that both kernels take: B [E, N, R] as peft packs it, A [E, R, K] in order."""
    from fastlora.kernels.grouped import GROUP_M

    types = {"ends_ptr": "*i32", "h_ptr": "*fp32", "b_ptr": f"*{adapter}", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("R", "experts", "row_tiles", "stride_xs"), "i32") | {"scaling": "fp32"}
    types |= {"x_ptr": f"tensordesc<bf16[{cut.block_m}, {cut.block_k}]>" if cut.tma else "*bf16"}
    unit = "stride_be" if op == "linear" else "stride_bn"
    types |= {name: "i32" for name in ("stride_be", "stride_bn", "stride_br") if name != unit}
    constants: dict[str, Any] = {
        unit: 1,
        "TMA": cut.tma,
        "EVEN_SUM": True,
        "EVEN_OUT": True,
        "INTERPRETED": False,
        "LOOSE": False,
    }
    constants |= {"LORA": True, "FP32_ADAPTERS": adapter == "fp32", "HAS_BIAS": op == "linear"}
    constants |= {"EXPERTS": 2 * EXPERTS, "GROUP_M": GROUP_M}
    constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k}
    return types, constants


def _name(kind: str, op: str, rows: int, adapter: str) -> str:
    return f"{kind}_{op}_m{rows}" + ("_fp32" if adapter == "fp32" else "")


def _dense(op: str, rows: int, adapter: str, archs: tuple[int, ...], is_aligned: bool = True) -> Specimen:
    from fastlora.kernels import grouped

    cut = grouped.default_config(op, rows, False, N, K, (archs[0] // 10, archs[0] % 10), is_aligned)
    types, constants = _common(cut, op, adapter)
    along_sum = op == "linear"  # the stack is [E, N, K], and linear_t sums over N
    tile = (cut.block_n, cut.block_k) if along_sum else (cut.block_k, cut.block_n)
    types |= {"w_ptr": f"tensordesc<bf16[{tile[0]}, {tile[1]}]>" if cut.tma else "*bf16"}
    unit, other = ("stride_wk", "stride_wn") if along_sum else ("stride_wn", "stride_wk")
    types |= dict.fromkeys(("columns", "length", "stride_we", other), "i32")
    return Specimen(
        _name("grouped", op, rows, adapter), grouped._grouped_dense_kernel, types,
        constants | {unit: 1, "ALONG_SUM": along_sum}, cut.warps, {"num_stages": cut.stages}, archs=archs,
    )  # fmt: skip


def _packed(op: str, rows: int, adapter: str, archs: tuple[int, ...], is_aligned: bool = True) -> Specimen:
    from fastlora.kernels import grouped
    from fastlora.kernels.fused_config import uses_mma_sync

    capability = archs[0] // 10, archs[0] % 10
    cut = grouped.default_config(op, rows, True, N, K, capability, is_aligned)
    types, constants = _common(cut, op, adapter)
    of_weight = (cut.block_k, cut.block_n) if op == "linear_t" else (cut.block_n, cut.block_k)
    types |= NF4_TYPES | dict.fromkeys(("N", "K", "row_words"), "i32")
    if cut.tma:
        types |= {"codes_ptr": f"tensordesc<i32[{of_weight[0]}, {of_weight[1] // 8}]>"}
    constants |= {"TRANSPOSED": op == "linear_t", "BLOCKSIZE": 64, "NESTED": True, "LOOKUP": "shfl"}
    constants |= {"MMA_SYNC": uses_mma_sync(capability, cut.block_m)}
    return Specimen(
        _name("nf4_grouped", op, rows, adapter), grouped._grouped_nf4_kernel, types, constants, cut.warps,
        {"num_stages": cut.stages, "enable_fp_fusion": False},
        weights=of_weight[0] * of_weight[1], main_loop=True, archs=archs,
    )  # fmt: skip
