"""Typical launches of the Triton kernels, as `bench static` compiles them: types of arguments, constants, tiles."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from bench.machine_code import grouped_specimens
from bench.machine_code.specimen import ARCHITECTURES, NF4_TYPES, Specimen

RANKS = (16, 32, 64)


def _nf4_specimens() -> Iterator[Specimen]:
    from fastlora.kernels import nf4

    plain = _nf4_specimen("nf4_dequantize", nf4.FLAT, counted=True)
    yield plain
    yield replace(plain, name="nf4_dequantize_gather", constants=plain.constants | {"LOOKUP": "gather"})
    for out in ("fp16", "fp32"):
        yield _nf4_specimen(f"nf4_dequantize_to_{out}", nf4.FLAT, types={"out_ptr": f"*{out}"})
    yield _nf4_specimen("nf4_dequantize_any", nf4.SMALL, {"ALIGNED": False, "EVEN": False})
    fp32 = {"lora_a_ptr": "*fp32", "lora_b_ptr": "*fp32"}
    for how, types in (("narrow", {}), ("split", fp32)):
        flags = {"ALIGNED": False, "EVEN": False, "MERGE": True, "PRECISION": how}
        yield _nf4_specimen("nf4_dequantize_merge_any" + ("_fp32" if types else ""), nf4.SMALL, flags, types)
    for r, how, counted in ((16, "narrow", True), (32, "narrow", False), (16, "split", True), (64, "split", False)):
        cut = nf4.tile(how, r, True)
        flags = {"MERGE": True, "PRECISION": how, "WHOLE_R": r <= cut.block_r}
        name = f"nf4_dequantize_merge_r{r}" + ("_fp32" if how == "split" else "")
        merged = _nf4_specimen(name, cut, flags, fp32 if how == "split" else {}, counted)
        yield merged
        if name == "nf4_dequantize_merge_r16":
            yield replace(merged, name=f"{name}_gather", constants=merged.constants | {"LOOKUP": "gather"}, weights=0)


def _nf4_specimen(
    name: str, cut: Any, flags: Mapping[str, Any] = {}, types: Mapping[str, str] = {}, counted: bool = False
) -> Specimen:
    """A launch of the dequantize kernel: nested scales, aligned and even shapes, unless `flags` say otherwise."""
    from fastlora.kernels import nf4

    kinds = NF4_TYPES | {"out_ptr": "*bf16"}
    kinds |= {"lora_a_ptr": "*bf16", "lora_b_ptr": "*bf16", "scaling": "fp32", "K": "i32", "R": "i32"}
    kinds |= {"stride_ar": "i32", "stride_bn": "i32", "stride_on": "i32"}
    constants: dict[str, Any] = {"stride_ak": 1, "stride_br": 1, "BLOCKSIZE": 64}
    constants |= {"NESTED": True, "ALIGNED": True, "EVEN": True}
    constants |= {"MERGE": False, "LOOKUP": "shfl", "PRECISION": "none"}
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
    """The four kernels for one rank, on every architecture; with `segments`, for rows with adapters of their own."""
    for major, archs in ((8, tuple(arch for arch in ARCHITECTURES if arch // 10 not in (9, 10))), (9, (90, 100))):
        for specimen in _low_rank_on(major, r, adapter, dropout, segments, owned):
            yield replace(specimen, archs=archs)


def _low_rank_on(major: int, r: int, adapter: str, dropout: bool, segments: int, owned: bool) -> Iterator[Specimen]:
    from fastlora.kernels import lora, lora_plan

    how = "split" if adapter == "fp32" else "narrow"
    block_r = lora.block_r(r)
    shrink, dy, x = (lora_plan.tile(op, block_r, how, dropout, major) for op in ("shrink", "dy", "x"))
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
        masked | columns_last | {"stride_ak": 1, "BLOCK_M": shrink.rows, "BLOCK_K": shrink.columns},
        shrink.warps,
    )
    yield Specimen(
        "lora_x" + suffix,
        lora._lora_x_kernel,
        rows_of_x | {"g_ptr": "*fp32", "da_ptr": "*fp32", "m_per_split": "i32", "stride_dr": "i32"},
        masked | columns_last | {"stride_dk": 1, "BLOCK_M": x.rows, "BLOCK_K": x.columns},
        x.warps,
    )
    block = min(lora.MAX_EXPAND_BLOCK_R, block_r)
    expanded = {"BLOCK_M": lora.EXPAND_ROWS, "BLOCK_N": lora.EXPAND_COLUMNS, "BLOCK_R": block, "stride_br": 1}
    expanded |= {"HAS_BIAS": True, "ADDS": True, "RESCALES": False, "WHOLE_R": r <= block}
    expanded |= {"STEPS": 1 if segments else lora.MAX_EXPAND_STEPS}
    yield Specimen(
        "lora_expand" + suffix,
        lora._lora_expand_kernel,
        seeded
        | {"h_ptr": "*fp32", "b_ptr": f"*{adapter}", "bias_ptr": "*bf16", "base_ptr": "*bf16", "out_ptr": "*bf16"}
        | {"N": "i32", "scaling": "fp32", "stride_bn": "i32"},
        masked | expanded,
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
        | {"BLOCK_M": dy.rows, "BLOCK_N": dy.columns},
        dy.warps,
    )  # fmt: skip


def fused_specimens() -> Iterator[Specimen]:
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
    types = NF4_TYPES | {"x_ptr": "*bf16", "h_ptr": "*fp32", "b_ptr": f"*{adapter}", "seed_ptr": "*i64"}
    if cut.tma:
        types |= {"x_ptr": f"tensordesc<bf16[{cut.block_m}, {cut.block_k}]>"}
        types |= {"codes_ptr": f"tensordesc<i32[{rows}, {columns // 8}]>"}
    types |= {"bias_ptr": "*bf16", "out_ptr": "*fp32" if "SPLIT" in flags else "*bf16", "scaling": "fp32"}
    types |= dict.fromkeys(("M", "N", "K", "R", "row_words", "per_split", "threshold", "stride_xm"), "i32")
    types |= {"stride_br" if transposed else "stride_bn": "i32"}
    constants: dict[str, Any] = {"TRANSPOSED": transposed, "BLOCKSIZE": 64}
    constants |= {"stride_bn" if transposed else "stride_br": 1}
    constants |= {"NESTED": True, "LOOKUP": "shfl", "TMA": cut.tma}
    constants |= {"MMA_SYNC": uses_mma_sync(capability, cut.block_m), "LORA": True, "INTERPRETED": False}
    constants |= {"EVEN_SUM": True, "EVEN_OUT": True, "LOOSE": False}
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

    kinds = NF4_TYPES | {"x_ptr": "*bf16", "base_ptr": "*fp32", "h_ptr": "*fp32", "M": "i32"}
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


def _dora_specimens() -> Iterator[Specimen]:
    from fastlora.kernels import dora

    kinds = NF4_TYPES | {"changed_ptr": "*i32", "weight_ptr": "*bf16", "out_ptr": "*fp32", "scaling": "fp32"}
    kinds |= dict.fromkeys(("N", "K", "R", "stride_wn", "stride_ar", "stride_bn"), "i32")
    constants: dict[str, Any] = {"stride_wk": 1, "stride_ak": 1, "stride_br": 1, "BLOCKSIZE": 64, "NESTED": True}
    constants |= {"ALIGNED": True, "LOOKUP": "shfl", "PRECISION": "tf32x3"}
    constants |= {"BLOCK_N": dora.BLOCK_N, "BLOCK_K": dora.BLOCK_K, "WIDTH": dora.WIDTH}
    for base, adapter in product(("nf4", "dense"), ("fp32", "bf16")):
        adapters = {"a_ptr": f"*{adapter}", "b_ptr": f"*{adapter}"}
        name = f"dora_norms_{base}" + ("_fp32" if adapter == "fp32" else "")
        yield Specimen(
            name, dora._row_norms_kernel, kinds | adapters, constants | {"DENSE": base == "dense"}, 4,
            {"enable_fp_fusion": False},
        )  # fmt: skip
    sums = {"dy_ptr": "*bf16", "z_ptr": "*bf16", "dz_ptr": "*bf16"}
    sums |= dict.fromkeys(("factor_ptr", "dot_ptr", "total_ptr"), "*fp32")
    sums |= dict.fromkeys(("M", "N", "m_per_split", "stride_dm", "stride_zm"), "i32")
    wanted = {"NEED_DZ": True, "NEED_DOT": True, "NEED_TOTAL": True, "stride_dn": 1, "stride_zn": 1}
    yield Specimen(
        "dora_rescale_backward", dora._rescale_backward_kernel, sums,
        wanted | {"ROWS": dora.ROWS, "COLUMNS": dora.COLUMNS}, 4, uses_tensor_cores=False,
    )  # fmt: skip


def _between_specimens() -> Iterator[Specimen]:
    """Norms of hidden states and of heads, rotary embedding, gated activations, cross-entropy."""
    from fastlora.kernels import cross_entropy, gated, rms_norm, rotary

    plain: dict[str, Any] = {"uses_tensor_cores": False}
    norm = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "rstd_ptr": "*fp32", "offset": "fp32"}
    norm |= dict.fromkeys(("M", "N", "stride_xm", "stride_xh", "stride_dym"), "i32")
    for n in (128, 4096, 16384):
        cut = rms_norm.tile(n)
        if n == 128:
            norm["heads"] = "i32"
        else:
            norm.pop("heads", None)
            cut["heads"] = 1  # which a launch makes a constant
        warps = cut.pop("num_warps")
        forward = norm | {"y_ptr": "*bf16", "eps": "fp32"}
        del forward["stride_dym"]
        yield Specimen(f"rms_norm_{n}", rms_norm._rms_norm_kernel, forward, cut, warps, **plain)
        backward = norm | {"dy_ptr": "*bf16", "dx_ptr": "*bf16"}
        kernel = rms_norm._rms_norm_backward_kernel
        yield Specimen(f"rms_norm_{n}_backward", kernel, backward, cut, warps, **plain)
    turned = dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr"), "*bf16")
    turned |= {f"stride_{of}": "i32" for of in ("qb", "qs", "qh", "kb", "ks", "kh", "cb", "cs")} | {"length": "i32"}
    for size, rotated, back in ((128, 128, False), (128, 128, True), (96, 72, False)):
        constants = rotary._constants(32, 8, size, rotated // 2, False, back)
        warps = constants.pop("num_warps")
        name = f"rotary_{size}" + ("_part" if rotated < size else "") + ("_backward" if back else "")
        yield Specimen(name, rotary._rotary_kernel, turned, constants, warps, **plain)
    for act in gated.ACTIVATIONS:
        constants = gated._constants(act)
        warps = constants.pop("num_warps")
        types = dict.fromkeys(("gate_ptr", "up_ptr"), "*bf16")
        types |= dict.fromkeys(("M", "N", "stride_gm", "stride_um"), "i32")
        yield Specimen(f"gated_{act}", gated._gated_kernel, types | {"out_ptr": "*bf16"}, constants, warps, **plain)
        types |= dict.fromkeys(("dy_ptr", "dgate_ptr", "dup_ptr"), "*bf16")
        types |= {"stride_dm": "i32", "stride_om": "i32"}
        kernel = gated._gated_backward_kernel
        yield Specimen(f"gated_{act}_backward", kernel, types, constants, warps, **plain)
    for name, flags, z in (
        ("", (False, False, True), "*fp32"),
        ("_evaluated", (False, False, False), "*fp32"),
        ("_capped_smooth", (True, True, True), "*bf16"),
    ):
        constants = cross_entropy._constants(*flags)
        warps = constants.pop("num_warps")
        types = {"z_ptr": z, "label_ptr": "*i64", "factor_ptr": "*fp32", "loss_ptr": "*fp32", "dz_ptr": "*bf16"}
        types |= dict.fromkeys(("V", "stride_zm", "stride_dm", "ignored"), "i32")
        types |= dict.fromkeys(("scale", "cap", "smoothing"), "fp32")
        kernel = cross_entropy._cross_entropy_kernel
        yield Specimen(f"cross_entropy{name}", kernel, types, constants, warps, **plain)


def _odd(specimen: Specimen) -> Iterator[Specimen]:
    """The same launch where sizes and strides are no multiples of 16; none where such a launch is another one.

    Blocks of NF4 divide rows in the products over packed weights, which leaves N and the rank.
    """
    from fastlora.kernels import dora, lora_plan

    constants, name, types, warps = dict(specimen.constants), specimen.name, specimen.types, specimen.warps
    odd = frozenset(name for name, kind in types.items() if kind == "i32")
    even: dict[str, bool] = {flag: False for flag in ("EVEN", "ALIGNED", "EVEN_OUT") if flag in constants}
    if "grouped" in name or (name.startswith("nf4_dequantize") and constants["ALIGNED"]):
        return
    if name.startswith(("nf4_linear", "decode")):
        odd = frozenset({"N", "row_words", "stride_bn"} & types.keys())
    if name.startswith("nf4_linear_t"):  # dy has N columns: no tensor maps
        odd, even = odd | {"stride_xm"}, {"EVEN_SUM": False}
        if constants["TMA"]:
            types, warps = types | {"x_ptr": "*bf16", "codes_ptr": "*u8"}, 8
            even |= {"TMA": False}
    for cut in ("BLOCK_N", "BLOCK_K") if name.startswith("lora_") else ():
        if cut in constants:
            constants["BLOCK_M"], constants[cut] = lora_plan.halved(constants["BLOCK_M"], constants[cut])
    if name.startswith("dora_norms"):
        constants["BLOCK_K"], warps = dora.BLOCK_K // 2, 8
    elif name.startswith("decode_m2"):
        constants["BLOCK_K"] //= 2
    elif name.startswith("dora"):
        constants["ROWS"] = dora.ROWS // 2
    constants |= {"LOOSE": True} if "LOOSE" in constants else {}
    changed: dict[str, Any] = {"types": types, "constants": constants | even, "warps": warps, "odd": odd, "weights": 0}
    yield replace(specimen, name=f"{name}_odd", main_loop=False, **changed)


def _rank_8(specimen: Specimen) -> Iterator[Specimen]:
    """The same launch at peft's default rank, where only the rows of B are too short to begin at multiples of 16."""
    name = specimen.name
    fitting = any(part in name for part in ("nf4_linear", "decode_sum", "dora_norms", "_r16"))
    if fitting and "stride_bn" in specimen.types:
        constants = specimen.constants | ({"LOOSE": True} if "LOOSE" in specimen.constants else {})
        changed: dict[str, Any] = {"constants": constants, "odd": frozenset({"stride_bn"}), "weights": 0}
        yield replace(specimen, name=f"{name}_rank8", main_loop=False, **changed)


def specimens() -> list[Specimen]:
    """Every Triton kernel of the package, in the variants that launches use; those over odd sizes last."""
    found = [*_nf4_specimens(), *fused_specimens(), *_lora_specimens(), *_decode_specimens()]
    found += [*_dora_specimens(), *grouped_specimens.specimens(), *_between_specimens()]
    loose = [other for specimen in found for other in (*_rank_8(specimen), *_odd(specimen))]
    return [*found, *grouped_specimens.odd(), *loose]
