"""Timing: percentiles, turns, what is timed and what is not, on a CPU and with a CUDA device's events faked."""

import functools
import time

import pytest
import torch

from bench.measure import cuda
from bench.measure.timing import interleave, spread
from tests.bench.support import CPU


def test_percentiles_are_interpolated():
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    assert (found.p50, found.p20, found.p80) == pytest.approx((3.5, 2.0, 5.0))
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_candidates_are_called_in_turn_each_on_the_next_copy():
    calls: list[tuple[str, int]] = []
    found = interleave(
        {name: functools.partial(lambda name, serial: calls.append((name, serial)), name) for name in "abc"},
        CPU,
        0.0,
        7,
    )
    assert set(found) == set("abc")
    assert [serial for _, serial in calls] == list(range(len(calls)))
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 2 + 7
    assert all({name for name, _ in calls} == set("abc") for calls in rounds)


def test_a_candidate_that_fails_while_it_is_timed_leaves_the_round():
    calls = {"good": 0, "bad": 0}

    def bad(serial: int) -> None:
        calls["bad"] += 1
        if calls["bad"] > 4:
            raise RuntimeError("worn out")

    def good(serial: int) -> None:
        calls["good"] += 1

    failures: dict[str, str] = {}
    found = interleave({"good": good, "bad": bad}, CPU, 0.0, 6, failures=failures)
    assert set(found) == {"good"}
    assert failures == {"bad": "RuntimeError: worn out"}
    assert calls == {"good": 8, "bad": 5}
    calls["bad"] = 0
    with pytest.raises(RuntimeError, match="worn out"):
        interleave({"bad": bad}, CPU, 0.0, 6)


def test_what_comes_before_a_call_is_not_timed():
    class Staged:
        def before(self, serial: int) -> None:
            time.sleep(0.02)

        def __call__(self, serial: int) -> None:
            pass

    assert interleave({"staged": Staged()}, CPU, 0.0, 3)["staged"].p80 < 10


GPU = torch.device("cuda")


class FakeEvent:
    """Writes down when it is recorded."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        JOURNAL.append("event")

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 2.0


JOURNAL: list[str] = []


@pytest.fixture
def fake_cuda(monkeypatch):
    JOURNAL.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: JOURNAL.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: JOURNAL.append("spin"))


def test_launches_are_hidden_behind_a_spin_or_seen_on_an_idle_device(fake_cuda):
    class Staged:
        def before(self, serial: int) -> None:
            JOURNAL.append("before")

        def __call__(self, serial: int) -> None:
            JOURNAL.append("call")

    found = interleave({"one": Staged()}, GPU, 0.0, 1)
    assert found["one"].p50 == 2.0
    warm_up = ["before", "wait", "call", "wait"]
    assert [*warm_up, *warm_up, "before", "spin", "event", "call", "event", "wait"] == JOURNAL
    JOURNAL.clear()
    interleave({"one": Staged()}, GPU, 0.0, 1, hide_launches=False)
    assert [*warm_up, *warm_up, "before", "wait", "event", "call", "event", "wait"] == JOURNAL


def test_a_spin_is_bounded(fake_cuda, monkeypatch):
    spins = []
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    cuda.head_start(1e-4)
    cuda.head_start(60.0)
    assert spins == [200_000, 10_000_000]
