"""Methods side by side: the same model, data and number of steps, and what each gives, costs and forgets.

Measured for each run: trained share, time of a step, latency at inference, size of the file, held-out loss, share of
held-out examples that greedy decoding would answer exactly, and the rise of loss on text that has nothing to do with
the data. Memory is measured on a GPU; elsewhere it is the forecast, and marked so.
"""

import csv
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastlora.files import atomic
from fastlora.memory.forecast import forecast
from fastlora.memory.shape import shape_of
from fastlora.training import data, recipe
from fastlora.training.forecast_of import setup_of
from fastlora.training.loop import Hooks, train
from fastlora.training.run import Run

METHODS = ("lora", "qlora", "houlsby", "prefix", "prompt", "full")
RATES = {"full": 2e-4, "prefix": 1e-2, "prompt": 3e-2}  # the others keep the recipe's
_WINDOW, _WINDOWS = 128, 32  # tokens of a piece of general text; pieces
_WARM, _CALLS = 5, 25  # calls of a forward; of the latter the median counts


@dataclass(frozen=True)
class Row:
    """One run. Losses in nats a token; times in seconds; bytes. memory_is: "measured" or "forecast"."""

    method: str
    seed: int
    trained: int
    trained_share: float
    steps: int
    step_seconds: float
    memory: int
    memory_is: str
    file: int
    loss_before: float
    loss: float
    exact: float
    general_before: float
    forgetting: float
    latency_base: float
    latency: float
    latency_merged: float | None


def compare(
    values: dict[str, Any], methods: Sequence[str], general: str, out: Path, repeats: int, console: Console,
    given_rates: dict[str, float] | None = None,
) -> list[Row]:  # fmt: skip
    """Run every method, and write `compare.csv`, `compare.json` and `compare.png` into `out`.

    Args:
        values: a recipe's keys, with data to evaluate on; `output_dir` is set for each run.
        general: text that the data say nothing about.
        given_rates: method -> learning rate, instead of `RATES`.

    Raises:
        ValueError: an unknown method, `out` that exists, or a recipe that cannot be run.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods: {', '.join(unknown) or 'none'}; there are {', '.join(METHODS)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: give another folder")
    if not general.strip():
        raise ValueError("general: the text is empty")
    made = {
        (method, seed): _recipe(values, method, seed, out, given_rates or {})
        for method in methods
        for seed in range(repeats)
    }
    rows = []
    for (method, seed), each in made.items():
        console.print(f"\n[bold]{method}[/], seed {seed}", highlight=False)
        rows.append(_run(method, seed, each, general, console))
        _write(rows, out)
    return rows


def _recipe(values: dict[str, Any], method: str, seed: int, out: Path, rates: dict[str, float]) -> recipe.Recipe:
    own = {key: value for key, value in values.items() if key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    shared = {key: value for key, value in values.items() if key not in own and key not in ("method", "quantize")}
    asked: dict[str, Any] = {
        **shared,
        "method": "lora" if method == "qlora" else method,
        "quantize": "nf4" if method == "qlora" else None,
        "seed": seed,
        "save_steps": None,
        "output_dir": str(out / f"{method}-{seed}"),
    }
    if method in ("lora", "qlora"):
        asked |= own
    rate = rates.get(method, RATES.get(method))
    if rate is not None:
        asked["learning_rate"] = rate
    made = recipe.from_mapping(asked, source="compare")
    if made.eval_file is None and made.dataset_test_split is None:
        raise ValueError("eval_file, dataset_test_split: compare needs examples that are held out; give one of them")
    return made


def _run(method: str, seed: int, made: recipe.Recipe, general: str, console: Console) -> Row:
    watched = _Watched(general, Console(quiet=True))
    if torch.cuda.is_available() and not made.use_cpu:
        torch.cuda.reset_peak_memory_stats()
    result = train(made, hooks=watched, console=Console(quiet=True))
    steps = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    seconds = watched.seconds / max(1, result.total_steps)
    row = Row(
        method, seed, watched.trained, watched.trained / watched.parameters, result.total_steps, seconds,
        watched.memory,
        watched.memory_is, watched.file, watched.before.loss, watched.after.loss, watched.after.exact,
        watched.before.general, watched.after.general - watched.before.general, watched.before.latency,
        watched.after.latency, watched.merged,
    )  # fmt: skip
    assert any("loss" in step for step in steps)
    said = f"held-out loss {row.loss_before:.4f} -> {row.loss:.4f}, exact {row.exact:.1%}, "
    said += f"general loss {row.forgetting:+.4f}"
    console.print(f"{said}; {row.step_seconds * 1e3:.0f} ms a step", highlight=False)
    del watched
    gc.collect()
    return row


@dataclass(frozen=True)
class _Measured:
    loss: float
    exact: float
    general: float
    latency: float


class _Watched(Hooks):
    """Measures before the first step, with what is trained switched off, and after the last."""

    def __init__(self, general: str, console: Console) -> None:
        self.general, self.console = general, console

    def on_start(self, run: Run) -> None:
        self.trained = sum(p.numel() for p in run.trainable)
        shape = shape_of(run.model.config.to_dict())  # type: ignore[operator, union-attr]
        self.parameters = shape.parameters + (0 if run.method.name == "full" else self.trained)
        if run.method.name in ("lora", "houlsby"):  # with zeros these are the base
            held = [p.detach().clone() for p in run.trainable]
            for p in run.trainable:
                p.data.zero_()
            self.before = _measure(run, self.general)
            for p, value in zip(run.trainable, held, strict=True):
                p.data.copy_(value)
        else:
            self.before = _measure(run, self.general)
        self._forecast = forecast(setup_of(run.recipe, shape, run.most_tokens)).allocated
        self._began = time.perf_counter()

    def on_end(self, run: Run) -> None:
        self.seconds = time.perf_counter() - self._began
        cuda = run.accelerator.device.type == "cuda"
        self.memory_is = "measured" if cuda else "forecast"
        self.memory = torch.cuda.max_memory_allocated() if cuda else self._forecast
        self.file = (run.directory / run.method.files[-1]).stat().st_size
        self.after = _measure(run, self.general)
        self.merged: float | None = None
        if run.method.name == "full":
            self.merged = self.after.latency
        elif run.method.name == "lora" and run.recipe.quantize is None:
            run.method.merge(run.model)
            self.merged = _latency(run)


@torch.no_grad()
def _measure(run: Run, general: str) -> _Measured:
    training = run.model.training
    run.model.eval()
    try:
        loss, exact = _held_out(run)
        return _Measured(loss, exact, _general(run, general), _latency(run))
    finally:
        run.model.train(training)


def _logits(run: Run, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[rows, tokens, vocabulary] of the text itself, without what stands before it."""
    with run.autocast():
        found = run.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found[:, run.method.virtual_tokens :].float()  # type: ignore[no-any-return]


