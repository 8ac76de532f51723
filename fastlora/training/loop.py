"""One training run, from a recipe to an adapter: a single loop, on `accelerate`, for one process or many.

A step reads its micro-batches from `BatchPlan`, sums the cross-entropy over the *target tokens* of all of
them, on all processes, and divides by their number: how a step is cut into micro-batches changes nothing
but memory. Then clip, AdamW, one line in `metrics.jsonl`. The learning rate and the data are pure
functions of the step, so a checkpoint holds the adapter (in peft's format), the optimizer's moments, the
states of the random generators and a number; continuing from it gives the same bits as never stopping.

    run directory           recipe.yaml, metrics.jsonl, loss.png, adapter_model.safetensors, adapter_config.json
    checkpoint-<step>       in it: what `fastlora.training.checkpoint` says
"""

import dataclasses
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from rich.console import Console
from torch import Tensor, nn

from fastlora.adapters.adapter import save_adapter
from fastlora.model.replace import replace_linear
from fastlora.training import checkpoint, data, plots
from fastlora.training.recipe import Recipe, check_resumable, learning_rate

RUN_FILES = ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json")


@dataclass(eq=False)
class Run:
    """A run under way, as hooks and evaluation see it. `model` is the bare model, adapters included."""

    recipe: Recipe
    accelerator: Accelerator
    console: Console
    tokenizer: Any
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    train_set: data.TokenSet
    eval_set: data.TokenSet | None
    plan: data.BatchPlan
    total_steps: int
    step: int = 0
    loss: float = math.nan
    eval_losses: dict[int, float] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the run's files lie."""
        return Path(self.recipe.output_dir)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass, in training and evaluation alike."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bool(self.recipe.bf16))


class Hooks:
    """What a caller adds to a run: override the moments of interest."""

    def on_start(self, run: Run) -> None:
        """The model carries its adapters (a resumed run: the trained ones); no step has been made.

        By default it says which layers were replaced, and what they run on.
        """
        run.console.print(run.model.fastlora_report.summary(), highlight=False)  # type: ignore[operator, union-attr]

    def on_end(self, run: Run) -> None:
        """All steps are made and the adapter is saved. Not called when a run is interrupted."""


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
    """Run `recipe` to its end, or until SIGINT or SIGTERM, which save a checkpoint first.

    Raises:
        ValueError: unusable data, a run already in `output_dir` without `resume`, nothing to resume, or a
            recipe that differs from the saved one.
        FloatingPointError: a loss or gradient that is not finite; the update was not made.
    """
    hooks = hooks or Hooks()
    if recipe.bf16 is None:
        recipe = recipe.replace(bf16=has_bf16(recipe.use_cpu))
    console = console or Console()
    saved = _checked_directory(recipe, resume, console)
    run = prepare(recipe, console)
    if saved is not None:
        _resume(run, *saved)
    else:
        set_seed(recipe.seed + run.accelerator.process_index)  # each process its own dropout
    if run.accelerator.is_main_process:
        run.directory.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(run.directory / "recipe.yaml", recipe.to_yaml())
    device = run.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        hooks.on_start(run)
    for name, examples in (("training", run.train_set), ("evaluation", run.eval_set)):
        if examples is not None:
            run.console.print(f"{name}: {examples.summary()}", highlight=False)
    stopped_by = _loop(run)
    if stopped_by is None:
        _finish(run)
        hooks.on_end(run)
    eval_loss = run.eval_losses[max(run.eval_losses)] if run.eval_losses else None
    return Result(run.directory, run.step, run.total_steps, run.loss, eval_loss, stopped_by)


def _loop(run: Run) -> str | None:
    """All steps that are left. The name of the signal that ended it early, or None."""
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
    name = caught[0] if caught else "SIGTERM"  # another process was told
    run.console.print(f"[yellow]Stopped by {name} after step {run.step} of {run.total_steps}; checkpoint saved.[/]")
    return name


def train_step(run: Run, caught: Sequence[str] = ()) -> tuple[dict[str, float], int]:
    """One optimizer step: `run.step` is its number from 0.

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
    loss = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(batches):
        more_follow = index < len(batches) - 1
        with accelerator.no_sync(run.wrapped) if more_follow else nullcontext():
            part = target_loss(run, run.wrapped, batch) / targets
            accelerator.backward(part * accelerator.num_processes)  # gradients are averaged over processes
        loss += part.detach()
    totals = accelerator.reduce(torch.stack([loss, loss.new_tensor(float(len(caught)))]), "sum").tolist()
    grad_norm = float(accelerator.clip_grad_norm_(run.trainable, recipe.max_grad_norm or math.inf))
    if not (math.isfinite(totals[0]) and math.isfinite(grad_norm)):
        raise FloatingPointError(_not_finite(run, totals[0], grad_norm))

    rate = learning_rate(recipe, run.step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
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


def target_loss(run: Run, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy summed over the batch's target tokens: 0-d fp32, in nats. Only their logits are widened."""
    with run.autocast():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    labels = batch["labels"][:, 1:]  # [rows, length - 1]: position t predicts token t + 1
    chosen = labels != data.IGNORED
    return F.cross_entropy(out.logits[:, :-1][chosen].float(), labels[chosen], reduction="sum")


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


