"""PTX in Triton's interpreter: as much of the language as the kernels' `inline_asm_elementwise` use.

The elements of a tensor are dealt out to the lanes of as many warps as it takes, in an order drawn at
random, with leftover lanes full of noise: asm that shuffles must be right in any layout. A register is
one 32- or 64-bit number a thread, and an instruction runs for all threads at once.
"""

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np

WARP = 32
_rng = np.random.default_rng(0)


def run(asm: str, constraints: str, inputs: list[np.ndarray], dtypes: list[Any]) -> list[np.ndarray]:
    """The outputs of a block of asm, with the shape of the inputs.

    Args:
        asm: statements in braces; operands $0, $1, ... count the outputs first.
        constraints: as LLVM takes them: "=r,=&r,r,l".
        inputs: one array for each operand after the outputs, all of one shape.
        dtypes: numpy dtypes of the outputs.
    """
    kinds = constraints.split(",")
    assert len(kinds) == len(inputs) + len(dtypes), f"{constraints} for {len(inputs)} inputs"
    shape, count = inputs[0].shape, inputs[0].size
    threads = -(count // -WARP) * WARP
    order = _rng.permutation(threads)[:count]
    registers: dict[str, np.ndarray] = {"%laneid": np.arange(threads, dtype=np.uint32) % WARP}
    for i, value in enumerate(inputs, start=len(dtypes)):
        bits = np.uint64 if value.dtype.itemsize == 8 else np.uint32
        registers[f"${i}"] = _rng.integers(0, 2**16, threads).astype(bits)
        registers[f"${i}"][order] = np.ascontiguousarray(value).view(bits).flatten()
    shared = {f"${i}" for i, kind in enumerate(kinds[: len(dtypes)]) if "&" not in kind}
    written: set[str] = set()
    for statement in filter(None, (part.strip() for part in asm.strip().strip("{}").split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        target, *sources = (operand.strip() for operand in rest.split(","))
        reads_input = any(re.fullmatch(r"\[?\$(\d+)\]?", s) and s.strip("[]") not in written for s in sources)
        assert not (reads_input and written & shared), f"{statement}: an output without & may be in this input"
        registers[target] = _INSTRUCTIONS[name](*(_value(source, registers) for source in sources))
        written |= {target} if target.startswith("$") else set()
    return [registers[f"${i}"][order].view(dtype).reshape(shape) for i, dtype in enumerate(dtypes)]


def _value(source: str, registers: dict[str, np.ndarray]) -> Any:
    if re.fullmatch(r"(0x[0-9a-f]+|\d+)", source):
        return np.uint32(int(source, 0))
    return registers[source.strip("[]")]


def _shuffle(value: np.ndarray, index: np.ndarray, clamp: Any, members: Any) -> np.ndarray:
    """shfl.sync.idx, as the table in the PTX manual computes the source lane."""
    assert members == 0xFFFFFFFF
    lane = np.arange(value.size, dtype=np.uint32) % WARP
    segment, limit = (clamp >> 8) & 31, clamp & 31
    highest = (lane & segment) | (limit & ~segment & 31)
    source = (lane & segment) | (index & 31 & ~segment)
    source = np.where(source <= highest, source, lane)
    return value[np.arange(value.size) // WARP * WARP + source]


def _load(addresses: np.ndarray) -> np.ndarray:
    return np.array([ctypes.c_uint32.from_address(int(address)).value for address in addresses], dtype=np.uint32)


def _fp32(operation: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Any, Any], np.ndarray]:
    return lambda a, b: operation(a.view(np.float32), b.view(np.float32)).view(np.uint32)


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.u32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "mad.wide.u32": lambda a, b, c: a.astype(np.uint64) * np.uint64(b) + c,
    "ld.global.nc.b32": _load,
    "shfl.sync.idx.b32": _shuffle,
    "mul.rn.f32": _fp32(np.multiply),
    "add.rn.f32": _fp32(np.add),
}


def teach_ptx(monkeypatch: Any) -> None:
    """Let interpreted kernels run inline asm during a test."""
    from triton.runtime import interpreter

    class Results(list[Any]):
        get_result = list.__getitem__

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
    ) -> Results:
        assert pack == 1, "only one element at a time"
        scalars = [kind.scalar for kind in types]
        dtypes = [interpreter._get_np_dtype(scalar) for scalar in scalars]
        outputs = run(asm, constraints, [value.data for value in values], dtypes)
        return Results(interpreter.TensorHandle(*pair) for pair in zip(outputs, scalars, strict=True))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
