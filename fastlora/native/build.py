"""How the C++ and CUDA libraries are compiled: the one recipe behind `pip install` and `python -m fastlora.native`.

It imports only the standard library, so setup.py can load this file by its path, without torch and without importing
the package. The sources are `csrc/`: next to the package in a checkout, inside it in an installed wheel.

The CPU library holds every instruction set and chooses at run time, so no flag here names a machine. The result depends
on `-ffp-contract=off`: a contracted multiply-add in the scales' arithmetic gives other bits than bitsandbytes.

The CUDA library holds machine code for every architecture of `CUDA_ARCHITECTURES` that the installed nvcc knows, and
PTX for later ones, so one build serves every GPU. It is compiled where nvcc is found; without nvcc the installation
continues. CUDA's run-time library is linked in and its symbols are hidden: loading needs only the C library, and the
driver is needed only when a kernel runs. `FASTLORA_CUDA_ARCHS=90` (or `80,90`) compiles fewer architectures, faster.
"""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ABI_VERSION = 5  # FASTLORA_ABI_VERSION of csrc/fastlora_cpu.h
LIBRARY = "libfastlora_cpu.so"
CUDA_ABI_VERSION = 1  # FASTLORA_CUDA_ABI_VERSION of csrc/fastlora_cuda.h
CUDA_LIBRARY = "libfastlora_cuda.so"
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # code for each runs on later minor versions of its major
_VIRTUAL_ARCHITECTURES = ("80", "90")  # those that the sources distinguish
REBUILD = "python -m fastlora.native"

_PACKAGE = Path(__file__).resolve().parents[1]
_COMPILERS = ("g++", "c++", "clang++")
_DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")
# GCC warns about its own AVX-512 headers (gcc.gnu.org/PR105593).
_CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -ffp-contract=off -fvisibility=hidden -pthread -Wall -Wextra -Wno-maybe-uninitialized"
)
_LINK_FLAGS = "-shared -pthread -ldl"
_NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
_NVCC_LINK_FLAGS = (
    "-shared -cudart=static --no-device-link -Xcompiler=-static-libgcc,-static-libstdc++ "
    "-Xlinker=--exclude-libs=ALL,--as-needed"
)


class BuildError(RuntimeError):
    """The library cannot be compiled here; the message says why and what to do."""


def library_path() -> Path:
    """Where the compiled CPU library is in this package."""
    return _PACKAGE / "lib" / LIBRARY


def cuda_library_path() -> Path:
    """Where the compiled CUDA library is in this package."""
    return _PACKAGE / "lib" / CUDA_LIBRARY


def source_dir() -> Path:
    """The folder of C++ sources.

    Raises:
        BuildError: they are neither in the package nor in the checkout around it.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "fastlora_cpu.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are neither in {_PACKAGE} nor next to it: install fastlora-kernels again")


def source_files() -> list[Path]:
    """Every file the compiler reads, headers too."""
    return sorted(path for path in source_dir().rglob("*") if path.suffix in {".cpp", ".cu", ".h", ".inl"})


def find_compiler() -> list[str]:
    """The C++ compiler as the beginning of a command line: $CXX if set, else the first of g++, c++, clang++.

    Raises:
        BuildError: there is none.
    """
    if os.name != "posix":
        raise BuildError("the CPU library builds on Linux and macOS only; the plain torch path is used instead")
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX names {chosen[0]!r}, which is not a program on this machine: correct or unset CXX")
        return chosen
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(
        f"no C++ compiler found (looked for {', '.join(_COMPILERS)}): install one, for instance with "
        f"`apt install g++`, and run `{REBUILD}`"
    )


def find_nvcc() -> str:
    """The CUDA compiler: from $CUDA_HOME or $CUDA_PATH if set, else on the PATH, from pip, or in /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if (nvcc := Path(home) / "bin" / "nvcc").is_file():
                return str(nvcc)
            raise BuildError(f"{variable} is {home}, which has no bin/nvcc: correct or unset {variable}")
    if found := shutil.which("nvcc"):
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    for nvcc in (*(path for folder in folders for path in sorted(folder.glob("*/bin/nvcc"))), _DEFAULT_NVCC):
        if nvcc.is_file():
            return str(nvcc)
    raise BuildError(f"no nvcc found: install the CUDA toolkit, or `pip install nvidia-cuda-nvcc`, and run `{REBUILD}`")


