"""One run in a directory: who holds it is told, and a run that was killed holds nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastlora.demo import demo
from fastlora.training import lock
from fastlora.training.loop import Hooks, train
from fastlora.training.run import Run
from tests.support.full_disk import no_file_beyond
from tests.support.runs import QUIET, recipe

HOLD = (
    "import sys, pathlib; from fastlora.training import lock\n"
    "with lock.held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def holder(directory: Path) -> "subprocess.Popen[str]":
    """Another process that holds a directory until its input ends."""
    words = [sys.executable, "-c", HOLD, str(directory)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_told_who_holds_the_first(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    other = holder(out)
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"output_dir: .*is in use by another run") as error:
            train(recipe(base, out), resume=resume, console=QUIET)
        assert re.search(rf"process {other.pid} on \S+ since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d", str(error.value))
    assert sorted(path.name for path in out.iterdir()) == [lock.NOTE, lock.LOCK]
    other.communicate()
    assert not out.exists()  # nothing was put into it
    train(recipe(base, out, max_steps=1), console=QUIET)
    assert not {lock.NOTE, lock.LOCK} & {path.name for path in out.iterdir()}


def test_a_run_holds_its_directory_within_a_process_too(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    class Second(Hooks):
        def on_start(self, run: Run) -> None:
            with pytest.raises(ValueError, match=f"in use by another run .process {os.getpid()} "):
                train(recipe(base, out), console=QUIET)

    train(recipe(base, out, max_steps=1), hooks=Second(), console=QUIET)


def test_the_lock_of_a_killed_run_ends_with_it(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    other = holder(out)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert (out / lock.NOTE).is_file()
    console = Console(record=True, width=500, file=(tmp_path / "log").open("w"))
    train(recipe(base, out, max_steps=1), console=console)
    assert f"the last run in {out} was killed (process {other.pid} on" in console.export_text()
    assert not (out / lock.NOTE).exists()


@pytest.mark.parametrize("note", ["", "[]", "{}", "[" * 100_000, "\xff"])
def test_a_note_that_cannot_be_read_is_no_obstacle(tmp_path: Path, note: str) -> None:
    out = tmp_path / "run"
    other = holder(out)
    (out / lock.NOTE).write_text(note, encoding="latin-1")
    with pytest.raises(ValueError, match=r"in use by another run .which has left no note"), lock.held(out):
        pass
    other.communicate()
    with lock.held(out):
        assert json.loads((out / lock.NOTE).read_text())["pid"] == os.getpid()


def test_a_directory_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("a" * 300)):
        for resume in (False, True):
            message = "holds no checkpoint" if resume else "^output_dir: cannot write in "
            with pytest.raises(ValueError, match=message):
                train(recipe(base, place), resume=resume, console=QUIET)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_told_at_the_start(base: Path, tmp_path: Path) -> None:
    with no_file_beyond(10), pytest.raises(ValueError, match=r"cannot write in .*/run \(File too large\)"):
        train(recipe(base, tmp_path / "run"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_no_directory(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        train(recipe(base, tmp_path / "run", train_file="none.jsonl"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_demo_does_not_move_a_run_that_is_under_way(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "recipe.yaml").write_text(demo.recipe_with_data([f"output_dir={out}"]).to_yaml())
    other = holder(out)
    with pytest.raises(ValueError, match="is in use by another run"):
        demo.run([f"output_dir={out}"], console=QUIET)
    other.communicate()
    assert [path.name for path in out.iterdir()] == ["recipe.yaml"]
    assert not (tmp_path / "demo.previous").exists()
