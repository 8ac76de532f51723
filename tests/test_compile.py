"""Every Triton kernel compiled for every architecture, with no GPU: it fits, does not spill, uses the tensor cores."""

import os
import subprocess
import sys
from csv import DictReader

import pytest

from bench.static import ARCHITECTURES, SHARED_LIMIT

triton = pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code(arch, tmp_path):
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    out = tmp_path / "static.csv"
    command = [sys.executable, "-m", "bench", "static", "--arch", str(arch), "--out", str(out)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = list(DictReader(out.open()))
    assert len(rows) > 20
    for row in rows:
        name = f"{row['kernel']} on sm_{arch}"
        assert int(row["spills"]) == 0, f"{name} spills {row['spills']} bytes"
        assert int(row["shared_bytes"]) <= SHARED_LIMIT[arch] * 1024, f"{name}: {row['shared_bytes']} bytes shared"
        assert (row["tensor_core"] == "True") == ("nf4_dequantize" not in row["kernel"] or "merge" in row["kernel"])
    plain = next(row for row in rows if row["kernel"] == "nf4_dequantize")
    limit = 6.5 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 9.0  # a tree of selects takes 26
    assert float(plain["sass_per_weight"]) <= limit
