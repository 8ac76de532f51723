"""The disassembler that comes with Triton, and what is read from its text: instructions and loops."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IDLE = ("NOP", "BRA", "EXIT")
_PLACED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);")  # address, name, operands
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class CodeFacts:
    """What the machine code of one kernel on one architecture shows."""

    kernel: str
    arch: int
    registers: int
    spills: int  # bytes of local memory a thread
    shared_bytes: int
    sass_per_weight: float | None
    tensor_core: bool
    divergent_shuffles: int = 0  # that lanes of a warp may reach without each other


def cuobjdump(*arguments: str, folder: str | None = None) -> str:
    """What the disassembler prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=folder).stdout


def dump(cubin: bytes, flag: str) -> str:
    """What the disassembler prints of one binary: "-sass", "-res-usage"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return cuobjdump(flag, file.name)


def is_idle(instruction: str) -> bool:
    """Whether it computes nothing."""
    return instruction.split(".")[0] in IDLE


def instructions(sass: str) -> list[str]:
    """Names of all instructions except idle ones."""
    return [name for _, name, _ in _PLACED.findall(sass) if not is_idle(name)]


def loops(sass: str) -> Iterator[list[str]]:
    """Names of the instructions of each loop: from the target of a backward branch to the branch."""
    code = [(int(at, 16), name, _TARGET.search(operands)) for at, name, operands in _PLACED.findall(sass)]
    for at, name, target in code:
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            yield [other for place, other, _ in code if int(target[1], 16) <= place <= at]
