"""The tree keeps its shape: floors without an import upward or in a circle, and a wheel with every package."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import floors as floor_plan

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, env=None):
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_kernels_is_not_a_top_level_package():
    # A top-level package `kernels` would shadow the one that transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_import_goes_up_and_none_in_a_circle():
    """Lazy imports count. The floors are one tuple each, and every file has its place in them."""
    for package, floors in (("fastlora", floor_plan.FLOORS), ("bench", floor_plan.BENCH_FLOORS)):
        assert {floor_plan.floor(name) for name in floor_plan.modules(package)} - {""} == set(floors)
        assert floor_plan.upward(package, floors) == []
        assert floor_plan.circles(package) == []


def test_an_import_upward_and_a_circle_are_seen(monkeypatch):
    links = {"fastlora.ops.a": {"fastlora.model.b"}, "fastlora.model.b": {"fastlora.ops.a"}, "fastlora": set()}
    monkeypatch.setattr(floor_plan, "graph", lambda package: links)
    assert floor_plan.upward("fastlora", floor_plan.FLOORS) == ["fastlora.ops.a -> fastlora.model.b"]
    assert floor_plan.circles("fastlora") == ["fastlora.ops.a -> fastlora.model.b -> fastlora.ops.a"]


def test_the_picture_in_the_documentation_is_that_of_the_code():
    assert floor_plan.PAGE.read_text() == floor_plan.page(), "run `python tools/floors.py --write`"


def test_no_module_shadows_a_public_name():
    """Importing fastlora.report, were there such a module, would put it in the place of the function."""
    import fastlora

    children = {path.stem for path in (ROOT / "fastlora").iterdir()}
    assert not children & set(fastlora.__all__)


def test_public_names_are_found_where_the_type_checker_looks():
    import fastlora

    tree = ast.parse((ROOT / "fastlora" / "__init__.py").read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastlora.")
        for alias in node.names
    }
    assert seen == {name: home for home, names in fastlora._HOMES.items() for name in names}
    assert set(seen) == set(fastlora.__all__)


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
    (wheel,) = tmp_path.glob("fastlora_kernels-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"fastlora/{path.relative_to(ROOT / 'fastlora')}" for path in (ROOT / "fastlora").rglob("*.py")}
    sources |= {f"fastlora/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources | {"fastlora_kernels.py"} == {name for name in names if name.endswith(".py")}
    for wanted in (
        "fastlora/kernels/nf4.py",
        "fastlora/kernels/lora.py",
        "fastlora/kernels/choice.csv",
        "fastlora/training/recipes/demo.yaml",
        "fastlora/demo/model/model.safetensors",
        "fastlora/py.typed",
    ):
        assert wanted in names
    auditwheel = Path(sys.executable).with_name("auditwheel")
    if auditwheel.exists():
        environment = {**os.environ, "PATH": f"{auditwheel.parent}{os.pathsep}{os.environ['PATH']}"}
        run(auditwheel, "repair", "-w", tmp_path / "dist", wheel, cwd=tmp_path, env=environment)
        (wheel,) = (tmp_path / "dist").iterdir()
        assert "-py3-none-manylinux_" in wheel.name
    target = tmp_path / "site"
    run(*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import fastlora.kernels.nf4 as m; print(m.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip().startswith(str(target))