def compile_library(target: Path) -> Path:
    """Compiles the CPU library and puts it at `target` in one step, so that a reader sees the old one or the new one.

    Returns:
        target.
    Raises:
        BuildError: no compiler, no sources, the compiler fails, or `target` cannot be written.
    """
    compiler = find_compiler()
    flags = [*shlex.split(_CXX_FLAGS), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    return _compile(compiler, flags, shlex.split(_LINK_FLAGS), ".cpp", target)


def compile_cuda_library(target: Path) -> Path:
    """Compiles the CUDA library, as `compile_library` does the CPU library.

    Returns:
        target.
    Raises:
        BuildError: no nvcc, no C++ compiler, no sources, an architecture that nvcc does not know, a compiler fails, or
            `target` cannot be written.
    """
    nvcc = find_nvcc()
    find_compiler()
    architectures = _architectures(nvcc)
    flags = [*shlex.split(_NVCC_FLAGS), f"--threads={os.cpu_count() or 1}", *_code_flags(architectures)]
    return _compile([nvcc], flags, shlex.split(_NVCC_LINK_FLAGS), ".cu", target)


def open_built(
    path: Path,
    find: Callable[[], object],
    open_library: Callable[[Path], ctypes.CDLL],
    version_of: Callable[[ctypes.CDLL], int],
    wanted: int,
) -> tuple[ctypes.CDLL | None, str]:
    """A compiled library and its path; or None, with why it cannot be used and what to do.

    Args:
        find: finds its compiler, or raises BuildError. open_library: opens it and declares its functions.
        version_of: asks it for the version of its interface. wanted: the version that this package needs.
    """
    if not path.is_file():
        try:
            find()
        except BuildError as error:
            return None, f"{path} has not been built: {error}"
        return None, f"{path} has not been built: run `{REBUILD}`"
    try:
        library = open_library(path)
        version = version_of(library)
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): run `{REBUILD}`"
    if version != wanted:
        return None, f"{path} is stale: it has interface {version}, this fastlora needs {wanted}; run `{REBUILD}`"
    return library, str(path)


def _architectures(nvcc: str) -> tuple[str, ...]:
    """What to compile for, oldest first."""
    known = set(re.findall(r"compute_(\d+)", _run([nvcc, "--list-gpu-arch"])))
    wanted = re.findall(r"[^\s,;]+", os.environ.get("FASTLORA_CUDA_ARCHS", ""))
    for arch in wanted:
        if arch not in known:
            names = ", ".join(sorted(known, key=int))
            raise BuildError(f"FASTLORA_CUDA_ARCHS names {arch!r}; {nvcc} knows {names}: set some of those")
    chosen = sorted(set(wanted), key=int) or [arch for arch in CUDA_ARCHITECTURES if arch in known]
    if not chosen:
        raise BuildError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}: install CUDA 11.8 or later")
    return tuple(chosen)


def _code_flags(architectures: tuple[str, ...]) -> list[str]:
    """What nvcc is to produce: PTX once for all that share it, machine code for each, and the last PTX itself."""
    groups: dict[str, list[str]] = {}
    for arch in architectures:
        virtual = max((base for base in _VIRTUAL_ARCHITECTURES if int(base) <= int(arch)), key=int, default=arch)
        groups.setdefault(virtual, []).append(f"sm_{arch}")
    groups[virtual].append(f"compute_{virtual}")
    flags = [f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]" for virtual, codes in groups.items()]
    return [*flags, f"-DFASTLORA_ARCHITECTURES={'_'.join(architectures)}"]


def _compile(compiler: list[str], flags: list[str], link_flags: list[str], suffix: str, target: Path) -> Path:
    """Compiles each source of a kind, links the objects, and moves the library to `target`."""
    sources = [path for path in source_files() if path.suffix == suffix]
    try:
        with tempfile.TemporaryDirectory(prefix="fastlora-build-") as name:
            folder = Path(name)
            objects = [folder / f"{source.stem}.o" for source in sources]
            library = folder / target.name
            compiles = [[*compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
            link = [*compiler, *map(str, objects), "-o", str(library), *link_flags]
            _run_all(folder, [*zip(objects, compiles, strict=True)], (library, link))
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copy2(library, staged)
            staged.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error}") from error
    return target


def _run_all(folder: Path, compiles: list[tuple[Path, list[str]]], link: tuple[Path, list[str]]) -> None:
    ninja = _find_ninja()
    if ninja is not None:
        _run_ninja(ninja, folder, compiles, link)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, [command for _, command in compiles]))
    _run(link[1])


def _find_ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR)


def _run_ninja(ninja: str, folder: Path, compiles: list[tuple[Path, list[str]]], link: tuple[Path, list[str]]) -> None:
    def edge(output: Path, command: list[str], inputs: str) -> str:
        escaped = shlex.join(command).replace("$", "$$")
        return f"build {_ninja_path(output)}: run {inputs}\n  command_line = {escaped}\n"

    inputs = " ".join(_ninja_path(output) for output, _ in compiles)
    edges = [edge(output, command, "") for output, command in compiles] + [edge(*link, inputs)]
    (folder / "build.ninja").write_text("rule run\n  command = $command_line\n" + "".join(edges))
    _run([ninja, "-C", str(folder), "--quiet"])


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines[-3:]
        raise BuildError(
            f"{shlex.join(command[:1])} failed with exit status {done.returncode}: {' / '.join(errors[:3])}"
        )
    return done.stdout
