"""The cases under pytest-benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pytest_benchmark_runs_the_cases_and_compares_two_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    case = "test_kernel[nf4_dequantize-0-0-forward-fastlora-bf16]"
    shared = [
        sys.executable,
        "-m",
        "pytest",
        "tests/bench/bench_kernels.py",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    shared += ["-k", "nf4_dequantize-0-0-forward-fastlora", f"--benchmark-storage={tmp_path}"]
    # under xdist pytest-benchmark times nothing, and a worker's environment says xdist
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    for options in (["--benchmark-save=before"], ["--benchmark-compare=0001", "--benchmark-columns=median"]):
        done = subprocess.run([*shared, *options], cwd=ROOT, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{case} (0001_before)" in done.stdout
    assert f"{case} (NOW)" in done.stdout
    (saved,) = tmp_path.glob("*/0001_before.json")
    (found,) = json.loads(saved.read_text())["benchmarks"]
    assert found["name"] == case
    assert found["group"].startswith("nf4_dequantize")


def test_the_bench_is_collected_on_request_only():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is in the standard library from Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
    assert any(name.startswith("pytest-benchmark") for name in settings["project"]["optional-dependencies"]["bench"])
