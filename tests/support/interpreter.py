"""Triton's interpreter with bf16 as hardware has it.

By default the interpreter keeps bf16 as 16-bit integers: `tl.dot` multiplies those integers, arithmetic adds them, and
a cast from fp32 cuts the lower bits off. `teach_bf16` widens bf16 to fp32 before any arithmetic, so that every product
of two bf16 numbers is exact, and rounds to nearest even on the way back, as tensor cores and `cvt.rn` do.
"""

from typing import Any

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16, given as uint16, in fp32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16, ties to even, as uint16; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def teach_bf16() -> None:
    """Patch the interpreter of this process; harmless if nothing is interpreted, and when repeated."""
    import triton.language as tl
    from triton.runtime import interpreter

    kind: Any = interpreter.InterpreterBuilder
    if getattr(kind, "knows_bf16", False):
        return
    handle = interpreter.TensorHandle
    cast, fp_to_fp, dot = kind.cast_impl, kind.create_fp_to_fp, kind.create_dot
    binary, unary = kind.binary_op, kind.unary_op

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def wide(value: Any) -> Any:
        return handle(widen(value.data), tl.float32) if is_bf16(value) else value

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else handle(narrow(cast(self, src, tl.float32).data), tl.bfloat16)
        return cast(self, wide(src), dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (is_bf16(lhs) or is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        result = op(wide(lhs).data, wide(rhs).data)
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return handle(narrow(op(widen(arg.data))), tl.bfloat16) if is_bf16(arg) else unary(self, arg, op)

    kind.cast_impl, kind.create_fp_to_fp, kind.create_dot = cast_impl, create_fp_to_fp, create_dot
    kind.binary_op, kind.unary_op = binary_op, unary_op
    kind.knows_bf16 = True
