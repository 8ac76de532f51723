"""A GPU that is not there: fastlora's CUDA path on CPU tensors, up to the last call before the driver.

`pretend(arch)` gives Triton a driver of our own and makes fastlora take CPU tensors for a GPU's. Kernels are bound,
specialized and compiled for the architecture as on a machine that has it; then the stand-in for Triton's launcher asks
every tensor for its pointer, as the real one does, counts, and returns. So what Python costs can be measured, and wrong
arguments found, without a GPU. Results are whatever memory held.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"
os.environ["FASTLORA_BACKEND"] = "triton"

from typing import Any

import torch
import triton
from fastlora.kernels import choice, decode, fused, lora_plan, nf4
from fastlora.kernels import dora as dora_kernel
from triton.backends.compiler import GPUTarget

from fastlora.ops import backend, linear_cuda

PROCESSORS = 132  # of the GPU that is not there


class Launches:
    """What has been launched; `number` counts all, `kept` has (kernel's handle, grid, arguments) if it is a list."""

    def __init__(self) -> None:
        self.number = 0
        self.kept: list[tuple[int, tuple[int, int, int], tuple[Any, ...]]] | None = None


launches = Launches()


class _Launcher:
    """In the place of Triton's `CudaLauncher`."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.pointers = [place for place, kind in enumerate(src.signature.values()) if kind[0] == "*"]

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, facts: Any, enter: Any, leave: Any,
        *args: Any,
    ) -> None:  # fmt: skip
        for place in self.pointers:
            if type(args[place]) is not int:
                args[place].data_ptr()
        launches.number += 1
        if launches.kept is not None:
            launches.kept.append((function, (x, y, z), args))


class _Utilities:
    """What Triton asks of a driver's C part."""

    loaded = 0

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded += 1  # a handle of its own for each kernel
        return self.loaded, self.loaded, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": PROCESSORS, "warpSize": 32}


class Driver:
    """As much of Triton's driver as compiling and launching need."""

    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(arch: int) -> None:
    """Make this process take the CPU for a GPU of an architecture, such as 90."""
    capability = divmod(arch, 10)
    triton.runtime.driver.set_active(Driver(arch))
    backend._no_triton = lambda *_: ""
    backend.forget_choices()
    choice.gpu_of = lambda device: ("unknown", capability)
    fused._device = lambda index: (capability, PROCESSORS)
    lora_plan.programs_wanted = lambda index: lora_plan.PROGRAMS_PER_SM * PROCESSORS
    linear_cuda.wide_product = lambda x, w: torch.mm(x, w)  # one call, as on a GPU
    nf4.lookup = decode.lookup = dora_kernel.lookup = lambda *_: "shfl"
