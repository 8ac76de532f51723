"""The distribution is fastlora-kernels, the import name fastlora: what happens where others have that name too."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastlora import distribution
from fastlora.commands import diagnosis

ROOT = Path(__file__).resolve().parent.parent


def python(*words: str, cwd: Path, path: tuple[Path, ...] = (), flags: tuple[str, ...] = ()):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}
    return subprocess.run([sys.executable, *flags, *words], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def rival(tmp_path: Path) -> Path:
    """A folder of installed packages with another distribution's fastlora.py, as on PyPI."""
    folder = tmp_path / "site-packages"
    facts = folder / "fastlora-4.2.1.dist-info"
    facts.mkdir(parents=True)
    (folder / "fastlora.py").write_text("")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fastlora\nVersion: 4.2.1\n")
    (facts / "top_level.txt").write_text("fastlora\n")
    (facts / "RECORD").write_text("fastlora.py,,\nfastlora-4.2.1.dist-info/METADATA,,\n")
    return folder


def test_alone_it_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "site-packages" / "fastlora_kernels-0.1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site-packages" / "fastlora").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages"), str(tmp_path / "no" / "site-packages"), ""])
    assert distribution.rivals() == []


def test_the_first_import_tells_of_another_distribution(rival: Path, tmp_path: Path) -> None:
    done = python("-c", "import fastlora, fastlora.cli", cwd=tmp_path, path=(ROOT, rival))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert said.count("Run `pip uninstall fastlora`, then `pip install fastlora-kernels` again") == 1
    assert str(rival / "fastlora-4.2.1.dist-info") in said
    assert str(rival / "fastlora.py") in said


def test_the_import_reads_no_metadata(tmp_path: Path) -> None:
    code = "import sys, fastlora; print('importlib.metadata' in sys.modules)"
    assert python("-c", code, cwd=tmp_path, path=(ROOT,), flags=("-S",)).stdout == "False\n"


def test_doctor_tells_of_another_distribution(rival: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(rival)
    found = {finding.what: finding for finding in diagnosis._ourselves()}
    assert str(ROOT / "fastlora") in found[distribution.NAME].found
    assert found["import name"].advice.startswith("fastlora 4.2.1: another distribution has the import name")
    assert not found["import name"].good


def test_the_command_tells_that_another_distribution_is_imported(rival: Path, tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['fastlora', '--version']; import fastlora_kernels; fastlora_kernels.main()"
    done = python("-c", code, cwd=tmp_path, path=(rival, ROOT))
    assert done.returncode == 1
    assert f"`import fastlora` gives {rival / 'fastlora.py'}, not fastlora-kernels" in done.stderr
    assert python("-c", code, cwd=tmp_path, path=(ROOT,)).stdout.strip() == "0.1.0"


def test_an_editable_installation_is_found_next_to_a_clone(tmp_path: Path) -> None:
    """Python would take a clone named fastlora for the package. No compiler: what is installed is all that counts."""
    clone, wheel = tmp_path / "fastlora", tmp_path / "wheel"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    made = subprocess.run([sys.executable, "-c", build, str(wheel)], cwd=clone, env=environment, capture_output=True)
    assert made.returncode == 0, made.stderr
    (archive,) = wheel.glob("*.whl")
    with zipfile.ZipFile(archive) as files:
        (pth,) = (name for name in files.namelist() if name.endswith(".pth"))
        (folder,) = files.read(pth).decode().split()
    assert sorted(path.name for path in Path(folder).iterdir()) == ["fastlora", "fastlora_kernels.py"]
    code = "from fastlora import cli; from fastlora.kernels import operands; print(cli.__file__, operands.__file__)"
    found = python("-c", code, cwd=tmp_path, path=(Path(folder),))
    assert found.stdout.split() == [str(clone / "fastlora/cli.py"), str(clone / "kernels/operands.py")], found.stderr
    assert python("-m", "fastlora", "--version", cwd=tmp_path, path=(Path(folder),)).stdout == "0.1.0\n"


def test_every_printed_install_line_names_this_distribution() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    pages = [
        name
        for name in listed
        if name.endswith((".py", ".md", ".toml", ".cpp", ".h")) and name != "tests/test_distribution.py"
    ]
    assert pages
    wrong = re.compile(r"pip install (-\S+ )*['\"]?fastlora(?!-kernels)\b|(?<![\w-])fastlora\[(train|bnb|bench|dev)")
    assert [name for name in pages if wrong.search((ROOT / name).read_text())] == []


def test_the_command_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; import fastlora.cli"
    done = python("-c", code, cwd=tmp_path, path=(ROOT,))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs the extra `train`: pip install 'fastlora-kernels[train]'")


def test_no_file_needs_a_newer_python_than_is_promised() -> None:
    """Its syntax; names of the standard library are mypy's part, which checks for the same version."""
    text = (ROOT / "pyproject.toml").read_text()
    (minor,) = re.findall(r'requires-python = ">=3\.(\d+)"', text)
    assert f'python_version = "3.{minor}"' in text
    assert f'target-version = "py3{minor}"' in text
    for path in (*ROOT.glob("*.py"), *ROOT.glob("fastlora/**/*.py"), *ROOT.glob("kernels/*.py")):
        ast.parse(path.read_text(), feature_version=(3, int(minor)))
