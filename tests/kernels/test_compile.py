"""Every Triton kernel compiled for every architecture, with no GPU: it fits, does not spill, uses the tensor cores."""

import os
import subprocess
import sys
from csv import DictReader

import pytest

from bench.machine_code.specimen import ARCHITECTURES, SHARED_LIMIT
from bench.machine_code.specimens import specimens

triton = pytest.importorskip("triton")
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
SASS_PER_WEIGHT = {  # at most; a tree of selects takes 26
    "nf4_dequantize": 4.5,
    "nf4_dequantize_gather": 6.0,
    "nf4_dequantize_merge_r16": 8.0,
    "nf4_dequantize_merge_r16_fp32": 11.0,
}


def most_spilled(kernel):
    """Bytes of local memory that a thread may use. Before Triton 3.9 some use a few, nearly all where ptxas keeps to
    64, 80, 128 or 168 registers, and the 128 x 128 tile over an odd N uses 240 where it is stored."""
    if not OLD_TRITON:
        return 0
    return 240 if kernel == "nf4_linear_m128_odd" else 64


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code(arch, tmp_path):
    # In a process of its own: kernels that were imported for the interpreter cannot be compiled.
    out = tmp_path / "static.csv"
    command = [sys.executable, "-m", "bench", "static", "--arch", str(arch), "--out", str(out)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = list(DictReader(out.open()))
    assert len(rows) > 20
    products = {specimen.name: specimen.uses_tensor_cores for specimen in specimens()}
    for row in rows:
        name = f"{row['kernel']} on sm_{arch}"
        assert int(row["spills"]) <= most_spilled(row["kernel"]), f"{name} spills {row['spills']} bytes"
        assert int(row["shared_bytes"]) <= SHARED_LIMIT[arch] * 1024, f"{name}: {row['shared_bytes']} bytes shared"
        assert int(row["divergent_shuffles"]) == 0, (
            f"{name}: shuffles under a condition that lanes decide for themselves"
        )
        if row["kernel"] in products:
            assert (row["tensor_core"] == "True") == products[row["kernel"]], f"{name}: tensor cores used or not"
    per_weight = {row["kernel"]: row["sass_per_weight"] for row in rows}
    for kernel, limit in SASS_PER_WEIGHT.items():
        assert float(per_weight[kernel]) <= limit, f"{kernel} on sm_{arch}: {per_weight[kernel]} instructions a weight"
