"""`bench gpu`: phases in order, bounded, resumable, each with its log; and the whole of it rehearsed without a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench.cli import COMMANDS, main
from bench.gpu import gpu, phases
from bench.gpu.phases import Phase, Step
from bench.measure.record import ROOT


def python(code: str, **options) -> Step:
    return Step(("-c", code), program=sys.executable, **options)


def phase(name: str, *codes: str, share: float = 1.0, **options) -> Phase:
    return Phase(name, share, tuple(python(code) for code in codes), **options)


def walk(out: Path, *chosen: Phase, seconds: float = 60.0, again: bool = False) -> dict[str, tuple[str, str]]:
    return {o.phase: (o.status, o.note) for o in gpu.walk(list(chosen), out, seconds, again)}


def test_a_phase_that_fails_does_not_stop_the_next_and_each_has_its_log(tmp_path):
    found = walk(
        tmp_path,
        phase("one", "print('first'); raise SystemExit(3)", "print('second')"),
        phase("two", "import sys; print('to out'); print('to err', file=sys.stderr)"),
    )
    assert found == {"one": ("failed", "second"), "two": ("ok", "to err")}
    assert "first" in (tmp_path / "one.log").read_text()
    assert set((tmp_path / "two.log").read_text().splitlines()[1:]) == {"to out", "to err"}
    assert json.loads((tmp_path / "phases.json").read_text())["one"]["status"] == "failed"


def test_what_succeeded_is_not_run_again_unless_asked_for(tmp_path):
    mark = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    failing = f"{mark}; raise SystemExit(1)"
    for expected, again in (("xx", False), ("xxx", False), ("xxxxx", True)):
        found = walk(tmp_path, phase("good", mark), phase("bad", failing), again=again)
        assert {name: status for name, (status, _) in found.items()} == {"good": "ok", "bad": "failed"}
        assert (tmp_path / "runs").read_text() == expected


def test_time_that_runs_out_ends_the_process_with_its_children_and_keeps_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    child = "import time; print('child', flush=True); time.sleep(600)"
    parent = (
        "import subprocess, sys, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); time.sleep(600)"
    )
    began = time.monotonic()
    found = walk(tmp_path, phase("long", parent, "print('never')"), phase("next", "print('ran')"), seconds=8)
    assert found == {"long": ("out of time", "child"), "next": ("ok", "ran")}
    assert time.monotonic() - began < 9
    pid = int((tmp_path / "long.log").read_text().splitlines()[-2])
    assert "never" not in (tmp_path / "long.log").read_text()
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end(pid)


def _wait_for_the_end(pid: int) -> None:
    for _ in range(50):
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            raise ProcessLookupError  # ended; no one has asked for its status yet
        time.sleep(0.1)


def test_a_process_that_is_left_behind_ends_with_its_phase(tmp_path):
    child = "import time; time.sleep(600)"
    parent = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    assert walk(tmp_path, phase("one", parent))["one"][0] == "ok"
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end(int((tmp_path / "one.log").read_text().splitlines()[-1]))


def test_ending_the_whole_ends_the_process_at_work(tmp_path):
    sleeper = Phase("long", 1.0, (python("import os, time; print(os.getpid(), flush=True); time.sleep(600)"),))
    code = (
        "import sys; from bench.gpu import gpu; from bench.cli import main; from bench.gpu.phases import Phase, Step\n"
        f"gpu.rehearsed = lambda out: [{sleeper!r}]\n"
        f"sys.exit(main(['gpu', '--dry-run', '--out', {str(tmp_path)!r}]))"
    ).replace(repr(sleeper.skip), "lambda: ''")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "long.log"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().split("\n")) > 2):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end(int(log.read_text().splitlines()[-1]))


def test_what_a_phase_leaves_of_its_time_goes_to_the_others(tmp_path, monkeypatch):
    limits = {}

    def perform(phase: Phase, out: Path, limit_s: float) -> gpu.Outcome:
        limits[phase.name] = limit_s
        return gpu.Outcome(phase.name, "ok")

    monkeypatch.setattr(gpu, "perform", perform)
    walk(tmp_path, phase("a", share=1), phase("b", share=2), phase("c", share=1), seconds=400)
    assert limits == pytest.approx({"a": 100, "b": 400 * 2 / 3, "c": 400}, rel=0.01)


def test_an_early_phase_gets_what_it_needs_of_a_short_time(tmp_path, monkeypatch):
    limits = {}
    monkeypatch.setattr(gpu, "perform", lambda p, out, s: limits.update({p.name: s}) or gpu.Outcome(p.name, "ok"))
    walk(tmp_path, phase("a", least_s=60), phase("b", share=3, least_s=300), seconds=100)
    assert limits == pytest.approx({"a": 60, "b": 100}, rel=0.01)


def test_a_kill_at_any_moment_leaves_the_phase_at_work_and_an_archive(tmp_path):
    """The state and the archive have what is done, and what was running."""
    out, packed = tmp_path / "run", tmp_path / "packed"
    code = (
        "import sys\nfrom bench.gpu import gpu\nfrom bench.cli import main\nfrom tests.bench.test_gpu import phase\n"
        "naps = [phase(n, 'import time; print(1, flush=True); time.sleep(0.7)') for n in ('one', 'two', 'three')]\n"
        "gpu.rehearsed = lambda out: naps\n"
        f"sys.exit(main(['gpu', '--dry-run', '--out', {str(out)!r}, '--again', '--archive', {str(packed)!r}]))"
    )
    for wait in (0.0, 1.1):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        state = out / "phases.json"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not state.exists():
            time.sleep(0.05)
        time.sleep(wait)
        process.terminate()
        process.wait(30)
        found = json.loads(state.read_text())
        assert [o["status"] for o in found.values()].count("running") == 1
        with tarfile.open(packed / "run.tar.gz") as archive:
            assert "run/phases.json" in archive.getnames()
            assert "run/one.log" in archive.getnames()
        state.unlink()


def test_an_archive_names_what_is_too_large_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_ARCHIVE_BYTES", 100)
    out = tmp_path / "h100"
    (out / "deep").mkdir(parents=True)
    (out / "small.csv").write_text("a,b\n")
    (out / "deep" / "large.log").write_text("x" * 200)
    with tarfile.open(gpu.archive(out, tmp_path / "to")) as packed:
        assert set(packed.getnames()) == {"h100/small.csv", "h100/left-out.txt"}
        assert b"deep/large.log, 200 bytes" in packed.extractfile("h100/left-out.txt").read()


def test_a_test_that_fails_is_written_when_it_fails(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'two'\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.failures", "-p", "no:cacheprovider", "--rootdir"]
    environment = {**os.environ, "FASTLORA_FAILURES": str(tmp_path / "failures.log"), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run([*command, tmp_path, tmp_path], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 1
    written = (tmp_path / "failures.log").read_text()
    assert "test_bad (call)" in written
    assert "AssertionError: two" in written
    assert "test_good" not in written


def test_a_phase_that_cannot_run_says_why_and_is_no_failure(tmp_path, capsys):
    assert walk(tmp_path, phase("tests", "1/0", skip=lambda: "pytest is not installed here")) == {
        "tests": ("skipped", "pytest is not installed here")
    }
    assert not gpu.Outcome("tests", "skipped").is_failure
    assert gpu.Outcome("tests", "out of time").is_failure


def test_what_is_kept_is_copied_to_the_results_however_the_phase_ends(tmp_path):
    made, out = tmp_path / "choice.csv", tmp_path / "out"
    out.mkdir()
    walk(out, phase("tune", f"open({str(made)!r}, 'w').write('rows'); 1/0", keep=(made, tmp_path / "never")))
    assert (out / "choice.csv").read_text() == "rows"
    assert not (out / "never").exists()


def test_a_program_that_is_not_there_is_a_failure(tmp_path):
    found = walk(tmp_path, Phase("build", 1.0, (Step(("x",), program="/nowhere/nvcc"), python("print('on')"))))
    assert found["build"] == ("failed", "on")


def test_a_limit_reaches_the_command_line():
    assert Step(("bench", "tune", "--budget", phases.SECONDS)).command(100)[-1] == "88"
    assert Step(("bench", phases.SECONDS)).command(5) == [sys.executable, "-m", "bench", "1"]


@pytest.mark.parametrize("arch", [80, 90, 103, 121])
def test_on_a_gpu_every_phase_and_every_option_is_known(tmp_path, arch):
    from bench.machine_code.specimen import ARCHITECTURES

    known = phases.on_gpu(tmp_path, arch)
    names = [p.name for p in known if not p.optional]
    assert [p.name for p in phases.rehearsed(tmp_path)] == [*names, "static", "report"]
    assert sum(p.share for p in known) > 0
    for step in (step for p in known for step in p.steps if step.words[0] == "bench"):
        words = step.command(60.0)[3:]
        parse(words)
        if "--arch" in words:
            assert int(words[words.index("--arch") + 1]) in ARCHITECTURES


def parse(words: list[str]) -> None:
    """Read a subcommand's options as `python -m bench` does; unknown ones end the test."""
    import argparse
    import importlib

    module = importlib.import_module(COMMANDS[words[0]])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.parse_args(words[1:])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dry-run", "--phases", "teste"], "no phase called 'teste'; there are install, build, checks, steps, train"),
        (["--dry-run", "--seconds", "0"], "--seconds must be above 0"),
        pytest.param(
            [], "finds no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit):
        main(["gpu", "--out", str(tmp_path / "out"), *options])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_some_phases_alone(tmp_path, capsys):
    assert main(["gpu", "--dry-run", "--out", str(tmp_path), "--phases", "install"]) == 0
    shown = capsys.readouterr().out
    assert "install    ok" in shown
    assert "absent:" in (tmp_path / "install.log").read_text()


@pytest.mark.slow
def test_the_whole_is_rehearsed_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTLORA_REHEARSED_VARIANTS", "1")
    status = main(["gpu", "--dry-run", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    logs = "\n".join(log.read_text()[-1500:] for log in tmp_path.glob("*.log"))
    assert status == 0, shown + logs
    for name in ("kernels.csv", "static.csv", "choice.csv", "steps.csv", "train.csv", "host.csv", "report.html"):
        assert (tmp_path / name).stat().st_size > 0, logs
    assert list((tmp_path / "plots").iterdir())
    for known in phases.rehearsed(tmp_path):
        assert f"\n{known.name:<10} ok" in shown
    passed = re.search(r"(\d+) passed", (tmp_path / "tests.log").read_text())
    assert passed
    assert int(passed[1]) > 20


REHEARSED = """
import pytest, torch
pytestmark = pytest.mark.gpu

@pytest.fixture
def checked():
    calls = []
    yield calls
    assert calls

@pytest.mark.parametrize("number", range(20))
def test_right(number):
    x = torch.zeros(2, device="cuda").to("cuda:0")
    assert x.cuda().device.type == torch.empty(1, device=torch.device("cuda")).device.type == "cpu"
    assert torch.randn(2, generator=torch.Generator("cuda").manual_seed(0)).shape == (2,)

def test_wrong():
    assert torch.ones(1, device="cuda").item() == 2

def test_misspelt():
    torch.ones(1, device="cuda").itme()

def test_streams(checked):
    torch.cuda.Stream()

def test_endless():
    from fastlora.ops.gated import gated

    while True:
        gated(torch.ones(1, 1, device="cuda"), torch.ones(1, 1, device="cuda"), "silu")

@pytest.mark.gpu(rehearsed=False)
def test_memory():
    assert False

def test_a_check_in_the_end(checked):
    pass
"""


def test_a_rehearsal_runs_the_tests_and_finds_mistakes_in_them(tmp_path):
    (tmp_path / "test_rehearsed.py").write_text(REHEARSED)
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.rehearsal", "-p", "no:cacheprovider", "-rfEs", "-q"]
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FASTLORA_BACKEND": "triton",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path)
    shown = found.stdout
    assert found.returncode == 1, shown + found.stderr
    assert "2 failed, 5 passed, 3 skipped, 16 deselected" in shown
    assert "1 error" in shown
    for name, why in (("test_wrong", "AssertionError: assert 1.0 == 2"), ("test_misspelt", "AttributeError")):
        assert f"test_rehearsed.py::{name} - {why}" in shown
    for why in ("needs a device: RuntimeError", "the interpreter takes longer", "it looks at the device itself"):
        assert why in shown
