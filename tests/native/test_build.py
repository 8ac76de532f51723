"""The compile recipe: both ways of running it, and what a user reads if it fails."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.native import build as native_build

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '#include <cstdint>\nextern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def compiler() -> None:
    try:
        native_build.find_compiler()
    except native_build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["ninja", "direct"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "direct":
        monkeypatch.setattr(native_build, "_find_ninja", lambda: None)
    elif native_build._find_ninja() is None:
        pytest.skip("no ninja here")


def sources(folder: Path, **texts: str) -> list[Path]:
    paths = [folder / f"{name}.cpp" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    return paths


def test_interface_version_is_the_headers() -> None:
    header = (native_build.source_dir() / "fastlora_cpu.h").read_text()
    version = re.search(r"#define FASTLORA_ABI_VERSION (\d+)", header)
    assert version is not None
    assert int(version[1]) == native_build.ABI_VERSION


@pytest.mark.usefixtures("compiler", "route")
def test_compiles_and_replaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a $folder with: signs"
    folder.mkdir()
    monkeypatch.setattr(native_build, "source_files", lambda: sources(folder, one=SOURCE, two="int other;\n"))
    target = tmp_path / "lib" / "library.so"
    target.parent.mkdir()
    target.write_text("the old one")
    assert native_build.compile_library(target) == target
    assert ctypes.CDLL(str(target)).answer() == 42
    assert [path.name for path in target.parent.iterdir()] == ["library.so"]


@pytest.mark.usefixtures("compiler", "route")
def test_a_compiler_error_leaves_the_old_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "source_files", lambda: sources(tmp_path, bad="int main( { }\n"))
    target = tmp_path / "library.so"
    target.write_text("the old one")
    with pytest.raises(native_build.BuildError, match=r"failed with exit status .*error"):
        native_build.compile_library(target)
    assert target.read_text() == "the old one"


@pytest.mark.usefixtures("compiler")
def test_an_unwritable_target_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "source_files", lambda: sources(tmp_path, one=SOURCE))
    (tmp_path / "file").write_text("")
    with pytest.raises(native_build.BuildError, match="cannot write"):
        native_build.compile_library(tmp_path / "file" / "library.so")


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        native_build.BuildError, match=r"no C\+\+ compiler found .*apt install g\+\+.*python -m fastlora.native"
    ):
        native_build.compile_library(tmp_path / "library.so")
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(native_build.BuildError, match="CXX names 'no-such-compiler'"):
        native_build.compile_library(tmp_path / "library.so")


def test_installing_without_a_compiler_goes_on(tmp_path: Path) -> None:
    """setup.py's build exits with 0, prints one line, and packs the sources for a later `python -m fastlora.native`."""
    pytest.importorskip("setuptools", minversion="77")
    build = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        str(tmp_path),
        "--build-lib",
        f"{tmp_path}/lib",
    ]
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fastlora:")]
    assert len(said) == 1
    assert "installed without its CPU library: no C++ compiler found" in said[0]
    package = tmp_path / "lib" / "fastlora"
    assert (package / "csrc" / "cpu" / "kernels.inl").is_file()
    assert (package / "native" / "build.py").is_file()
    assert not (package / "lib" / native_build.LIBRARY).exists()
