"""Which code runs where: Triton on CUDA devices, the compiled C++ library on the CPU, plain torch elsewhere.

No device is queried at import. `FASTLORA_BACKEND=torch|cpp|triton|cuda`, read once, forces a backend: `cuda` is Triton
with the compiled decode kernel wherever it applies, `triton` the same without it. With `TRITON_INTERPRET=1` the Triton
kernels also run on CPU tensors.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from fastlora.native import cpu, cuda, linear

MIN_CAPABILITY = (8, 0)

FORCED = ("triton", "cuda", "cpp", "torch")


class Backend(NamedTuple):
    """The code that runs on a device, and why that code."""

    name: str  # "triton", "cpp" or "torch"
    reason: str


def backend(device: torch.device | str) -> Backend:
    """The backend of a device with the reason, which names what is missing where the backend is the slow one.

    Raises:
        ValueError: FASTLORA_BACKEND does not name a backend, or names one that cannot run there.
    """
    return _backend(device if type(device) is torch.device else torch.device(device))


_Function = TypeVar("_Function", bound=Callable[..., Any])
_read_once: list[Any] = []


def read_once(function: _Function) -> _Function:
    """Keep the results of a function that depends on the environment, until `forget_choices`."""
    kept = functools.lru_cache(maxsize=4096)(function)
    _read_once.append(kept)
    return kept  # type: ignore[return-value]


@read_once
def _backend(device: torch.device) -> Backend:
    forced, kind, index = os.environ.get("FASTLORA_BACKEND", ""), device.type, device.index
    if forced:
        if forced not in FORCED:
            raise ValueError(f"FASTLORA_BACKEND must be one of {', '.join(FORCED)}; got {forced!r}")
        if reason := _missing(forced, kind, index):
            raise ValueError(f"FASTLORA_BACKEND={forced} cannot run on {kind}: {reason}")
        if forced == "cuda":
            return Backend("triton", "Triton kernels, compiled decode kernel: forced by FASTLORA_BACKEND")
        return Backend(forced, "forced by FASTLORA_BACKEND")
    fast = "triton" if kind == "cuda" else "cpp"
    if reason := _missing(fast, kind, index):
        if kind != "meta":
            warnings.warn(
                f"fastlora's kernels do not run on {device}: {reason}. There NF4 and LoRA are computed by plain torch, "
                "several times slower; FASTLORA_BACKEND=torch chooses that without a warning",
                stacklevel=2,
            )
        return Backend("torch", f"slow path: {reason}")
    if fast == "cpp":
        return Backend("cpp", cpu.status()[1])
    reason = _missing("cuda", kind, index)
    return Backend("triton", f"Triton kernels, decode too: {reason}" if reason else "Triton kernels, compiled decode")


def forget_choices() -> None:
    """Read FASTLORA_BACKEND, FASTLORA_AUTOTUNE and FASTLORA_CPU_ISA again at the next call; else they are read once."""
    for kept in _read_once:
        kept.cache_clear()
    linear.forget_choice()


def _missing(name: str, device_type: str, index: int | None) -> str:
    """Why a backend cannot run on a device; empty where it can."""
    if name == "torch":
        return ""
    if name == "cpp":
        return _no_cpp(device_type)
    if (reason := _no_triton(device_type, index)) or name == "triton":
        return reason
    live, reason = compiled_decode(torch.device(device_type) if index is None else torch.device(device_type, index))
    return "" if live else reason


def _no_triton(device_type: str, index: int | None) -> str:
    """Why the Triton kernels cannot run on a device; empty where they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    if triton.knobs.runtime.interpret:
        return ""
    if device_type != "cuda":
        return "the Triton kernels need a CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return ""


def _no_cpp(device_type: str) -> str:
    """Why the C++ library cannot run on a device; empty where it can."""
    if device_type != "cpu":
        return f"no fastlora kernels for {device_type!r} devices"
    loaded, reason = cpu.status()
    return "" if loaded else reason


def compiled_decode(device: torch.device) -> tuple[bool, str]:
    """Whether the compiled decode kernel can run on a device, with what it is, or why not and what to do."""
    if device.type != "cuda":
        return False, "the compiled decode kernel needs a CUDA device"
    usable, reason = cuda.usable(device)
    return usable, reason or cuda.status()[1]
