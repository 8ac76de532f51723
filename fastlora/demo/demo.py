"""The demo: a language model is fine-tuned with QLoRA from start to end, with nothing to download.

The base is a 4 M-parameter Llama that was trained on the sources of Python's standard library. It has never seen a
question and does not stop after an answer. The demo quantizes it to NF4, puts rank-16 adapters on every linear layer,
teaches it to answer "what does this function do?" with the first line of the docstring, and asks it about modules that
neither the pretraining nor the fine-tuning saw.

It consists of the recipe `recipes/demo.yaml` and two hooks around the same loop, `training.loop`. Every key can be set
as in any run: `fastlora train --set max_steps=50`.
"""

import copy
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch import nn
from transformers.utils import logging as transformers_logging

from fastlora.demo import stdlib_data
from fastlora.files import atomic
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.ops.backend import backend
from fastlora.training import lock, plots
from fastlora.training.data import IGNORED, collate
from fastlora.training.loop import Hooks, Result, train
from fastlora.training.recipe import Recipe, from_mapping, parse_overrides, read
from fastlora.training.run import Run, load_base

MODEL = Path(__file__).resolve().parent / "model"
QUESTIONS = 3
ANSWER_TOKENS = 40
WINDOWS, WINDOW = 48, 256  # of plain held-out source, for the perplexity; in tokens
WINDOW_CHARS = 8 * WINDOW  # more than a window needs
SAME_LOGITS = 1e-4  # of the largest logit: what fp32 rounding in another order explains


@dataclass(frozen=True)
class Measured:
    """What is measured before and after: answers to `QUESTIONS` questions, and perplexity on plain source."""

    answers: list[str]
    perplexity: float


_OF_METHOD: dict[Any, dict[str, Any]] = {  # what differs from recipes/demo.yaml, which is for LoRA
    "full": {"quantize": None, "learning_rate": 2e-4},
    "prefix": {"learning_rate": 1e-2},
    "prompt": {"learning_rate": 3e-2},
}


def run(overrides: Iterable[str] = (), resume: bool = False, console: Console | None = None) -> Result:
    """Make the data, train, compare before and after, and leave everything in `output_dir` (runs/demo).

    The demo's last run is moved to `<output_dir>.previous`; an older one there is deleted.

    Raises:
        ValueError: as `training.loop.train`; a directory that holds another run is not touched.
    """
    began = time.perf_counter()
    console = console or plots.lasting_console()
    transformers_logging.disable_progress_bar()
    recipe = recipe_with_data(overrides)
    directory = Path(recipe.output_dir)
    if not resume:
        with lock.held(directory):
            pass  # the directory of a run that is under way is not moved
        _set_aside(directory, recipe, console)
        _check_untouched(directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write_text(directory / "recipe.yaml", recipe.to_yaml())  # marks it as the demo's
    _write_pairs(Path(str(recipe.train_file)), stdlib_data.instruction_pairs(held_out=False))
    _write_pairs(Path(str(recipe.eval_file)), stdlib_data.instruction_pairs(held_out=True))
    return train(recipe, resume, BeforeAndAfter(began), console)


def values_with_data(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The demo's keys with `overrides`, and its data, written into `folder`."""
    files = {"train_file": str(folder / "data" / "train.jsonl"), "eval_file": str(folder / "data" / "eval.jsonl")}
    for name, held_out in (("train_file", False), ("eval_file", True)):
        _write_pairs(Path(files[name]), stdlib_data.instruction_pairs(held_out=held_out))
    return {"model_name_or_path": str(MODEL), **read("demo"), **overrides, **files}


def plain_text() -> str:
    """Source code of the standard library that the demo's model has not seen."""
    return "\n".join(stdlib_data.plain_sources(held_out=True))


def recipe_with_data(overrides: Iterable[str] = ()) -> Recipe:
    """`recipes/demo.yaml` with `overrides`, and the model and the data that it does not name."""
    asked = parse_overrides(overrides)
    values = {"model_name_or_path": str(MODEL), **read("demo"), **_OF_METHOD.get(asked.get("method"), {}), **asked}
    data = Path(str(values["output_dir"])) / "data"
    files = {"train_file": str(data / "train.jsonl"), "eval_file": str(data / "eval.jsonl")}
    return from_mapping({**values, **files}, source="demo")


class BeforeAndAfter(Hooks):
    """Measures before the first step and after the last, and shows both."""

    def __init__(self, began: float) -> None:
        self.began = began  # time.perf_counter() when the demo started

    def on_start(self, run: Run) -> None:
        self.pairs = _questions(stdlib_data.instruction_pairs(held_out=True))
        run.console.print(_introduction(run))
        if (report := getattr(run.model, "fastlora_report", None)) is not None:
            report.print(run.console)
        if run.method.name not in ("lora", "houlsby"):  # with zeros for what they train these are the base model
            self.before = measure(run, self.pairs)
            return
        trained = [parameter.detach().clone() for parameter in run.trainable]  # of a resumed run
        for parameter in run.trainable:
            parameter.data.zero_()
        self.before = measure(run, self.pairs)
        for parameter, value in zip(run.trainable, trained, strict=True):
            parameter.data.copy_(value)

    def on_end(self, run: Run) -> None:
        after = measure(run, self.pairs)
        summary = _summary(run, self.before, after, time.perf_counter() - self.began)
        atomic.write_text(run.directory / "summary.json", plots.as_json(summary, indent=1) + "\n")
        run.console.print(_answers_table(self.pairs, self.before, after))
        run.console.print(_numbers_table(summary))


def measure(run: Run, pairs: list[stdlib_data.Pair]) -> Measured:
    """Answers and perplexity of the model as it is now, in the precision of training."""
    training = run.model.training
    run.model.eval()
    with torch.no_grad(), run.autocast():
        measured = Measured([answer(run, pair.prompt) for pair in pairs], perplexity(run))
    run.model.train(training)
    return measured


def answer(run: Run, prompt: str) -> str:
    """What the model says after `prompt`, decoded greedily."""
    inputs = run.tokenizer(prompt, return_tensors="pt").to(run.accelerator.device)
    out = run.model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=run.tokenizer.pad_token_id,
    )
    said = out[0, inputs["input_ids"].shape[1] :]
    return run.tokenizer.decode(said, skip_special_tokens=True).strip()


def perplexity(run: Run) -> float:
    """Per token, on `WINDOWS` evenly spaced windows of the held-out modules' source, without questions."""
    text = plain_text()
    starts = torch.linspace(0, len(text) - WINDOW_CHARS, WINDOWS).long().tolist()
    cuts = [text[start : start + WINDOW_CHARS] for start in starts]
    batch = run.tokenizer(cuts, truncation=True, max_length=WINDOW, padding=True, return_tensors="pt")
    total, count = 0.0, 0
    for ids, mask in zip(batch["input_ids"].split(8), batch["attention_mask"].split(8), strict=True):
        labels = torch.where(mask[:, 1:] > 0, ids[:, 1:], IGNORED).flatten().to(run.accelerator.device)
        logits = run.model(input_ids=ids.to(run.accelerator.device), use_cache=False).logits
        logits = logits[:, run.method.virtual_tokens : -1]
        total += float(F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return math.exp(total / count)


@torch.no_grad()
def difference_in_peft(run: Run) -> tuple[float, float] | None:
    """Open the saved adapter in peft, over the same dequantized base, and compare logits in fp32.

    Returns:
        The largest difference on eight held-out examples, and the largest logit; None if peft is not installed, or
        does not have the method.
    Raises:
        RuntimeError: the logits differ by more than `SAME_LOGITS` of the largest.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of what is not needed
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        return None
    if run.method.name in ("houlsby", "full"):
        return None
    assert run.eval_set is not None
    batch = collate(run.eval_set, range(8), run.tokenizer.pad_token_id)
    inputs = {key: batch[key].to(run.accelerator.device) for key in ("input_ids", "attention_mask")}
    ours = copy.deepcopy(run.model).to(torch.float32).eval()  # type: ignore[arg-type]
    base = load_base(run.recipe.replace(bf16=False, quantize=None))
    base = base.to(run.accelerator.device).eval()
    for name, module in ours.named_modules():
        if isinstance(module, NF4Linear):
            plain = base.get_submodule(name.removesuffix(".base_layer"))
            plain.weight.copy_(module.weight.dequantize(torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers'
        theirs = PeftModel.from_pretrained(base, str(run.directory)).eval()
    real = inputs["attention_mask"].bool()
    of_text = slice(run.method.virtual_tokens, None)
    expected, found = (model(**inputs).logits[:, of_text][real] for model in (theirs, ours))  # type: ignore[operator]
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    if not difference <= SAME_LOGITS * largest:
        raise RuntimeError(f"the adapter gives other logits in peft: they differ by up to {difference:.2e}")
    return difference, largest


def _set_aside(directory: Path, recipe: Recipe, console: Console) -> None:
    """Move the demo's last run away. Anything else stays, and is refused later."""
    if not _is_demo(directory, recipe):
        return
    previous = directory.with_name(f"{directory.name}.previous")
    if previous.exists() and not _is_demo(previous, recipe):
        raise ValueError(f"output_dir: {directory} would replace {previous}, which is not the demo's: move that away")
    shutil.rmtree(previous, ignore_errors=True)
    directory.rename(previous)
    console.print(f"the last run of the demo is now in {previous}", highlight=False, markup=False)


def _is_demo(directory: Path, recipe: Recipe) -> bool:
    """Whether a directory holds a run of the demo, by the training file its recipe names."""
    marker = directory / "recipe.yaml"
    return marker.is_file() and f"train_file: {recipe.train_file}\n".encode() in marker.read_bytes()


def _check_untouched(directory: Path) -> None:
    """Raise ValueError if the directory holds anything: the demo writes its data before the run would check it."""
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if found:
        listed = ", ".join(found[:4])
        raise ValueError(f"output_dir: {directory} already holds a run or other files ({listed}); give another one")


def _write_pairs(path: Path, pairs: list[stdlib_data.Pair]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": pair.prompt, "completion": pair.completion}) for pair in pairs)
    atomic.write_text(path, "".join(f"{line}\n" for line in lines))


def _questions(pairs: list[stdlib_data.Pair]) -> list[stdlib_data.Pair]:
    """Questions evenly spaced among the public functions, so that no answer influences the choice."""
    plain = [pair for pair in pairs if "._" not in pair.prompt and "`_" not in pair.prompt] or pairs
    return [plain[(2 * i + 1) * len(plain) // (2 * QUESTIONS)] for i in range(QUESTIONS)]


def _introduction(run: Run) -> Panel:
    facts = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    device = run.accelerator.device
    precision = "bfloat16" if run.recipe.bf16 else "float32"
    parameters, tokens = facts["parameters"] / 1e6, facts["tokens_seen"] / 1e6
    text = (
        f"A Llama of {parameters:.1f} M parameters, pretrained on {tokens:.0f} M tokens of the standard library's "
        "source, learns to say what a function does.\n"
        f"{_method(run)}, base in {(run.recipe.quantize or precision).upper()}, "
        f"{run.total_steps} steps in {precision} on {device}, kernels: {backend(device).name}."
    )
    return Panel(text, title="fastlora demo", title_align="left")


def _method(run: Run) -> str:
    recipe = run.recipe
    return {
        "lora": f"LoRA r={recipe.r} on every linear layer",
        "houlsby": f"Houlsby adapters of {recipe.bottleneck} after attention and MLP",
        "prefix": f"A prefix of {recipe.num_virtual_tokens} trained keys and values in every layer",
        "prompt": f"A prompt of {recipe.num_virtual_tokens} trained tokens",
        "full": "Every parameter trained",
    }[recipe.method]


def _summary(run: Run, before: Measured, after: Measured, seconds: float) -> dict[str, Any]:
    first, last = run.eval_losses.get(0), run.eval_losses[max(run.eval_losses)]
    weights = run.directory / run.method.files[-1]
    trainable = sum(p.numel() for p in run.trainable)
    peft = difference_in_peft(run)
    return {
        "held_out_loss_before": first,
        "held_out_loss_after": last,
        "held_out_loss_fell_by": None if first is None else 1 - last / first,
        "perplexity_plain_source_before": before.perplexity,
        "perplexity_plain_source_after": after.perplexity,
        "trainable_parameters": trainable,
        "all_parameters": trainable + _frozen_parameters(run.model),
        "adapter_bytes": weights.stat().st_size,
        "file": weights.name,
        "peft_largest_difference": None if peft is None else peft[0],
        "peft_largest_logit": None if peft is None else peft[1],
        "steps": run.total_steps,
        "seconds": round(seconds, 1),
        "device": str(run.accelerator.device),
        "backend": backend(run.accelerator.device).name,
        "bf16": run.recipe.bf16,
    }


def _frozen_parameters(model: nn.Module) -> int:
    """The number of weights of the base. NF4 weights are buffers, two per byte; each weight counts."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    return packed + sum(p.numel() for p in model.parameters() if not p.requires_grad)


def _answers_table(pairs: list[stdlib_data.Pair], before: Measured, after: Measured) -> Table:
    table = Table(title="questions about modules it has never seen", title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for pair, then, now in zip(pairs, before.answers, after.answers, strict=True):
        table.add_row("question", pair.prompt.split("`")[1], style="bold")
        table.add_row("model, before", escape(_one_line(then)))
        table.add_row("model, after", f"[green]{escape(_one_line(now))}[/]")
        table.add_row("reference answer", escape(pair.completion.strip()), end_section=True)
    return table


def _one_line(text: str) -> str:
    shown = text.replace("\n", "⏎")
    return shown if len(shown) <= 160 else f"{shown[:160]}…"


def _numbers_table(summary: dict[str, Any]) -> Table:
    table = Table(title="the result", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "before", "after", ""):
        table.add_column(column, justify="left" if not column else "right")
    fell, first = summary["held_out_loss_fell_by"], summary["held_out_loss_before"]
    loss_before, note = ("-", "") if fell is None else (f"{first:.3f}", f"fell by {fell:.0%}")
    table.add_row("held-out loss (nats per token)", loss_before, f"[bold]{summary['held_out_loss_after']:.3f}[/]", note)
    ppl = [summary[f"perplexity_plain_source_{when}"] for when in ("before", "after")]
    change = f"{ppl[1] / ppl[0] - 1:+.0%}; has it forgotten?"
    table.add_row("perplexity on plain source", *(f"{p:.2f}" for p in ppl), change)
    share = summary["trainable_parameters"] / summary["all_parameters"]
    table.add_row("trainable parameters", "", f"{summary['trainable_parameters']:,}", f"{share:.1%} of all")
    table.add_row("on disk", "", f"{summary['adapter_bytes'] / 1e6:.2f} MB", summary["file"])
    if summary["peft_largest_difference"] is None:
        table.add_row("the same adapter in peft", "", "not tried", "pip install peft, and a method that it has")
    else:
        found = f"largest difference, of logits up to {summary['peft_largest_logit']:.1f}"
        table.add_row("the same adapter in peft", "", f"{summary['peft_largest_difference']:.1e}", found)
    table.add_row("time", "", f"{summary['seconds']:.0f} s", f"{summary['steps']} steps, {summary['backend']} path")
    return table
