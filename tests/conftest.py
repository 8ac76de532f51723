"""Shared by all tests: the interpreter stands in for a GPU, and a missing GPU is named, not hidden."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

if "TRITON_INTERPRET" not in os.environ:
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    except ImportError:
        pass
if os.environ.get("TRITON_INTERPRET", "0") != "0" and importlib.util.find_spec("triton"):
    from tests.support.interpreter import teach_bf16

    teach_bf16()


def pytest_configure() -> None:
    """What `fastlora.replace_linear` brings along, for tests that import the function from its module."""
    if importlib.util.find_spec("torch"):
        import fastlora

        assert fastlora.replace_linear


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, by name, what needs a CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `isa` runs on every instruction set of the CPU library that this machine has."""
    if "isa" in metafunc.fixturenames:
        from fastlora.native import cpu

        metafunc.parametrize("isa", cpu.isas(), indirect=True)


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    """Forget after each test what its environment chose; set up before `monkeypatch`."""
    yield
    from fastlora.ops.backend import forget_choices

    forget_choices()


@pytest.fixture
def monkeypatch(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """pytest's own, but a variable or a replaced function takes effect at once."""
    from fastlora.ops.backend import forget_choices

    def counting(change: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> None:
            change(*args, **kwargs)
            forget_choices()

        return changed

    for name in ("setenv", "delenv", "setattr"):
        setattr(monkeypatch, name, counting(getattr(monkeypatch, name)))
    return monkeypatch


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set that the CPU library uses during a test."""
    from fastlora.native import cpu

    monkeypatch.setenv("FASTLORA_CPU_ISA", request.param)
    assert request.param in cpu.status()[1]
    return str(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, which is faster for small tensors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN, so that what a kernel does not write shows."""
    import torch

    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
