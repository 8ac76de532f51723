"""The training loop: from a recipe to an adapter, on `accelerate`, in one process or several.

A step sums the cross-entropy over the *target tokens* of all its micro-batches, on all processes, and divides by their
number, so how a step is divided into micro-batches affects only memory. Then it clips the gradient, takes an AdamW step
and writes one line to `metrics.jsonl`. The learning rate and the data are pure functions of the step, so a checkpoint
holds the adapter (in peft's format), the optimizer's moments, the states of the random generators and a number. A run
continued from it gives the same bits as one that never stopped.

    run directory           recipe.yaml, metrics.jsonl, loss.png, adapter_model.safetensors, adapter_config.json
      checkpoint-<step>     as `fastlora.training.checkpoint` says
      run.lock and a note   while the run is on, as `fastlora.training.lock` says
"""

import dataclasses
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from fastlora.files import atomic
from fastlora.layers.causal_loss import smoothed, targets_known
from fastlora.layers.quoted import clipped
from fastlora.training import checkpoint, data, forecast_of, lock, packing, plots
from fastlora.training.graphed_step import GraphedStep
from fastlora.training.kept_weights import KeptWeights
from fastlora.training.recipe import Recipe, learning_rate
from fastlora.training.run import Run, checked_directory, has_bf16, prepare, resume_from

MOST_GRAPHS = 24  # six doublings of a row's tokens


class Hooks:
    """What a caller adds to a run: override either method."""

    def on_start(self, run: Run) -> None:
        """Called before the first step; the model has its adapters, those of a resumed run as trained so far.

        By default it prints which layers were replaced, and what they run on.
        """
        report = getattr(run.model, "fastlora_report", None)
        run.console.print(report.summary() if report else _trained(run), highlight=False)

    def on_end(self, run: Run) -> None:
        """Called after the last step, once the adapter is saved; not called if the run is interrupted."""


@dataclass(frozen=True)
class Result:
    """How a run ended; `interrupted` is the signal's name, or None."""

    directory: Path
    step: int
    total_steps: int
    loss: float
    eval_loss: float | None
    interrupted: str | None


def train(recipe: Recipe, resume: bool = False, hooks: Hooks | None = None, console: Console | None = None) -> Result:
    """Run `recipe` to its end, or until SIGINT, SIGTERM or SIGHUP, which saves a checkpoint first.

    Raises:
        ValueError: unusable data or model, an `output_dir` that cannot be written, that holds a run already (without
            `resume`) or that another run is using, nothing to resume, or a recipe that differs from the saved one.
        FloatingPointError: a loss or gradient that is not finite; that update is not made.
        OSError: a file of the run cannot be written, as on a full disk. What had been written before is kept.
    """
    console = console or plots.lasting_console()
    directory = Path(recipe.output_dir)
    if resume and not os.path.isdir(directory):  # noqa: PTH112, as pathlib raises where a name is too long
        raise ValueError(f"{directory}: nothing to resume from: it holds no checkpoint")
    if os.environ.get("RANK", "0") != "0":  # the first process holds the lock for all
        return _train(recipe, resume, hooks or Hooks(), console)
    with lock.held(directory, lambda text: console.print(f"[yellow]{escape(text)}[/]")):
        return _train(recipe, resume, hooks or Hooks(), console)


def _train(recipe: Recipe, resume: bool, hooks: Hooks, console: Console) -> Result:
    if recipe.bf16 is None:
        recipe = recipe.replace(bf16=has_bf16(recipe.use_cpu))
    saved = checked_directory(recipe, resume, console)
    run = prepare(recipe, console, saved[1] if saved else None)
    if recipe.cuda_graphs:
        run.graphed = GraphedStep(run.model, lambda model, batch: target_loss(run, model, batch), most=MOST_GRAPHS)
    if recipe.keep_expanded:
        alone = run.accelerator.num_processes == 1
        run.kept = KeptWeights(run.accelerator.device, run.most_tokens, alone, partial(console.print, style="yellow"))
    if saved is not None:
        resume_from(run, *saved)
    else:
        set_seed(recipe.seed + run.accelerator.process_index)  # different dropout in each process
    if run.accelerator.is_main_process:
        atomic.write_text(run.directory / "recipe.yaml", recipe.to_yaml())
    device = run.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        hooks.on_start(run)
    _print_data(run)
    try:
        stopped_by = _loop(run)
        if stopped_by is None:
            _finish(run)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {_kept(run)}{_rescued(run)}", error.filename) from error
    if stopped_by is None:
        hooks.on_end(run)
    eval_loss = run.eval_losses[max(run.eval_losses)] if run.eval_losses else None
    return Result(run.directory, run.step, run.total_steps, run.loss, eval_loss, stopped_by)


def _trained(run: Run) -> str:
    trained = sum(p.numel() for p in run.trainable)
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    return f"{run.method.name}: {trained:,} trained parameters, {frozen:,} frozen ones"


