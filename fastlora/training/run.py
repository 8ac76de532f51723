"""A run: what it consists of, and getting it ready, from a recipe or from a checkpoint.

What can be known early is checked early: the directory before anything is loaded, the data before the model.
"""

import contextlib
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from rich.console import Console
from rich.markup import escape
from torch import nn

from fastlora import methods
from fastlora.files import atomic
from fastlora.layers.quoted import clipped, reason, shown
from fastlora.methods import Method
from fastlora.model.checkpointing import checkpoint_layers
from fastlora.model.names import matches, within
from fastlora.model.sites import output_head
from fastlora.model.speed_up import speed_up
from fastlora.training import checkpoint, data, packing, plots
from fastlora.training.graphed_step import GraphedStep, obstacle
from fastlora.training.kept_weights import KeptWeights
from fastlora.training.recipe import Recipe, check_resumable

# The files that show a directory to hold a run.
RUN_FILES = (
    "metrics.jsonl",
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapter.safetensors",
    "model.safetensors",
)
OTHER_FILES = ("recipe.yaml", "loss.png", "config.json")


@dataclass(eq=False)
class Run:
    """A run under way, as hooks and evaluation see it.

    Args:
        model: the bare model, adapters included. wrapped: the same, prepared by accelerate for training.
        method: says what is trained of it.
        step: the number of steps made.
        eval_losses: by the number of steps made, in nats per target token.
        padding_free: whether a micro-batch is one row, as `fastlora.training.packing` makes it.
        graphed: computes loss and gradients of a micro-batch where `cuda_graphs` is asked for.
        kept: keeps expanded weights over a step's micro-batches where `keep_expanded` is asked for.
    """

    recipe: Recipe
    accelerator: Accelerator
    console: Console
    tokenizer: Any
    model: nn.Module
    method: Method
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    train_set: data.TokenSet
    eval_set: data.TokenSet | None
    plan: data.BatchPlan
    total_steps: int
    step: int = 0
    loss: float = math.nan
    eval_losses: dict[int, float] = field(default_factory=dict)
    padding_free: bool = False
    graphed: GraphedStep | None = None
    kept: KeptWeights | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of a micro-batch at most."""
        return _most_tokens(self.train_set, self.recipe)

    @property
    def directory(self) -> Path:
        """Where the run's files are."""
        return Path(self.recipe.output_dir)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return self.method.parameters(self.model)

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass, in training and evaluation alike."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bool(self.recipe.bf16))


def has_bf16(use_cpu: bool = False) -> bool:
    """Whether the device that a run would use multiplies in bfloat16 natively."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepare(recipe: Recipe, console: Console, saved: dict[str, Any] | None = None) -> Run:
    """Model, adapters, data and optimizer of a run that has made no step yet.

    Args:
        saved: the state of the checkpoint that the run is to continue from.
    Raises:
        ValueError: a model or data that cannot be used, data that do not fit the model or the checkpoint, another
            number of processes than the checkpoint's, or too little room on the disk for one checkpoint.
    """
    # Autocast is in target_loss. The frozen base is the same in every process and need not be broadcast.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=recipe.use_cpu, mixed_precision="no", kwargs_handlers=[ddp])
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    config, tokenizer = load_config(recipe), load_tokenizer(recipe)
    train_set = data.load(recipe, tokenizer)
    eval_set = data.load(recipe, tokenizer, evaluation=True)
    assert train_set is not None
    for name, examples in (("training", train_set), ("evaluation", eval_set)):
        if examples is not None:
            _check_data_fit(name, examples, config)
    if saved is not None:
        _check_same_run(saved, accelerator, train_set)
    set_seed(recipe.seed)  # the same adapters in every process
    model = load_base(recipe, accelerator.device)
    if recipe.quantize is None:
        model.to(accelerator.device)
    check_causal(model, recipe)
    method = method_of(recipe, tokenizer)
    try:
        method.attach(model)
    except ValueError as error:
        raise ValueError(f"method: {error}" if method.name != "lora" else str(error)) from error
    model.to(accelerator.device)  # with quantize only now, so that no whole model in 16 bits is ever on the device
    if recipe.speed_up:
        speed_up(model, compile=recipe.torch_compile)
    padding_free = _goes_without_padding(recipe, model, console)
    if recipe.cuda_graphs and (reason := _no_graphs(model, accelerator, padding_free)):
        raise ValueError(f"cuda_graphs: {reason}; set it to false")
    _check_room(recipe, model)
    if recipe.gradient_checkpointing:
        policy = "full" if recipe.gradient_checkpointing is True else recipe.gradient_checkpointing
        tokens, offload = _most_tokens(train_set, recipe), recipe.activation_offloading
        try:
            chosen = checkpoint_layers(model, policy, tokens=tokens, offload=offload)
        except ValueError as error:
            raise ValueError(f"gradient_checkpointing, activation_offloading: {error}") from error
        console.print(f"checkpointing: {chosen}", highlight=False)
    optimizer = _optimizer(recipe, model)
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
    parts = (
        recipe,
        accelerator,
        console,
        tokenizer,
        model,
        method,
        wrapped,
        optimizer,
        train_set,
        eval_set,
        plan,
        total,
    )
    return Run(*parts, padding_free=padding_free)


def method_of(recipe: Recipe, tokenizer: Any) -> Method:
    """The method of a recipe, with its options.

    Raises:
        ValueError: an `init_text` without tokens.
    """
    if recipe.method == "lora":
        keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "quantize", "use_rslora",
                "init_lora_weights")  # fmt: skip
        return methods.LoRA(**{key: getattr(recipe, key) for key in keys})
    if recipe.method == "houlsby":
        return methods.Houlsby(recipe.bottleneck)
    if recipe.method == "full":
        return methods.Full()
    text = recipe.init_text
    start = None if text is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if recipe.method == "prompt":
        return methods.Prompt(recipe.num_virtual_tokens, start)
    return methods.Prefix(recipe.num_virtual_tokens, start, recipe.encoder_hidden_size * recipe.prefix_projection)


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained; with LoRA+, B in a group of its own, whose rate the loop scales by `lr_scale`.

    Raises:
        ValueError: one of bitsandbytes' that cannot be had here.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named]}]
    if ratio := recipe.loraplus_lr_ratio:
        of_b = [p for name, p in named if "lora_B" in name.split(".") or "lora_embedding_B" in name.split(".")]
        rest = [p for _, p in named if all(p is not b for b in of_b)]
        groups = [{"params": rest, "lr_scale": 1.0}, {"params": of_b, "lr_scale": ratio}]
    options: dict[str, Any] = {
        "lr": recipe.learning_rate, "betas": (recipe.adam_beta1, recipe.adam_beta2), "eps": recipe.adam_epsilon,
        "weight_decay": recipe.weight_decay,
    }  # fmt: skip
    if recipe.optim == "adamw_torch":
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ValueError(
            f"optim: {recipe.optim} is bitsandbytes': pip install bitsandbytes, or set adamw_torch"
        ) from error
    if not named[0][1].is_cuda:
        raise ValueError(f"optim: {recipe.optim} needs a CUDA device; set adamw_torch")
    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return kinds[recipe.optim](groups, **options)  # type: ignore[no-any-return]


def _most_tokens(train_set: data.TokenSet, recipe: Recipe) -> int:
    """Tokens of a micro-batch at most."""
    return int(train_set.lengths.max()) * min(recipe.per_device_train_batch_size, len(train_set))


def _no_graphs(model: nn.Module, accelerator: Accelerator, padding_free: bool) -> str:
    """Why steps cannot be recorded; "" where they can."""
    if accelerator.num_processes > 1:
        return "a run of several processes cannot be recorded"
    return obstacle(model) or ("" if padding_free else "it needs padding_free, which this model cannot do")


def _goes_without_padding(recipe: Recipe, model: Any, console: Console) -> bool:
    """Whether micro-batches are single rows; says why they are not, where they might have been.

    Raises:
        ValueError: the recipe asks for it, and the model cannot.
    """
    if recipe.padding_free is False or recipe.method in ("prefix", "prompt"):
        return False
    reason = packing.prepare(model, recipe.max_length)
    if reason and recipe.padding_free:
        raise ValueError(f"padding_free: {reason}; set it to null or false, and batches are padded")
    if reason:
        console.print(f"[yellow]batches are padded, for in one row without padding: {escape(reason)}[/]")
    return not reason


def load_config(recipe: Recipe) -> Any:
    """The model's config.

    Raises:
        ValueError: there is none under `model_name_or_path`.
    """
    from transformers import AutoConfig

    name = recipe.model_name_or_path
    adapter = os.path.isfile(f"{name}/adapter_config.json")  # noqa: PTH113, as pathlib raises where a name is too long
    advice = "; it is an adapter: give its base model, or the two merged" if adapter else ""
    with _loading(recipe, "the model's config.json", advice):
        return AutoConfig.from_pretrained(name)


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: there is none under `model_name_or_path`.
    """
    from transformers import AutoTokenizer

    with _loading(recipe, "a tokenizer", "; put the base model's tokenizer files next to its weights"):
        tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
        if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # transformers makes one from nothing
            raise ValueError("its vocabulary is empty: the files are missing")
        return tokenizer


