"""Everything to be done on a CUDA machine, in one command: `make gpu`, or `python -m bench gpu`.

    install      peers that are absent, where pip has a network and a virtual environment; else says which are absent
    build        the compiled libraries, CPU and CUDA, for this GPU
    checks       linears of every kind against fp64
    steps        bench steps: whole training steps beside peft, and the kernels that take most of them
    train        bench train: a whole model's tokens/s beside peft's
    tests        pytest -m gpu; rehearsed on the CPU as `bench.gpu.rehearsal` says
    many         bench kernels at 4,096 and 16,384 tokens
    tune         bench tune: the table of choices for this GPU, in kernels/choice.csv; a copy is kept with the results
    tuned        bench kernels again for small M, now that the table has rows for this GPU
    kernels      bench kernels: training shapes, decode and M = 256, dropout, a dense base
    host         bench host: what a call costs the CPU
    sanitizers   one linear of each kind under compute-sanitizer: memcheck, racecheck, initcheck

and, only where asked for by name: static (registers, spills, instructions a weight), report (plots and the page), both
without a GPU; profile (hardware counters by ncu), experts and options (against peft).

The order is that of value, so that a run that is cut short at any minute leaves the most. A phase is one or a few
processes, with a log and a time limit: its share of what is left of --seconds, so that what one leaves over goes to the
others. What it wrote before its time ran out is kept; each test that fails is in failures.log when it fails. A phase
that fails does not stop the next. One that has succeeded is not run again unless --again says so. The last thing
printed is a table of phases; the exit status is 1 where one failed. phases.json names the phase at work, and with
--archive DIR everything is packed into DIR/NAME.tar.gz after each phase. `--dry-run` goes through them without a GPU:
kernels in Triton's interpreter, tiny shapes.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from bench.compare.peers import absent
from bench.gpu.phases import Phase, Step, on_gpu, rehearsed
from bench.measure.record import RESULTS, ROOT
from bench.measure.timing import device_name

SUMMARY = "everything to be done on a CUDA machine: build, test, measure, tune, plot; bounded and resumable"
WHOLE_S = 1500.0
_GRACE_S = 5.0
_STATE = "phases.json"
_NOTE_WIDTH = 90
_ARCHIVE_BYTES = 15_000_000


@dataclass
class Outcome:
    """How a phase ended; `status` is one of ok, failed, out of time, skipped, and running before that."""

    phase: str
    status: str
    seconds: float = 0.0
    note: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether the whole run counts as failed because of it."""
        return self.status in ("failed", "out of time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench gpu`."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results (bench/results/GPU; rehearsed: build/gpu-dry-run)"
    )
    parser.add_argument("--phases", nargs="+", metavar="NAME", help="only these, in their usual order")
    parser.add_argument("--again", action="store_true", help="also run phases that have succeeded before")
    parser.add_argument("--seconds", type=float, default=WHOLE_S, help=f"for all phases together ({WHOLE_S:g})")
    parser.add_argument("--archive", type=Path, metavar="DIR", help="pack results and logs into one file there")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: the interpreter and tiny shapes")


