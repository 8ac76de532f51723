"""Shared by all tests: the interpreter stands in for a GPU, and missing GPUs are named, not hidden."""

import importlib.util
import os

import pytest

if "TRITON_INTERPRET" not in os.environ:
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    except ImportError:
        pass
if os.environ.get("TRITON_INTERPRET", "0") != "0" and importlib.util.find_spec("triton"):
    from interpreter import teach_bf16

    teach_bf16()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, by name, what needs a CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
