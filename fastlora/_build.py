"""How the CPU library is compiled: the one recipe behind `pip install` and `fastlora.native.build()`.

It imports the standard library alone, so that setup.py can load this file by its path, without torch and without
importing the package. The sources are `csrc/`: beside the package in a checkout, inside it in an installed wheel.

One library holds every instruction set, chosen at run time, so no flag here names a machine. `-ffp-contract=off` is
part of the result, not of the style: a fused multiply-add in the scales' arithmetic gives other bits than bitsandbytes.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ABI_VERSION = 2  # FASTLORA_ABI_VERSION of csrc/fastlora_cpu.h
LIBRARY = "libfastlora_cpu.so"
REBUILD = "python -m fastlora.native"

_PACKAGE = Path(__file__).resolve().parent
_COMPILERS = ("g++", "c++", "clang++")
# GCC warns of its own AVX-512 headers (gcc.gnu.org/PR105593).
_CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -ffp-contract=off -fvisibility=hidden -pthread -Wall -Wextra -Wno-maybe-uninitialized"
)
_LINK_FLAGS = "-shared -pthread -ldl"


class BuildError(RuntimeError):
    """The library cannot be compiled here; the message says why and what to do."""


def library_path() -> Path:
    """Where the compiled library lies in this package."""
    return _PACKAGE / "lib" / LIBRARY


def source_dir() -> Path:
    """The folder of C++ sources.

    Raises:
        BuildError: neither the package nor the checkout around it has them.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "fastlora_cpu.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are neither in {_PACKAGE} nor beside it: install fastlora again")


def source_files() -> list[Path]:
    """Every file the compiler reads, headers too."""
    return sorted(path for path in source_dir().rglob("*") if path.suffix in {".cpp", ".h", ".inl"})


def find_compiler() -> list[str]:
    """The C++ compiler as the beginning of a command line: $CXX where set, else the first of g++, c++, clang++.

    Raises:
        BuildError: there is none.
    """
    if os.name != "posix":
        raise BuildError("the CPU library builds on Linux and macOS only; the plain torch path is used instead")
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX names {chosen[0]!r}, which is not a program here: correct or unset CXX")
        return chosen
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(
        f"no C++ compiler found (looked for {', '.join(_COMPILERS)}): install one, for instance with "
        f"`apt install g++`, and run `{REBUILD}`"
    )


def compile_library(target: Path) -> Path:
    """Compiles the library and puts it at `target` in one step, so that a reader sees the old one or the new one.

    Returns:
        target.
    Raises:
        BuildError: no compiler, no sources, the compiler refuses them, or `target` cannot be written.
    """
    compiler = find_compiler()
    sources = [path for path in source_files() if path.suffix == ".cpp"]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    try:
        with tempfile.TemporaryDirectory(prefix="fastlora-build-") as name:
            built = _compile(compiler, extra, sources, Path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copy2(built, staged)
            staged.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target}: {error}") from error
    return target


def _compile(compiler: list[str], extra: list[str], sources: list[Path], folder: Path) -> Path:
    objects = [folder / f"{source.stem}.o" for source in sources]
    library = folder / LIBRARY
    compile_flags = [*compiler, *shlex.split(_CXX_FLAGS), *extra]
    compiles = [[*compile_flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
    link = [*compiler, *map(str, objects), "-o", str(library), *shlex.split(_LINK_FLAGS)]
    ninja = _find_ninja()
    if ninja is not None:
        _run_ninja(ninja, folder, [*zip(objects, compiles, strict=True)], (library, link))
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compiles))
        _run(link)
    return library


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


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines[-3:]
        raise BuildError(
            f"{shlex.join(command[:1])} failed with exit status {done.returncode}: {' / '.join(errors[:3])}"
        )
