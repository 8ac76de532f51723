"""What is no tensor of a step: cuBLAS's workspaces and the CUDA context.

    workspaces   torch gives each thread that multiplies (forward's and backward's) one from its own allocator:
                 8.125 MiB, 32 MiB on sm_90 (`getChosenWorkspaceSize`, ATen/cuda/CublasHandlePool.cpp)
    context      what the driver takes for a process with torch's kernels loaded: 141 MiB in 30 runs on a T4; on newer
                 cards 450 MiB is assumed

Slack, which is reserved over allocated, is in `planner.estimate`: it widens a range and is no term.
"""

MIB = 2**20


def workspaces(capability: int) -> int:
    """Bytes of cuBLAS's workspaces. capability: 80 for sm_80."""
    return 2 * (32 * MIB if capability == 90 else 8 * MIB + 2**17)


def context(capability: int) -> int:
    """Bytes of the CUDA context."""
    return (141 if capability < 80 else 450) * MIB
