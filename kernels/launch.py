"""Launches that are remembered: what Triton finds out at each call is found out once for each kind of call.

A call through Triton binds the arguments, looks at each one's dtype, value and alignment, and forms a key as long as a
line of text: 26 us for a kernel with thirty arguments. Here the caller names the kind of a call by a short key, from
which everything follows that Triton specializes on: dtypes, sizes and strides, constants, device. The first call of a
kind goes through Triton. Later ones pass pointers as integers to the kernel that it found: 4 us.

Two things are not in a key. Pointers must be at multiples of 16 bytes, as Triton takes them to be where they were at
first; others go through Triton, each time. Hooks on launches (a profiler's) and on the kernel must be called: while
there are any, every call goes through Triton.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

MOST_KINDS = 4096  # of one kernel; then all are forgotten
_address = Tensor.data_ptr


class _Known(NamedTuple):
    """A kind of call."""

    run: Callable[..., None]
    stream: Callable[[int], int]  # of a device
    device: int
    function: int
    packed: Any
    constants: tuple[Any, ...]


class Launcher:
    """Launches one kernel, whose parameters are pointers, then numbers, then constants.

    Args:
        kernel: jitted.
        constants: makes a kind's constants and Triton's options from its key.
    """

    def __init__(self, kernel: Any, constants: Callable[..., dict[str, Any]]) -> None:
        self.kernel, self.constants = kernel, constants
        self._known: dict[Any, _Known] = {}

    def __call__(
        self, key: tuple[Any, ...], grid: tuple[int, ...], pointers: tuple[Any, ...], numbers: tuple[int | float, ...]
    ) -> None:
        """Launch on the device of the first pointer.

        Args:
            key: hashable; from it follow the constants, all integers among the numbers that the kernel specializes
                on, and the dtypes of all pointers.
            grid: of one to three numbers.
            pointers: tensors, on one device.
        """
        device = pointers[0].device.index
        if device is not None and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(key, grid, pointers, numbers)
        known = self._known.get((device, key))
        if known is not None and not _has_hooks(self.kernel):
            addresses = tuple(map(_address, pointers))
            if not functools.reduce(operator.or_, addresses) & 15:
                run, stream, index, function, packed, constants = known
                x, y, z = (*grid, 1, 1)[:3]
                run(x, y, z, stream(index), function, packed, None, None, None, *addresses, *numbers, *constants)
                return None
        return self._through_triton(device, key, grid, pointers, numbers)

    def _through_triton(
        self, device: int | None, key: tuple[Any, ...], grid: tuple[int, ...], pointers: tuple[Any, ...],
        numbers: tuple[int | float, ...],
    ) -> None:  # fmt: skip
        constants = self.constants(*key)
        compiled = self.kernel[grid](*pointers, *numbers, **constants)
        if not isinstance(self.kernel, JITFunction) or any(pointer.data_ptr() & 15 for pointer in pointers):
            return  # interpreted, or specialized for this alignment
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        driver = triton.runtime.driver.active
        rest = tuple(constants[name] for name in self.kernel.arg_names[len(pointers) + len(numbers) :])
        self._known[device, key] = _Known(
            compiled.run, driver.get_current_stream, driver.get_current_device(), compiled.function,
            compiled.packed_metadata, rest,
        )  # fmt: skip

    def forget(self) -> None:
        """Go through Triton again for every kind."""
        self._known.clear()


def _has_hooks(kernel: Any) -> bool:
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    none = (enter is None or not getattr(enter, "calls", True)) and (leave is None or not getattr(leave, "calls", True))
    return not none or bool(kernel.pre_run_hooks)
