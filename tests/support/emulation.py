"""The CUDA kernels on an emulated GPU: compiled for the CPU from the same sources, called through the wrapper."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastlora.native import build, cuda
from fastlora.ops.nf4 import NF4Weight

HOOKS = Path(__file__).with_name("cuda_hooks.cpp")
_FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"


def compile_objects(folder: Path, csrc: Path, only: str = "") -> None:
    """Compile the kernels and the tests' hooks to objects in `folder`; `only` the source of that stem.

    Skips the test where there is no C++ compiler.
    """
    sources = [source for source in (*sorted((csrc / "cuda").glob("*.cu")), HOOKS) if only in source.stem]
    compile_sources(folder, csrc, sources, _FLAGS)


def compile_sources(folder: Path, csrc: Path, sources: list[Path], flags: str) -> None:
    """Compile C++ and CUDA sources, as C++, to objects in `folder`; skips the test where there is no C++ compiler."""
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))

    def compile_one(source: Path) -> None:
        options = [*flags.split(), f"-I{csrc}", "-x", "c++", "-c"]
        command = [*compiler, *options, str(source), "-o", str(folder / f"{source.name}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources))


def link(folder: Path) -> Path:
    """The library made of the objects in a folder."""
    library = folder / "libemulated.so"
    objects = map(str, sorted(folder.glob("*.o")))
    subprocess.run([*build.find_compiler(), "-shared", *objects, "-o", str(library)], check=True)
    return library


class Operands(NamedTuple):
    """What a product takes, in the order in which it takes it."""

    x: torch.Tensor
    weight: NF4Weight
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float
    bias: torch.Tensor | None


class Emulation:
    """The emulated library, with calls that say which memory they may touch."""

    def __init__(self, path):
        self.library = cuda.open_library(path)
        self.library.emulate.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
        self.library.emulate_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)

    def call(self, name, *arguments, count=0):
        out = (ctypes.c_int * count)()
        result = getattr(self.library, name)(*arguments, *([out] if count else []))
        return list(out) if count else result

    def decode(self, operands, lot=1, machine=(3, 2)):
        """The product of some `Operands`."""
        self.library.emulate(lot, *machine)
        cuda._workspace.cache_clear()
        for tensor in (
            operands.x, *operands.weight.tensors(), operands.lora_a, operands.lora_b, operands.bias
        ):  # fmt: skip
            if tensor is not None:
                self.library.emulate_memory(tensor.data_ptr(), tensor.nbytes, 0)
        empty = torch.empty

        def poisoned(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            self.library.emulate_memory(tensor.data_ptr(), tensor.nbytes, 1)
            return tensor

        torch.empty = poisoned
        try:
            return cuda._decode(self.library, 0, *operands)
        finally:
            torch.empty = empty
            cuda._workspace.cache_clear()