def _held_out(run: Run) -> tuple[float, float]:
    """Loss a target token, and the share of examples all of whose targets are the most probable tokens.

    Greedy decoding gives exactly the reference just then, so nothing need be generated.
    """
    examples = run.eval_set
    assert examples is not None
    pad = run.tokenizer.pad_token_id
    pad = run.tokenizer.eos_token_id or 0 if pad is None else pad
    order = np.argsort(examples.lengths, kind="stable").tolist()
    total = count = exact = 0.0
    for start in range(0, len(order), run.recipe.per_device_eval_batch_size):
        batch = data.collate(examples, order[start : start + run.recipe.per_device_eval_batch_size], pad)
        batch = {name: t.to(run.accelerator.device) for name, t in batch.items()}
        logits = _logits(run, batch["input_ids"], batch["attention_mask"])[:, :-1]
        labels = batch["labels"][:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        wanted = labels != data.IGNORED
        count += int(wanted.sum())
        exact += int(((logits.argmax(-1) == labels) | ~wanted).all(1).sum())
    return total / count, exact / len(order)


def _general(run: Run, text: str) -> float:
    """Loss a token on pieces of `text`."""
    ids = run.tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError("general: the text is less than two tokens")
    count = max(1, min(_WINDOWS, len(ids) // _WINDOW))
    starts = torch.linspace(0, max(0, len(ids) - _WINDOW), count).long().tolist()
    pieces = torch.stack([ids[start : start + _WINDOW] for start in starts]).to(run.accelerator.device)
    total = 0.0
    for piece in pieces.split(8):
        logits = _logits(run, piece)[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum"))
    return total / pieces[:, 1:].numel()


@torch.no_grad()
def _latency(run: Run) -> float:
    """Seconds of a forward of one row of 64 tokens, as in serving."""
    run.model.eval()
    embedding = run.model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(64, device=run.accelerator.device)[None] % embedding.weight.shape[0]
    taken = []
    for call in range(_WARM + _CALLS):
        _wait(run)
        began = time.perf_counter()
        _logits(run, ids)
        _wait(run)
        if call >= _WARM:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(run: Run) -> None:
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _write(rows: list[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with atomic.moved_into(out / "compare.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    atomic.write_text(out / "compare.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    _plot(rows, out / "compare.png")


def of_method(rows: list[Row]) -> dict[str, list[Row]]:
    """The runs of each method."""
    return {
        method: [row for row in rows if row.method == method] for method in dict.fromkeys(row.method for row in rows)
    }


def spread(rows: list[Row], name: str) -> tuple[float, float]:
    """Mean and standard deviation over repeats; the latter 0 for one."""
    values = [float(getattr(row, name)) for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for method, each in of_method(rows).items():
        loss, by = spread(each, "loss")
        forgets, either_way = spread(each, "forgetting")
        left.errorbar(forgets, loss, xerr=either_way, yerr=by, fmt="o", capsize=3)
        left.annotate(method, (forgets, loss), xytext=(5, 4), textcoords="offset points", fontsize=9)
        memory, _ = spread(each, "memory")
        right.errorbar(memory / 2**20, loss, yerr=by, fmt="o", capsize=3)
        right.annotate(method, (memory / 2**20, loss), xytext=(5, 4), textcoords="offset points", fontsize=9)
    left.set_xlabel("rise of loss on general text (nats a token): forgetting")
    left.set_ylabel("held-out loss (nats a token)")
    right.set_xlabel(f"memory in training (MiB, {rows[0].memory_is})")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic.moved_into(path) as scratch:
        figure.savefig(scratch, format="png", dpi=140)
