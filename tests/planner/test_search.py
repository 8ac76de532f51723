"""The search for the fewest parameters: what is dropped, what is chosen, and that a stopped search goes on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.memory.known import known_shape
from fastlora.memory.shape import shape_of
from fastlora.planner import search
from fastlora.planner.search import Candidate
from tests.support.runs import QUIET, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _values(base: Path, **more):
    return {
        "model_name_or_path": str(base), "train_file": str(base / "train.jsonl"), "eval_file": str(base / "eval.jsonl"),
        "bf16": False, "use_cpu": True, "learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 4, **more,
    }  # fmt: skip


def _candidate(trained: int, gain: float, steps: int = 8) -> Candidate:
    return Candidate(f"{trained}", 1, "", trained, {0: 5.0, steps: 5.0 - gain})


def test_what_is_beaten_with_fewer_parameters_is_dropped_and_the_best_never():
    running = [_candidate(10, 0.5), _candidate(20, 0.4), _candidate(40, 1.0), _candidate(80, 0.9)]
    assert {each.trained for each in search.dropped(running)} == {20, 80}


def test_of_a_frontier_longer_than_half_the_least_gain_goes_first():
    running = [_candidate(10 * 2**i, 0.1 * (i + 1)) for i in range(6)]
    assert {each.trained for each in search.dropped(running)} == {10, 20, 40}


def test_the_fewest_parameters_that_suffice_are_chosen():
    ended = [_candidate(10, 0.5), _candidate(20, 0.992), _candidate(40, 0.995), _candidate(80, 1.0)]
    assert search.chosen(ended, 0.99).trained == 20
    assert search.chosen(ended, 1.0).trained == 80
    assert [each.trained for each in search.frontier([*ended, _candidate(30, 0.7)])] == [10, 20, 40, 80]


def test_candidates_are_counted_as_they_are_trained(base: Path):
    shape = shape_of(json.loads((base / "config.json").read_text()))
    found = search.candidates(shape, [2, 4])
    assert len(found) == 8
    assert {each.trained for each in found if each.name.endswith(", all")} == {
        2 * sum(each.n + each.k for each in shape.linears) * r for r in (2, 4)
    }
    assert len(search.candidates(known_shape("phi-3-mini"), [1])) == 4
    for ranks in ([], [0], [300]):
        with pytest.raises(ValueError, match="ranks must be 1 to 256"):
            search.candidates(shape, ranks)


def test_a_search_goes_on_where_it_was_stopped_and_ends_the_same(base: Path, tmp_path: Path, monkeypatch) -> None:
    values = _values(base)
    shape = search.shape_for(values)
    best, found, steps = search.search(values, shape, [1, 4], 0.9, tmp_path / "whole", QUIET)
    assert steps == 8
    assert best.gain >= 0.9 * max(each.gain for each in found if each.steps == steps)
    assert any(each.steps < steps for each in found)
    assert (tmp_path / "whole" / "search.png").read_bytes().startswith(b"\x89PNG")
    real, calls = search._train, []

    def stops(each, *rest):
        calls.append(each.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(each, *rest)

    monkeypatch.setattr(search, "_train", stops)
    with pytest.raises(KeyboardInterrupt):
        search.search(values, shape, [1, 4], 0.9, tmp_path / "cut", QUIET)
    monkeypatch.setattr(search, "_train", real)
    again, held, _ = search.search(values, shape, [1, 4], 0.9, tmp_path / "cut", QUIET)
    assert again.name == best.name
    assert {each.name: each.losses for each in held} == {each.name: each.losses for each in found}
    with pytest.raises(ValueError, match="another recipe or other ranks"):
        search.search(values, shape, [1, 2], 0.9, tmp_path / "cut", QUIET)


@pytest.mark.parametrize(
    ("changes", "target", "said"),
    [
        ({}, 0, "target must be above 0"),
        ({"max_steps": -1}, 0.9, "a search needs a number of steps"),
        ({"eval_file": None}, 0.9, "nothing to evaluate on"),
    ],
)
def test_what_is_asked_wrongly_is_refused(base: Path, tmp_path: Path, changes: dict, target: float, said: str) -> None:
    values = _values(base)
    with pytest.raises(ValueError, match=said):
        search.search({**values, **changes}, search.shape_for(values), [1], target, tmp_path / "out", QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds no search"):
        search.search(values, search.shape_for(values), [1], 0.9, tmp_path / "other", QUIET)


def test_the_command_names_the_smallest_that_suffices(base: Path, tmp_path: Path) -> None:
    made = tmp_path / "mine.yaml"
    made.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in _values(base, max_steps=4).items()))
    words = ["search", str(made), "--ranks", "1,2", "--target", "0.8", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "of it with" in found.output
    assert (tmp_path / "out" / "search.json").exists()
    wrong = CliRunner().invoke(app, [*words[:3], "a,b", *words[4:]])
    assert wrong.exit_code == 3
    assert "expected whole numbers" in wrong.output