def _print_data(run: Run) -> None:
    """Say what there is to learn, and which columns of the data nothing reads."""
    unread: dict[str, None] = {}
    for name, examples in (("training", run.train_set), ("evaluation", run.eval_set)):
        if examples is not None:
            run.console.print(f"{name}: {examples.summary()}", highlight=False)
            unread |= dict.fromkeys(examples.unread)
    if unread:
        listed = escape(clipped(", ".join(unread)))
        run.console.print(f"[yellow]columns of the data that nothing reads: {listed}[/]", highlight=False)


def _loop(run: Run) -> str | None:
    """Make all steps that are left. Returns the name of the signal that ended it early, or None."""
    recipe = run.recipe
    if recipe.eval_on_start and run.step == 0:
        _evaluate_and_log(run)
    with _signals() as caught, plots.Progress(run.console, run.total_steps, run.step, recipe.logging_steps) as shown:
        while run.step < run.total_steps:
            record, signals = train_step(run, caught)
            run.step += 1
            _log(run, record)
            shown.update(record)
            last = run.step == run.total_steps
            if run.eval_set is not None and (last or (recipe.eval_steps and run.step % recipe.eval_steps == 0)):
                _evaluate_and_log(run)
            due = recipe.save_steps is not None and (last or run.step % recipe.save_steps == 0)
            if due or (signals and not last):
                _save_checkpoint(run)
            if signals and not last:
                break
    if run.step == run.total_steps:
        return None
    name = caught[0] if caught else "SIGTERM"  # only another process got the signal
    run.console.print(f"[yellow]Stopped by {name} after step {run.step} of {run.total_steps}; checkpoint saved.[/]")
    return name


