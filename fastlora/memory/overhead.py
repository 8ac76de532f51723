"""What is not a tensor: cuBLAS's workspaces, the CUDA context, and memory that the allocator holds and cannot use.

    workspaces   torch gives each thread that multiplies (forward's and backward's) one from its own allocator: 8.125 MiB,
                 32 MiB on sm_90 (`getChosenWorkspaceSize`, ATen/cuda/CublasHandlePool.cpp)
    context      what the driver takes for a process with torch's kernels loaded: 141 MiB on a T4; 300 to 550 on newer cards
    slack        reserved over allocated: fragments and rounding to 2 and 20 MiB

Evidence: 30 T4 runs give all three meters of one run; the A100 runs give allocated and reserved.
"""

MIB = 2**20


def workspaces(capability: int) -> int:
    """Bytes of cuBLAS's workspaces. capability: 80 for sm_80."""
    return 2 * (32 * MIB if capability == 90 else 8 * MIB + 2**17)


def context(capability: int) -> int:
    """Bytes of the CUDA context."""
    return (141 if capability < 80 else 450) * MIB
