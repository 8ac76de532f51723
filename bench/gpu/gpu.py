"""Everything to be done on a CUDA machine, in one command: `make gpu`, or `python -m bench gpu`.

    install   peers that are absent, where pip has a network and a virtual environment; else says which are absent
    build     the compiled libraries, CPU and CUDA
    tests     pytest -m gpu
    kernels   bench kernels: training shapes, decode and M = 256, dropout, a dense base
    tune      bench tune: the table of choices for this GPU, in kernels/choice.csv; a copy is kept with the results
    tuned     bench kernels again for small M, now that the table has rows for this GPU
    static    registers, spills, shared memory, instructions a weight, for this architecture
    report    plots and the page
    profile   hardware counters by ncu; only where asked for by name
    experts   stacks of experts against peft; only where asked for by name
    options   peft's options against peft; only where asked for by name

A phase is one or a few processes, with a log and a time limit: its share of what is left of --seconds, so that what one
leaves over goes to the others. What it wrote before its time ran out is kept. A phase that fails does not stop the
next. One that has succeeded is not run again unless --again says so. The last thing printed is a table of phases; the
exit status is 1 where one failed. `--dry-run` goes through them without a GPU: kernels in Triton's interpreter, tiny
shapes.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
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
WHOLE_S = 530.0
_GRACE_S = 5.0
_STATE = "phases.json"
_NOTE_WIDTH = 90


@dataclass
class Outcome:
    """How a phase ended; `status` is one of ok, failed, out of time, skipped."""

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
    finally:
        signal.signal(signal.SIGTERM, before)
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
        score[phase.name] = perform(phase, out, (deadline - time.monotonic()) * phase.share / shares)
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
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.env}
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