def run(arguments: argparse.Namespace) -> int:
    """Run the phases; 1 where one failed.

    Raises:
        ValueError: no CUDA device and no --dry-run, an unknown phase, no time.
    """
    if not arguments.dry_run and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; --dry-run goes through the phases without one")
    if arguments.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, not {arguments.seconds:g}")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if arguments.dry_run:
        out = (arguments.out or ROOT / "build" / "gpu-dry-run").resolve()
        known = rehearsed(out)
    else:
        major, minor = torch.cuda.get_device_capability()
        place = device_name(device).lower().replace(" ", "-")
        out = (arguments.out or RESULTS / place).resolve()
        known = on_gpu(out, 10 * major + minor)
    chosen = choose_phases(known, arguments.phases)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{device_name(device)}, torch {torch.__version__}, absent: {', '.join(absent()) or 'none'}")
    print(f"results and logs: {out}", flush=True)
    outcomes = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for outcome in walk(chosen, out, arguments.seconds, arguments.again):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            if arguments.archive is not None:
                archive(out, arguments.archive)
    finally:
        signal.signal(signal.SIGTERM, before)
        if arguments.archive is not None:
            archive(out, arguments.archive)
    print("\n".join(["", "phase      status           s  last words", *map(line, outcomes)]))
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, which ends the running process too."""
    raise SystemExit(128 + number)


def choose_phases(known: list[Phase], names: list[str] | None) -> list[Phase]:
    """The phases of these names, or all that are not optional.

    Raises:
        ValueError: a name that no phase has.
    """
    there_are = [phase.name for phase in known]
    unknown = [name for name in names or () if name not in there_are]
    if unknown:
        raise ValueError(f"no phase called {unknown[0]!r}; there are {', '.join(there_are)}")
    return [phase for phase in known if (phase.name in names if names else not phase.optional)]


def walk(phases: list[Phase], out: Path, seconds: float, again: bool) -> Iterator[Outcome]:
    """Run phases in order, each with its share of the time left, and keep their outcomes in `out`/phases.json."""
    score = _read_outcomes(out)
    done = {name for name, outcome in score.items() if outcome.status == "ok" and not again}
    to_do = [phase for phase in phases if phase.name not in done]
    deadline = time.monotonic() + seconds
    for phase in phases:
        if phase.name in done:
            yield replace(score[phase.name], note="done before; --again repeats it")
            continue
        shares = sum(other.share for other in to_do[to_do.index(phase) :])
        left = deadline - time.monotonic()
        score[phase.name] = Outcome(phase.name, "running")
        _write_outcomes(out, score)
        score[phase.name] = perform(phase, out, max(left * phase.share / shares, min(phase.least_s, left)))
        for kept in phase.keep:
            if kept.is_file():
                shutil.copy2(kept, out / kept.name)
        _write_outcomes(out, score)
        yield score[phase.name]


def perform(phase: Phase, out: Path, limit_s: float) -> Outcome:
    """Run a phase's processes one after the other within a time limit; their output goes to `out`/NAME.log.

    A process that fails does not stop the next; when the time is up, all are stopped.
    """
    if reason := phase.skip():
        return Outcome(phase.name, "skipped", note=reason)
    began = time.monotonic()
    log = out / f"{phase.name}.log"
    status = "ok"
    with log.open("w") as file:
        for step in phase.steps:
            found = _execute(step, file, began + limit_s - time.monotonic())
            status = found if found != "ok" else status
            if found == "out of time":
                break
    return Outcome(phase.name, status, round(time.monotonic() - began, 1), _last_words(log))


def _execute(step: Step, log: IO[str], limit_s: float) -> str:
    """Run one process in a group of its own, and end the whole group when its time is up."""
    if limit_s <= 0:
        return "out of time"
    command = step.command(limit_s)
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    failures = Path(log.name).with_name("failures.log")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FASTLORA_FAILURES": str(failures), **step.env}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return "failed"
    try:
        return "ok" if process.wait(limit_s) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask what is left of a process's group to stop, then kill it."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def archive(out: Path, folder: Path) -> Path:
    """Pack what is in `out` into one file of at most 15 MB, the smallest first; what does not fit is named in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{out.name}.tar.gz"
    staged = path.with_name(f".{path.name}")
    files = sorted((file for file in out.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    left_out, total = [], 0
    with tarfile.open(staged, "w:gz") as packed:
        for file in files:
            size = file.stat().st_size
            if total + size > _ARCHIVE_BYTES:
                left_out.append(f"{file.relative_to(out)}, {size} bytes")
                continue
            packed.add(file, Path(out.name) / file.relative_to(out))
            total += size
        if left_out:
            note = "\n".join(["not in this archive, for its size:", *left_out, ""]).encode()
            entry = tarfile.TarInfo(f"{out.name}/left-out.txt")
            entry.size = len(note)
            packed.addfile(entry, io.BytesIO(note))
    staged.replace(path)
    return path


def _last_words(log: Path) -> str:
    lines = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
    return lines[-1] if lines else ""


def line(outcome: Outcome) -> str:
    """An outcome as a line of the table."""
    return f"{outcome.phase:<10} {outcome.status:<12} {outcome.seconds:>5.0f}  {outcome.note[:_NOTE_WIDTH]}"


def _read_outcomes(out: Path) -> dict[str, Outcome]:
    path = out / _STATE
    return {name: Outcome(**found) for name, found in json.loads(path.read_text()).items()} if path.exists() else {}


def _write_outcomes(out: Path, score: dict[str, Outcome]) -> None:
    text = json.dumps({name: asdict(outcome) for name, outcome in score.items()}, indent=2) + "\n"
    staged = out / f".{_STATE}"
    staged.write_text(text)
    staged.replace(out / _STATE)
