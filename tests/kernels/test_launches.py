"""Every launch of the CUDA path, bound and compiled for a GPU that is not there; see `launches.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine_code.specimen import SHARED_LIMIT

pytest.importorskip("triton")
LOW_RANK = {"_lora_shrink_kernel", "_lora_expand_kernel", "_lora_dy_kernel", "_lora_x_kernel", "_lora_sum_kernel"}
PRODUCTS = {"_decode_kernel", "_decode_sum_kernel", "_nf4_dequantize_kernel", "_nf4_fused_kernel", "_sum_splits_kernel"}
STACKS = {"_grouped_dense_kernel", "_grouped_nf4_kernel", "_nf4_dequantize_kernel"}
DORA = {"_refresh_kernel", "_row_norms_kernel", "_scaled_absmax_kernel", "_rescale_kernel", "_rescale_backward_kernel"}
SPILLED = {"_row_norms_kernel": 8}  # bytes at most: ptxas keeps to 128 registers, so that four programs fit at a time
ARCH = 90
ROOT = Path(__file__).parents[2]


def printed(module, *words):
    """The lines that a module of `tests.support` prints, each in words, with Triton's compiler at work."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.support.{module}", *map(str, words)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def compiled(arch, *words):
    """The names of the kernels that a process of `launches.py` compiles; none needs more memory than there is."""
    found = printed("launches", arch, *words)
    for name, shared, spilled in found:
        assert int(shared) <= SHARED_LIMIT[arch] << 10, f"{name} on sm_{arch}: {shared} bytes of shared memory"
        assert int(spilled) <= SPILLED.get(name, 0), f"{name} on sm_{arch} spills {spilled} bytes"
    return {name for name, *_ in found}


@pytest.mark.slow
def test_every_launch_compiles():
    assert compiled(ARCH) == LOW_RANK | PRODUCTS | DORA


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])  # one architecture for each way to multiply; all six: `bench static`
def test_what_experts_launch_compiles(arch):
    assert compiled(arch, "experts") == STACKS | (LOW_RANK - {"_lora_expand_kernel"})


@pytest.mark.slow
def test_how_many_kernels_a_layer_of_qwen3_launches():
    """Seven linears expand a weight each and share shrinks and products in groups; kept ones are not computed again."""
    found = {tuple(words[:2]): (int(words[2]), int(words[3])) for words in printed("layer_launches")}
    assert found == {
        ("linears", "forward"): (21, 53), ("linears", "backward"): (33, 87),
        ("speed_up", "forward"): (27, 9), ("speed_up", "backward"): (39, 12),
        ("group", "forward"): (21, 10), ("group", "backward"): (38, 10),
        ("kept", "forward"): (21, 10), ("kept", "backward"): (44, 11),
        ("recomputed", "forward"): (21, 10), ("recomputed", "backward"): (52, 19),
    }  # fmt: skip


@pytest.mark.slow
def test_what_is_remembered_of_a_launch_is_what_triton_would_launch():
    """The kernel, the grid and every argument, over kinds of calls that differ in one thing."""
    ((compared, kinds),) = printed("remembered", 36)
    assert int(compared) > 150
    assert int(kinds) > 50