def has_bf16(use_cpu: bool = False) -> bool:
    """Whether the device that a run would take multiplies in bfloat16 natively."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepare(recipe: Recipe, console: Console) -> Run:
    """Model, adapters, data and optimizer of a run that has made no step yet.

    Raises:
        ValueError: a model or data that cannot be used, or that do not fit one another.
    """
    # Autocast stands in target_loss; the frozen base is the same in every process and need not be broadcast.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=recipe.use_cpu, mixed_precision="no", kwargs_handlers=[ddp])
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    set_seed(recipe.seed)  # the same adapters in every process
    model, tokenizer = load_base(recipe)
    train_set = data.load(recipe, tokenizer)
    eval_set = data.load(recipe, tokenizer, evaluation=True)
    assert train_set is not None
    for name, examples in (("training", train_set), ("evaluation", eval_set)):
        if examples is not None:
            _check_fits(name, examples, model)
    model.to(accelerator.device)
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "quantize", "use_rslora")
    replace_linear(model, **{key: getattr(recipe, key) for key in keys})
    if recipe.gradient_checkpointing:
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the older name
        enable = getattr(model, f"{word}_checkpointing_enable")
        enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name in the newest torch alone
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    plan = data.BatchPlan(
        train_set.lengths,
        recipe.per_device_train_batch_size,
        recipe.gradient_accumulation_steps,
        recipe.seed,
        recipe.train_sampling_strategy,
        accelerator.num_processes,
    )
    total = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * plan.steps_per_epoch)
    return Run(recipe, accelerator, console, tokenizer, model, wrapped, optimizer, train_set, eval_set, plan, total)


def load_base(recipe: Recipe) -> tuple[Any, Any]:
    """The frozen model, in the precision of the run, and its tokenizer.

    Raises:
        ValueError: nothing loadable under `model_name_or_path`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = recipe.model_name_or_path
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"model_name_or_path: cannot load {name!r} ({str(error).splitlines()[0]})") from error


def _check_fits(name: str, examples: data.TokenSet, model: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if int(examples.tokens.max()) >= rows:
        raise ValueError(f"{name} data: token {examples.tokens.max()}, but the model has {rows} embeddings")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and int(examples.lengths.max()) > context:
        raise ValueError(f"max_length: {name} data reach {examples.lengths.max()} tokens, the model {context}")


def _batch(run: Run, examples: data.TokenSet, rows: list[int]) -> dict[str, Tensor]:
    """The examples `rows` on the run's device. No rows (the tail of an epoch): one that has no target."""
    pad = run.tokenizer.pad_token_id
    batch = data.collate(examples, rows or [0], run.tokenizer.eos_token_id or 0 if pad is None else pad)
    if not rows:
        batch["labels"].fill_(data.IGNORED)
    return {name: tensor.to(run.accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def _evaluate_and_log(run: Run) -> None:
    loss = evaluate(run)
    run.eval_losses[run.step] = loss
    record = {"step": run.step, "eval_loss": loss}
    _log(run, record)
    run.console.print(f"step {run.step}: held-out loss {loss:.4f}", highlight=False)


def _log(run: Run, record: dict[str, float]) -> None:
    if run.accelerator.is_main_process:
        with (run.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _finish(run: Run) -> None:
    if run.accelerator.is_main_process:
        save_adapter(run.model, run.directory)
        plots.plot_losses(run.directory / "metrics.jsonl", run.directory / "loss.png")
        run.console.print(f"adapter, metrics and plot are in {run.directory}", highlight=False)
    run.accelerator.wait_for_everyone()


def _not_finite(run: Run, loss: float, grad_norm: float) -> str:
    found = f"loss {loss}, gradient norm {grad_norm}"
    steps = checkpoint.steps(run.directory)
    kept = f"The last good checkpoint is {run.directory}/checkpoint-{steps[-1]}." if steps else "No checkpoint yet."
    return (
        f"step {run.step + 1}: {found}; stopped before the update. {kept} "
        "Lower learning_rate or max_grad_norm, add warm-up, or look at the data of this step."
    )


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM by name, for the loop to end after its step; a second one acts at once."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # handlers can be set in the main thread alone
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    both = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in both}
    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save_checkpoint(run: Run) -> None:
    facts = {
        "total_steps": run.total_steps,
        "train_data": run.train_set.fingerprint(),
        "recipe": dataclasses.asdict(run.recipe),
    }
    keep = run.recipe.save_total_limit
    checkpoint.save(run.directory, run.step, run.model, run.optimizer, run.accelerator, facts, keep)


def _checked_directory(recipe: Recipe, resume: bool, console: Console) -> tuple[Path, dict[str, Any]] | None:
    """A resumed run: the newest whole checkpoint and its state; each damaged one passed over is named."""
    directory = Path(recipe.output_dir)
    if not resume:
        found = [name for name in RUN_FILES if (directory / name).exists()]
        found += [f"checkpoint-{step}" for step in checkpoint.steps(directory)]
        if found:
            raise ValueError(
                f"output_dir: {directory} already holds a run ({', '.join(found)}); continue it with --resume, "
                "or give another output_dir"
            )
        return None
    path, state, damaged = checkpoint.newest(directory)
    for problem in damaged:
        console.print(f"[yellow]Damaged checkpoint passed over: {problem}[/]")
    check_resumable(state["recipe"], recipe)
    return path, state


def _resume(run: Run, path: Path, state: dict[str, Any]) -> None:
    if state["processes"] != run.accelerator.num_processes:
        raise ValueError(f"cannot resume: saved by {state['processes']} processes, now {run.accelerator.num_processes}")
    if state["train_data"] != run.train_set.fingerprint():
        raise ValueError(f"cannot resume: the training data are not those of {path}")
    checkpoint.restore(path, run.model, run.optimizer, run.accelerator.process_index)
    run.step = state["step"]
    metrics = run.directory / "metrics.jsonl"
    if run.accelerator.is_main_process:
        checkpoint.cut_metrics(metrics, run.step)
    run.accelerator.wait_for_everyone()
    records = plots.read_metrics(metrics)
    run.eval_losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    run.loss = next((r["loss"] for r in reversed(records) if "loss" in r), math.nan)
    run.console.print(f"resumed from {path} after step {run.step} of {run.total_steps}", highlight=False)
