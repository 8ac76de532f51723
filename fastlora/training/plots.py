"""What a run shows: a live line in the terminal, and a plot of its `metrics.jsonl`."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console

from fastlora.files import atomic
from fastlora.layers.quoted import reason
from fastlora.training.inputs import read_text

SMOOTHING = 0.9  # of the solid training curve; the raw losses are drawn pale behind it


class _Outlet:
    """A stream that goes quiet when nobody reads it any more: a closed terminal or pipe must not end a run."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._do(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self.stream.flush)

    def _do(self, action: Any) -> None:
        try:
            action()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # so that what is left in its buffer fails no more either
            os.close(nowhere)


def lasting_console() -> Console:
    """A console on standard output for a run, which lasts longer than the terminal that it was started in may."""
    return Console(file=_Outlet(sys.stdout))  # type: ignore[arg-type]


class Progress:
    """A live bar with loss, learning rate and speed; if the output is not a terminal, a line every `logging_steps`."""

    def __init__(self, console: Console, total: int, done: int = 0, logging_steps: int = 10) -> None:
        self.console, self.total, self.logging_steps = console, total, logging_steps
        self.live = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(bar_width=14),
            progress.TextColumn("{task.fields[numbers]}"),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.live.add_task("train", total=total, completed=done, numbers="")

    def __enter__(self) -> "Progress":
        self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def update(self, record: dict[str, float]) -> None:
        """Show the numbers of one training step."""
        step = int(record["step"])
        numbers = f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  {record['tokens_per_s']:,.0f} tokens/s"
        self.live.update(self.task, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step % self.logging_steps == 0 or step == self.total):
            left = self.live.tasks[0].time_remaining
            eta = f"  {left:.0f} s left" if left else ""
            self.console.print(f"step {step}/{self.total}  {numbers}{eta}", highlight=False)


def as_json(record: dict[str, Any], indent: int | None = None) -> str:
    """A record as JSON; numbers that are not finite, which JSON does not have, are null."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; null is read as NaN.

    Raises:
        ValueError: a line is not a JSON object; the message names it.
    """
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            record = json.loads(line).items()
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: damaged, not a JSON object ({reason(error)})") from error
        records.append({key: math.nan if value is None else value for key, value in record})
    return records


def plot_losses(metrics: Path, out: Path) -> None:
    """Training and evaluation loss over the steps, with the learning rate below, as a PNG.

    Raises:
        ValueError: `metrics` holds no training step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    trained = [r for r in records if {"step", "loss", "lr"} <= r.keys()]
    evaluated = [r for r in records if {"step", "eval_loss"} <= r.keys()]
    if not trained:
        raise ValueError(f"{metrics}: no training step to plot")
    steps = [r["step"] for r in trained]
    losses = [r["loss"] for r in trained]

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    upper.plot(steps, _smoothed(losses), color="tab:blue", linewidth=1.8, label="training")
    if evaluated:
        xs, ys = [r["step"] for r in evaluated], [r["eval_loss"] for r in evaluated]
        upper.plot(xs, ys, color="tab:orange", marker="o", markersize=5, linewidth=1.5, label="held out")
        for x, y in {xs[0]: ys[0], xs[-1]: ys[-1]}.items():
            upper.annotate(f"{y:.3f}", (x, y), textcoords="offset points", xytext=(0, 8), ha="center")
    upper.set_ylabel("loss (nats per token)")
    upper.margins(y=0.12)
    upper.grid(alpha=0.3)
    upper.legend()
    lower.plot(steps, [r["lr"] for r in trained], color="tab:gray")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.grid(alpha=0.3)
    with atomic.moved_into(out) as scratch:
        figure.savefig(scratch, format="png")


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its bias at the start."""
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth
