"""A run: what it consists of, and getting it ready, from a recipe or from a checkpoint."""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from rich.console import Console
from torch import nn

from fastlora.model.replace import replace_linear
from fastlora.training import checkpoint, data, plots
from fastlora.training.recipe import Recipe, check_resumable

# The files that show a directory to hold a run.
RUN_FILES = ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json")


@dataclass(eq=False)
class Run:
    """A run under way, as hooks and evaluation see it.

    Args:
        model: the bare model, adapters included. wrapped: the same, prepared by accelerate for training.
        step: the number of steps made.
        eval_losses: by the number of steps made, in nats per target token.
    """

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
        """Where the run's files are."""
        return Path(self.recipe.output_dir)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass, in training and evaluation alike."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bool(self.recipe.bf16))


def has_bf16(use_cpu: bool = False) -> bool:
    """Whether the device that a run would use multiplies in bfloat16 natively."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepare(recipe: Recipe, console: Console) -> Run:
    """Model, adapters, data and optimizer of a run that has made no step yet.

    Raises:
        ValueError: a model or data that cannot be used, or data that do not fit the model.
    """
    # Autocast is in target_loss. The frozen base is the same in every process and need not be broadcast.
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
            _check_data_fit(name, examples, model)
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
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name, only in the newest torch
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


def _check_data_fit(name: str, examples: data.TokenSet, model: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if int(examples.tokens.max()) >= rows:
        raise ValueError(f"{name} data: token {examples.tokens.max()}, but the model has {rows} embeddings")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and int(examples.lengths.max()) > context:
        raise ValueError(f"max_length: {name} data reach {examples.lengths.max()} tokens, the model {context}")


def checked_directory(recipe: Recipe, resume: bool, console: Console) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run to resume, and its state; None for a new run.

    Raises:
        ValueError: a new run whose `output_dir` holds one already, or nothing to resume.
    """
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
        console.print(f"[yellow]Damaged checkpoint skipped: {problem}[/]")
    check_resumable(state["recipe"], recipe)
    return path, state


def resume_from(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Put a prepared run into the state that it had at this checkpoint.

    Raises:
        ValueError: another number of processes, or other training data.
    """
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
