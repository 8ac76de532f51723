"""The tree keeps its shape: `kernels/` without an `__init__.py`, importable from the checkout and from an install."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_kernels_is_not_a_top_level_package():
    # A top-level package `kernels` would shadow the one that transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_beside_the_checkout():
    pytest.importorskip("transformers")
    code = "import transformers, fastlora.kernels.nf4; print(fastlora.kernels.nf4.__file__)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip().endswith("kernels/nf4.py")


def test_importing_fastlora_asks_no_device_and_loads_no_trainer():
    code = (
        "import sys, torch, fastlora; fastlora.replace_linear, fastlora.lora_linear\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'transformers', 'peft', 'bitsandbytes', 'accelerate', 'triton', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    import fastlora

    for name in fastlora.__all__:
        assert getattr(fastlora, name).__doc__, name


@pytest.mark.slow
def test_a_wheel_holds_the_kernels_the_recipes_and_the_demo_model(tmp_path):
    pip = (sys.executable, "-m", "pip")
    source = tmp_path / "source"
    run("git", "clone", "--quiet", str(ROOT), str(source), cwd=tmp_path)
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastlora-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "fastlora/kernels/nf4.py",
        "fastlora/kernels/lora.py",
        "fastlora/kernels/choice.csv",
        "fastlora/training/recipes/demo.yaml",
        "fastlora/demo/model/model.safetensors",
        "fastlora/py.typed",
    ):
        assert wanted in names
    target = tmp_path / "site"
    run(*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import fastlora.kernels.nf4 as m; print(m.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip().startswith(str(target))