def load_base(recipe: Recipe, device: torch.device | None = None) -> Any:
    """The frozen model in the precision of the run. Weights that become NF4 do so one by one as they are read.

    Args:
        device: that of a model in NF4; None is the CPU.
    Raises:
        ValueError: nothing loadable under `model_name_or_path`, or files that lack a weight of the model.
    """
    short = recipe.bf16 and recipe.method != "full"  # a weight that is trained in 16 bits loses its small updates
    options: dict[str, Any] = {"dtype": torch.bfloat16 if short else torch.float32}
    if getattr(load_config(recipe), "quantization_config", None) is None:
        with _quiet():
            plain = _read(recipe, device_map={"": torch.device("meta")})  # reads names and shapes, not the weights
        if recipe.quantize:
            options |= _into_nf4(recipe, plain, device or torch.device("cpu"))
    return _read(recipe, **options)


def _read(recipe: Recipe, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    name = recipe.model_name_or_path
    with _loading(recipe, "the model's weights", "; copy the files again, or convert a pickle to safetensors"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, found = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model_name_or_path: {shown(name)} holds an adapter next to a model, and transformers loads both: move "
            "adapter_config.json away, or merge the two"
        )
    for key, in_file, in_model in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"model_name_or_path: {shown(name)} holds {key} as {list(in_file)}, and its config.json means "
            f"{list(in_model)}: the two files do not belong together"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model_name_or_path: {shown(name)} lacks {len(missing)} of the weights of a {type(model).__name__}, which "
            f"would be random: {clipped(', '.join(missing))}; give a whole checkpoint"
        )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(recipe: Recipe, what: str, advice: str = "") -> Iterator[None]:
    """Say on one line what of the model cannot be loaded; memory that runs out is another matter."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the hub's, safetensors', pickle's, JSON's and each model's own
        said = "it is a pickle of more than tensors" if isinstance(error, UnpicklingError) else reason(error)
        name = shown(recipe.model_name_or_path)
        raise ValueError(f"model_name_or_path: cannot load {what} of {name} ({said}){advice}") from error


def _into_nf4(recipe: Recipe, plain: nn.Module, device: torch.device) -> dict[str, Any]:
    """The options of `from_pretrained` that quantize what `replace_linear` would.

    plain: the model without weights. There are none where none of its layers is an `nn.Linear`, as in GPT-2.
    """
    from fastlora.model.quantizer import FastLoRANF4Config

    head = output_head(plain)
    linear = [name for name, module in plain.named_modules() if type(module) is nn.Linear and not within(name, head)]
    excluded = [name for name in linear if matches(recipe.exclude_modules, name)]
    if len(excluded) == len(linear):
        return {}
    kept = [f"{re.escape(name)}$" for name in excluded]
    return {"quantization_config": FastLoRANF4Config(modules_to_not_convert=kept or None), "device_map": {"": device}}


def check_causal(model: Any, recipe: Recipe) -> None:
    """Raise ValueError if the model sees tokens that it is to predict: a gradient reaches a later token's embedding.

    In a causal model that gradient is 0, not merely small, whatever its architecture: nothing is left to rounding. In
    encoders with random weights it is 0.7% of the token's own and more; the line between is drawn at 0.01%.
    """
    embedding = model.get_input_embeddings()
    rows, length = embedding.weight.shape[0], 4
    ids = (rows // 2 + torch.arange(length, device=embedding.weight.device)) % rows  # a padding token's row may be 0
    with packing.watched_embeddings(model) as seen:
        logits = model.eval()(input_ids=ids[None], use_cache=False).logits  # [1, length, vocabulary]
    (gradient,) = torch.autograd.grad(logits[:, 0].float().sum(), seen[0])
    each = gradient.float().reshape(length, -1).abs().amax(1)  # the batch of 1 is the first axis, XLNet's second
    if each[1:].max() > 1e-4 * each[0]:
        raise ValueError(
            f"model_name_or_path: {shown(recipe.model_name_or_path)} is not a causal language model: as a "
            f"{type(model).__name__} it sees the tokens that it is to predict. Give one that sees only what came before"
        )


def _check_data_fit(name: str, examples: data.TokenSet, config: Any) -> None:
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    if rows is not None and int(examples.tokens.max()) >= rows:
        raise ValueError(f"{name} data: token {examples.tokens.max()}, but the model has {rows} embeddings")
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and int(examples.lengths.max()) > context:
        raise ValueError(f"max_length: {name} data reach {examples.lengths.max()} tokens, the model {context}")


def _check_same_run(saved: dict[str, Any], accelerator: Accelerator, train_set: data.TokenSet) -> None:
    if saved["processes"] != accelerator.num_processes:
        raise ValueError(f"cannot resume: saved by {saved['processes']} processes, now {accelerator.num_processes}")
    if saved["train_data"] != train_set.fingerprint():
        raise ValueError(f"cannot resume: the training data are not those of checkpoint-{saved['step']}")


def _check_room(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError if the disk has no room for the adapter and, where checkpoints are wanted, for one of them."""
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = adapter if recipe.save_steps is None else 4 * adapter  # in a checkpoint, with its two moments
    directory = Path(recipe.output_dir)
    if not directory.is_dir():
        return
    disk = shutil.disk_usage(directory)
    if disk.total > 0 and disk.free < needed:  # some network file systems say 0 of 0
        raise ValueError(
            f"output_dir: {directory} has room for {disk.free / 1e6:,.1f} MB, and the adapter and one checkpoint take "
            f"{needed / 1e6:,.1f} MB: make room, or give another output_dir"
        )


