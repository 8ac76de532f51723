"""Every launch of the CUDA path, bound and compiled for a GPU that is not there; see `launches.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.static import SHARED_LIMIT

pytest.importorskip("triton")
LOW_RANK = {"_lora_shrink_kernel", "_lora_expand_kernel", "_lora_dy_kernel", "_lora_x_kernel"}
PRODUCTS = {"_decode_kernel", "_decode_sum_kernel", "_nf4_dequantize_kernel", "_nf4_fused_kernel", "_sum_splits_kernel"}
DORA = {"_refresh_kernel", "_row_norms_kernel", "_scaled_absmax_kernel", "_rescale_kernel", "_rescale_backward_kernel"}
ARCH = 90


@pytest.mark.slow
def test_every_launch_compiles():
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-W", "ignore", str(here / "launches.py"), str(ARCH)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in compiled} == LOW_RANK | PRODUCTS | DORA
    assert all(int(shared) <= SHARED_LIMIT[ARCH] << 10 for _, shared in compiled)
