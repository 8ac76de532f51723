"""The term "weights": the frozen or trained base.

    16 or 32 bits   2 or 4 bytes a parameter
    NF4             half a byte a weight of the layers' linears, and a scale for each 64 of them: 4 bytes,
                    or with nested scales 1 byte and 4 for each 256 scales. Everything else as it is.
                    Source: arXiv:2305.14314, section 3; `functional.py` of bitsandbytes. Each linear has tables too,
                    of 16 and 256 values of 4 bytes, in blocks of 512 bytes.
    INT8            1 byte a weight, and 4 a row (LLM.int8())
    GPTQ            half a byte a weight and, for each 128 weights of a column, a scale of 2 bytes and a zero of
                    4 bits; 4 bytes a row of x (`g_idx`)

`prepare_model_for_kbit_training` of peft casts what is not quantized to fp32. Under bf16, TRL casts embeddings and head
back. A tied head is one table. Evidence: bytes after loading in the T4 cases, split by kind, to the MiB.
"""

from dataclasses import dataclass

from fastlora.memory.shape import ModelShape
from fastlora.memory.sizes import BLOCK, FP32, HALF

QUANTIZED = ("nf4", "nf4-nested", "int8", "gptq")


@dataclass(frozen=True)
class Entry:
    """Bytes, and how they were found, in words with figures."""

    name: str
    size: int
    how: str


def entries(shape: ModelShape, quantized: str, width: float, norm_width: float, table_width: float) -> list[Entry]:
    """What the base holds.

    Args:
        width: bytes of a value of a weight that is not quantized; norm_width: of the norms; table_width: of embeddings
            and head.
    """
    found = [_linears(shape, quantized, width)]
    biases = shape.layers * sum(linear.values - linear.weights for linear in shape.linears)
    others = shape.layers * shape.others
    norms = shape.layers * shape.norms + shape.final_norm
    for name, values, each in (
        ("embeddings", shape.embeddings, table_width),
        ("lm_head", shape.head, table_width),
        ("norms", norms, norm_width),
        ("biases", biases, norm_width if quantized else width),
        ("routers and sinks", others, width),
    ):
        if values:
            found.append(Entry(name, round(values * each), f"{values:,} values x {each:g}"))
    return found


def _linears(shape: ModelShape, quantized: str, width: float) -> Entry:
    weights, count = shape.in_linears, shape.layers * len(shape.linears)
    if not quantized:
        return Entry("linears", round(weights * width), f"{weights:,} weights x {width:g}")
    if quantized == "int8":
        rows = shape.layers * sum(linear.n * linear.copies for linear in shape.linears)
        return Entry("linears, int8", weights + FP32 * rows, f"{weights:,} weights x 1 + {rows:,} rows x 4")
    if quantized == "gptq":
        groups = weights // 128
        rows = shape.layers * sum(linear.k * linear.copies for linear in shape.linears)
        size = weights // 2 + groups * HALF + groups // 2 + FP32 * rows
        return Entry("linears, GPTQ", size, f"{weights:,} weights / 2 + {groups:,} groups x 2.5 + {rows:,} x 4")
    scales = weights // 64
    nested = quantized == "nf4-nested"
    tables = count * BLOCK * (1 + 2 + 1 if nested else 1)  # values of codes; of scales; the offset
    held = scales + scales // 256 * FP32 if nested else scales * FP32
    each = "(1 + 4/256)" if nested else "4"
    how = f"{weights:,} weights / 2 + {scales:,} scales x {each} + tables"
    return Entry("linears, NF4", weights // 2 + held + tables, how)
