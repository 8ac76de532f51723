"""A plugin of pytest's: the GPU tests on a CPU, by Triton's interpreter, so that mistakes in them show before a rented
minute does.

Wherever a test names the device "cuda", the CPU is taken. Of the variants of a test a few run, spread over all, as many
as FASTLORA_REHEARSED_VARIANTS says. A test that takes too long, needs what only a device has (its memory, streams,
graphs, compiled kernels), or is marked `gpu(rehearsed=False)` is skipped and says so. Triton must be interpreted, and
FASTLORA_BACKEND=triton.
"""

import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import InterpreterBuilder

MOST_VARIANTS = int(os.environ.get("FASTLORA_REHEARSED_VARIANTS", "4"))
SECONDS = 3.0
_NEEDS = ("CUDA", "cuda", "NVIDIA", "inline_asm not supported", "dummy base class")  # in errors for want of a device
_CPU = torch.device("cpu")


class TooLong(BaseException):
    """Raised in a test whose time is over; not an Exception, which a test may expect."""


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device:
            return _moved(function(*args, **(kwargs or {})))
        kwargs = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return function(*map(_moved, args), **kwargs)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    return _CPU if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


_generator = torch.Generator
_skipped = pytest.StashKey[bool]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take a few variants of each GPU test, and let them run without a device."""
    variants: dict[Any, list[pytest.Item]] = {}
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if mark.kwargs.get("reason") != "no CUDA device"]
        variants.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    chosen = {id(item) for found in variants.values() for item in _spread(found)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def _spread(found: list[pytest.Item]) -> list[pytest.Item]:
    step = max(1.0, len(found) / MOST_VARIANTS)
    return [found[int(number * step)] for number in range(min(len(found), MOST_VARIANTS))]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Set a test's fixtures up on the CPU."""
    if any(mark.kwargs.get("rehearsed") is False for mark in item.iter_markers("gpu")):
        pytest.skip("it looks at the device itself")
    with _rehearsed():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a test on the CPU."""
    pyfuncitem.stash[_skipped] = True
    with _rehearsed():
        result = yield
    pyfuncitem.stash[_skipped] = False
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """What a fixture checks in the end counts only where the test ran to its end."""
    try:
        return (yield)
    except AssertionError:
        if not item.stash.get(_skipped, True):
            raise
        return None


@contextmanager
def _rehearsed() -> Iterator[None]:
    """The CPU in the place of the device, for so long; skips the test where it cannot be."""
    monkeypatch = pytest.MonkeyPatch()
    for name, answer in (("synchronize", None), ("set_sync_debug_mode", None), ("get_device_capability", (8, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": _generator(_moved(device)))
    deadline, next_program = time.monotonic() + SECONDS, InterpreterBuilder.set_grid_idx

    def in_time(builder: Any, *place: int) -> None:
        if time.monotonic() > deadline:  # between two programs, where the interpreter can be left
            raise TooLong
        next_program(builder, *place)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", in_time)
    pool = ThreadPoolExecutor.__init__  # the interpreter has one grid for all threads
    monkeypatch.setattr(ThreadPoolExecutor, "__init__", lambda self, *_, **__: pool(self, 1))
    try:
        with _OnCpu():
            yield
    except TooLong:
        pytest.skip(f"rehearsed for {SECONDS:g} s: the interpreter takes longer")
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, AssertionError) and "not compiled with CUDA" not in said:
            raise
        if not isinstance(error, SystemExit) and not any(word in said for word in _NEEDS):
            raise
        pytest.skip(f"needs a device: {said.partition(chr(10))[0][:100]}")
    finally:
        monkeypatch.undo()
