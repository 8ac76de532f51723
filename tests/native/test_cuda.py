"""The CUDA library without a GPU: what the wrapper refuses, how it is built and found, and its machine code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.machine_code import fatbin
from bench.machine_code.specimen import ARCHITECTURES, SHARED_LIMIT
from fastlora.native import build, cuda
from fastlora.ops import nf4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def library():
    loaded, reason = cuda.status()
    if not loaded:
        pytest.skip(reason)
    return build.cuda_library_path()


def test_supports_names_what_it_cannot_take():
    assert cuda.supports(BF16, 16, 4096, 4097, 64, 256) == ""
    assert cuda.supports(FP16, 1, 64, 1, 32, 0) == ""
    for given, word in (
        ((FP32, 1, 4096, 4096, 64, 16), "float32"),
        ((BF16, 17, 4096, 4096, 64, 16), "17 tokens"),
        ((BF16, 1, 4000, 4096, 64, 16), "multiples of 64"),
        ((BF16, 1, 64, 64, 128, 16), "multiples of 128"),
        ((BF16, 1, 96, 64, 48, 16), "blocksize is 48"),
        ((BF16, 1, 1 << 20, 1 << 20, 64, 16), "more blocks"),
    ):
        assert word in cuda.supports(*given)


def test_cpu_tensors_are_refused():
    weight = nf4.quantize(torch.randn(64, 128))
    with pytest.raises(ValueError, match="x is on cpu"):
        cuda.decode(torch.zeros(1, 128, dtype=BF16), weight)
    assert "CUDA devices" in cuda.usable(torch.device("cpu"))[1]


def test_importing_queries_no_device():
    code = "import torch; from fastlora.native import cuda; cuda.status(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_missing_library_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cuda_library_path", lambda: tmp_path / "none.so")
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    assert "has not been built: run `python -m fastlora.native`" in cuda._load.__wrapped__()[1]
    (tmp_path / "none.so").write_text("no library")
    assert "cannot be loaded" in cuda._load.__wrapped__()[1]


def fake_nvcc(folder, archs="75 80 90"):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    lines = "".join(f"echo compute_{arch}\n" for arch in archs.split())
    nvcc.write_text(f"#!/bin/sh\n{lines}")
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_is_found_where_it_may_be(monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert build.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "bin"))
    with pytest.raises(build.BuildError, match=r"CUDA_PATH is .* correct or unset"):
        build.find_nvcc()
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert build.find_nvcc() == str(nvcc)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "_DEFAULT_NVCC", tmp_path / "none")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="no nvcc found: install the CUDA toolkit"):
        build.find_nvcc()


def test_architectures_are_those_that_nvcc_knows(monkeypatch, tmp_path):
    nvcc = str(fake_nvcc(tmp_path))
    monkeypatch.delenv("FASTLORA_CUDA_ARCHS", raising=False)
    assert build._architectures(nvcc) == ("80", "90")
    assert build._code_flags(("80", "86", "90", "120")) == [
        "-gencode=arch=compute_80,code=[sm_80,sm_86]",
        "-gencode=arch=compute_90,code=[sm_90,sm_120,compute_90]",
        "-DFASTLORA_ARCHITECTURES=80_86_90_120",
    ]
    monkeypatch.setenv("FASTLORA_CUDA_ARCHS", "90, 80")
    assert build._architectures(nvcc) == ("80", "90")
    monkeypatch.setenv("FASTLORA_CUDA_ARCHS", "99")
    with pytest.raises(build.BuildError, match=r"names '99'; .* knows 75, 80, 90"):
        build._architectures(nvcc)


@pytest.mark.slow
def test_nvcc_compiles_the_library(monkeypatch, tmp_path):
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("FASTLORA_CUDA_ARCHS", "90")
    compiled = cuda.open_library(build.compile_cuda_library(tmp_path / "library.so"))
    assert compiled.fastlora_cuda_architectures() == b"90"


def test_loading_needs_only_the_c_library(library):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here")
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True
    ).stdout
    defined = [line.split()[-1] for line in symbols.splitlines()[3:] if line.split() and line.split()[6] != "UND"]
    assert defined
    assert all(name.startswith("fastlora_cuda_") for name in defined)


def test_without_a_driver_the_library_says_so(library):
    code = "import sys; from fastlora.native import cuda as n; l = n._loaded(); r = l.fastlora_cuda_probe(0)\n"
    code += "print(r, n._message(l, r))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    number, text = done.stdout.strip().split(" ", 1)
    assert int(number) > 0
    assert "driver" in text or "no CUDA-capable device" in text


@pytest.mark.slow
def test_machine_code(library):
    pytest.importorskip("triton")  # has the disassembler
    path, shared = cuda.static_facts()
    rows = list(fatbin.rows(path, shared, ARCHITECTURES))
    assert len(rows) == 16 * len({row.arch for row in rows}) > 0
    for row in rows:
        name = f"{row.kernel} on sm_{row.arch}"
        assert row.spills == 0, f"{name} spills {row.spills} bytes"
        assert row.shared_bytes <= SHARED_LIMIT[row.arch] * 1024, f"{name}: {row.shared_bytes} bytes shared"
        assert row.tensor_core != row.kernel.endswith("_sum"), name
        if row.tensor_core:
            assert row.sass_per_weight is not None
            assert 2 < row.sass_per_weight <= 3.8, f"{name}: {row.sass_per_weight} instructions a weight"
        if row.arch in (90, 100) and row.kernel.endswith(("_m2", "_m8")):
            assert row.registers <= 128, f"{name}: {row.registers} registers, two blocks do not fit"
