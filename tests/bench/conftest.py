"""Every run of `bench kernels` in these tests measures the machine's own speed on a small product."""

import functools

import pytest

from bench.compare import linear
from bench.measure.machine import measure_machine


@pytest.fixture(autouse=True)
def small_machine_check(monkeypatch):
    monkeypatch.setattr(linear, "measure_machine", functools.partial(measure_machine, size=64))