def checked_directory(recipe: Recipe, resume: bool, console: Console) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run to resume, and its state; None for a new run.

    Raises:
        ValueError: a new run whose `output_dir` holds one already, nothing to resume, a recipe that differs from the
            saved one, something else where the run's files go, or a damaged `metrics.jsonl`.
    """
    directory = Path(recipe.output_dir)
    for name in (*RUN_FILES, *OTHER_FILES):
        if (path := directory / name).exists() and not path.is_file():
            raise ValueError(f"output_dir: {path} is in the way, as a run writes a file of this name: move it away")
    if not resume:
        found = [name for name in RUN_FILES if (directory / name).exists()]
        found += [f"checkpoint-{step}" for step in checkpoint.steps(directory)]
        if found:
            raise ValueError(
                f"output_dir: {directory} already holds a run ({', '.join(found[:6])}); continue it with --resume, "
                "or give another output_dir"
            )
        return None
    if others := [
        path for step in checkpoint.steps(directory) if not (path := checkpoint.path_of(directory, step)).is_dir()
    ]:
        raise ValueError(f"output_dir: {others[0]} is in the way, as a run makes folders of this name: move it away")
    path, state, damaged = checkpoint.newest(directory)
    for problem in damaged:
        console.print(f"[yellow]Damaged checkpoint skipped: {escape(problem)}[/]")
    check_resumable(state["recipe"], recipe)
    checkpoint.metrics_until(directory / "metrics.jsonl", state["step"])
    return path, state


def resume_from(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Put a prepared run into the state that it had at this checkpoint."""
    checkpoint.restore(path, run.model, run.method, run.optimizer, run.accelerator.process_index)
    run.step = state["step"]
    metrics = run.directory / "metrics.jsonl"
    if run.accelerator.is_main_process:
        atomic.write_text(metrics, checkpoint.metrics_until(metrics, run.step))
    run.accelerator.wait_for_everyone()
    records = plots.read_metrics(metrics)
    run.eval_losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    run.loss = next((r["loss"] for r in reversed(records) if "loss" in r), math.nan)
    run.console.print(f"resumed from {path} after step {run.step} of {run.total_steps}", highlight=False, markup=False)