def train_step(run: Run, caught: Sequence[str] = ()) -> tuple[dict[str, float], int]:
    """One optimizer step; `run.step` is its number, from 0.

    Returns:
        Its line for `metrics.jsonl`, and how many signals all processes together have `caught`.
    Raises:
        FloatingPointError: the loss or the gradient is not finite; parameters are as they were.
    """
    began = time.perf_counter()
    accelerator, recipe = run.accelerator, run.recipe
    rows = run.plan.micro_batches(run.step, accelerator.process_index)
    batches = [_batch(run, run.train_set, micro) for micro in rows]
    counts = [sum(map(data.count_targets, batches)), sum(int(run.plan.lengths[micro].sum()) for micro in rows)]
    targets, tokens = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()

    run.wrapped.train()
    if run.kept is None:
        loss = _gradients(run, batches, targets)
    else:
        most = max(int(batch["input_ids"].numel()) for batch in batches)
        loss = run.kept.compute(lambda: _gradients(run, batches, targets), run.optimizer.zero_grad, most)
    totals = accelerator.reduce(torch.stack([loss, loss.new_tensor(float(len(caught)))]), "sum").tolist()
    grad_norm = float(accelerator.clip_grad_norm_(run.trainable, recipe.max_grad_norm or math.inf))
    if not (math.isfinite(totals[0]) and math.isfinite(grad_norm)):
        raise FloatingPointError(_not_finite(run, totals[0], grad_norm))

    rate = learning_rate(recipe, run.step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.loss = totals[0]
    record = {
        "step": run.step + 1,
        "loss": run.loss,
        "lr": rate,
        "tokens_per_s": round(tokens / (time.perf_counter() - began), 1),
        "grad_norm": grad_norm,
    }
    return record, int(totals[1])


def _gradients(run: Run, batches: list[dict[str, Any]], targets: int) -> Tensor:
    """The loss of a step's micro-batches on this process, over `targets`; adds to the parameters' gradients."""
    accelerator = run.accelerator
    loss = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(batches):
        if run.graphed is not None:
            loss += _replayed(run, batch, targets)
            continue
        more_follow = index < len(batches) - 1
        with accelerator.no_sync(run.wrapped) if more_follow else nullcontext():
            part = target_loss(run, run.wrapped, batch) / targets
            accelerator.backward(part * accelerator.num_processes)  # gradients are averaged over processes
        loss += part.detach()
    return loss


def _replayed(run: Run, batch: dict[str, Any], targets: int) -> Tensor:
    """A micro-batch's part of the loss, with its gradients, by `GraphedStep`; says what cannot be recorded."""
    assert run.graphed is not None
    known = dict(run.graphed.reasons)
    del batch["targets"]  # whose number differs from batch to batch
    loss = run.graphed(**batch, divisor=batch["input_ids"].new_full((), targets))
    for key, reason in run.graphed.reasons.items():
        if key not in known:
            run.console.print(f"[yellow]cuda_graphs: steps run as usual, not recorded: {escape(reason)}[/]")
    return loss


def target_loss(run: Run, model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy summed over the batch's target tokens, over its `divisor` if it has one: 0-d fp32, in nats.

    In training with the recipe's label smoothing.
    """
    smoothing = run.recipe.label_smoothing_factor if run.model.training else 0.0
    given = ("labels", "targets", "divisor")
    labels, divisor = batch["labels"], batch.get("divisor", 1)
    places = batch.get("targets")  # [targets], of the tokens before targets, in the rows one after the other
    front = run.method.virtual_tokens
    if front and places is not None:
        places = places + front * (places // labels.shape[1] + 1)
    inputs = {"use_cache": False} | {name: value for name, value in batch.items() if name not in given}
    with run.autocast(), packing.packed() if run.padding_free else nullcontext():
        if any(row.part == "loss" and row.sped_up for row in getattr(run.model, "fastlora_parts", ())):
            with nullcontext() if places is None else targets_known(places), smoothed(smoothing):
                loss: Tensor = model(**inputs, labels=labels, num_items_in_batch=divisor).loss
            return loss
        logits = model(**inputs).logits  # [rows, length, vocabulary]
    if front:
        labels = F.pad(labels, (front, 0), value=data.IGNORED)
    shifted = F.pad(labels, (0, 1), value=data.IGNORED)[:, 1:].flatten()
    if places is None:
        places = slice(None)
    chosen = logits.flatten(0, 1)[places].float(), shifted[places]
    return F.cross_entropy(*chosen, reduction="sum", label_smoothing=smoothing) / divisor


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean cross-entropy per target token over the whole evaluation set, in nats."""
    accelerator, examples = run.accelerator, run.eval_set
    assert examples is not None
    run.model.eval()  # not the wrapped one: processes may have unequal numbers of batches
    size = run.recipe.per_device_eval_batch_size
    by_length = np.argsort(-examples.lengths, kind="stable").tolist()
    mine = by_length[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(mine), size):
        batch = _batch(run, examples, mine[start : start + size])
        total[0] += target_loss(run, run.model, batch)
        total[1] += data.count_targets(batch)
    run.model.train()
    loss, targets = accelerator.reduce(total, "sum").tolist()
    return loss / targets


def _batch(run: Run, examples: data.TokenSet, rows: list[int]) -> dict[str, Any]:
    """The examples `rows` on the run's device; without rows (at the end of an epoch), one example without targets."""
    pad = run.tokenizer.pad_token_id
    make: Any = packing.pack if run.padding_free else data.collate
    if run.graphed is not None and examples is run.train_set:
        make = partial(packing.pack, room=packing.Room(run.plan.batch, run.recipe.max_length))
    batch: dict[str, Any] = make(examples, rows or [0], run.tokenizer.eos_token_id or 0 if pad is None else pad)
    if not rows:
        batch["labels"].fill_(data.IGNORED)
    batch["targets"] = data.before_targets(batch["labels"])
    device = run.accelerator.device
    return {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in batch.items()}


def _evaluate_and_log(run: Run) -> None:
    loss = evaluate(run)
    run.eval_losses[run.step] = loss
    record = {"step": run.step, "eval_loss": loss}
    _log(run, record)
    run.console.print(f"step {run.step}: held-out loss {loss:.4f}", highlight=False)


def _log(run: Run, record: dict[str, float]) -> None:
    if run.accelerator.is_main_process:
        atomic.append_line(run.directory / "metrics.jsonl", plots.as_json(record))


def _finish(run: Run) -> None:
    if run.accelerator.is_main_process:
        run.method.save(run.model, run.directory)
        if run.accelerator.device.type == "cuda":
            devices = run.accelerator.num_processes
            config = run.model.config
            forecast_of.write(run.directory, run.recipe, config, run.accelerator.device, devices, run.most_tokens)
        plots.plot_losses(run.directory / "metrics.jsonl", run.directory / "loss.png")
        run.console.print(f"adapter, metrics and plot are in {run.directory}", highlight=False, markup=False)
    run.accelerator.wait_for_everyone()


def _not_finite(run: Run, loss: float, grad_norm: float) -> str:
    return (
        f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the update. {_kept(run)}. "
        "Lower learning_rate or max_grad_norm, add warm-up, or look at the data of this step."
    )


def _kept(run: Run) -> str:
    steps = checkpoint.steps(run.directory)
    return f"The last good checkpoint is {run.directory}/checkpoint-{steps[-1]}" if steps else "No checkpoint yet"


def _rescued(run: Run) -> str:
    """Save what has been trained so far in the system's folder for temporary files, as the run's may be on a full disk.

    Returns: where it is; "" where it cannot be written either.
    """
    if run.step == 0 or not run.accelerator.is_main_process:
        return ""
    try:
        folder = Path(tempfile.mkdtemp(prefix="fastlora-"))
    except OSError:
        return ""
    try:
        run.method.save(run.model, folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f"; the adapter as of step {run.step} is in {folder}"


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGINT, SIGTERM and SIGHUP by name, so that the loop can finish its step; a second one acts at once.

    SIGHUP stays ignored where it is, as under nohup.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # handlers can be set only in the main thread
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save_checkpoint(run: Run) -> None:
    if run.accelerator.is_main_process:
        atomic.sync(run.directory / "metrics.jsonl")  # a checkpoint is of no step whose line may still be lost
    facts = {
        "total_steps": run.total_steps,
        "train_data": run.train_set.fingerprint(),
        "recipe": dataclasses.asdict(run.recipe),
    }
    keep = run.recipe.save_total_limit
    checkpoint.save(run.directory, run.step, run.model, run.method, run.optimizer, run.accelerator, facts, keep)
