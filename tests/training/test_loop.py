"""The loop: normalisation, resuming bit for bit, damaged checkpoints, interruption, and what it refuses."""

import contextlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from fastlora.methods import LoRA
from fastlora.ops import dequantize
from fastlora.training import checkpoint, loop, plots
from fastlora.training.loop import Hooks, train
from fastlora.training.run import Run, prepare
from tests.support.full_disk import no_file_beyond
from tests.support.runs import QUIET, lines, losses, recipe


class StopAt(Hooks):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
        real = loop.target_loss

        def target_loss(run: Run, model: Any, batch: Any) -> Any:
            if run.step == step - 1 and model is run.wrapped and number is not None:
                os.kill(os.getpid(), number)
                monkeypatch.setattr(loop, "target_loss", real)
            return real(run, model, batch)

        monkeypatch.setattr(loop, "target_loss", target_loss)


def test_a_run_leaves_what_it_promises(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen = str(base / "train.jsonl")
    ran = train(recipe(base, out, eval_file=seen, eval_steps=2, eval_on_start=True, quantize="nf4"), console=QUIET)
    assert ran.directory == out
    assert (ran.step, ran.total_steps, ran.interrupted) == (6, 6, None)
    trained = lines(out)
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    assert all({"step", "loss", "lr", "tokens_per_s", "grad_norm"} == record.keys() for record in trained)
    assert all(record["tokens_per_s"] > 0 and record["grad_norm"] > 0 for record in trained)
    evaluated = lines(out, "eval_loss")
    assert [record["step"] for record in evaluated] == [0, 2, 4, 6]
    assert ran.eval_loss == evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.05
    assert ran.loss == trained[-1]["loss"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not checkpoint.steps(out)
    assert {"adapter_model.safetensors", "adapter_config.json", "recipe.yaml"} <= {p.name for p in out.iterdir()}


def test_saved_adapter_gives_the_same_logits_in_peft(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    class Keep(Hooks):
        def on_end(self, run: Run) -> None:
            self.logits = run.model.eval()(input_ids=ids).logits.detach()

    ids, keep = torch.arange(1, 41).reshape(2, 20), Keep()
    train(recipe(base, tmp_path / "run"), hooks=keep, console=QUIET)
    plain = LlamaForCausalLM.from_pretrained(base)
    before = plain(input_ids=ids).logits.detach()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "run")).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, keep.logits, rtol=1e-5, atol=1e-5)
    assert (before - keep.logits).abs().max() > 1e-2


@pytest.mark.parametrize("cut", [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_cutting_a_step_into_micro_batches_changes_nothing(base: Path, tmp_path: Path, cut: tuple[int, int]) -> None:
    """Against one batch of the same examples, with unequal lengths and a last step that is not full."""
    batch, accumulation = cut
    whole = batch * accumulation
    for name, size, count in (("whole", whole, 1), ("cut", batch, accumulation)):
        made = recipe(
            base, tmp_path / name, per_device_train_batch_size=size, gradient_accumulation_steps=count, max_steps=8
        )
        train(made, console=QUIET)
    ours, expected = lines(tmp_path / "cut"), lines(tmp_path / "whole")
    assert len(ours) == len(expected) == 8
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in expected], rel=2e-5)


def test_loss_and_gradient_are_per_target_token(base: Path, tmp_path: Path) -> None:
    """One step over micro-batches, against transformers' own mean over all examples at once."""
    made = recipe(base, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=8, max_grad_norm=0)
    run = prepare(made, QUIET)
    assert run.plan.steps_per_epoch == 1  # the 22 examples, the last micro-batch with a single one
    batch = loop._batch(run, run.train_set, list(range(len(run.train_set))))
    del batch["targets"]
    loss = run.model(**batch).loss  # type: ignore[operator]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.trainable if p.grad is not None])
    run.optimizer.zero_grad()
    record, _ = loop.train_step(run)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("speed_up", [True, False])
def test_the_loss_is_over_the_target_tokens(base: Path, tmp_path: Path, speed_up: bool) -> None:
    run = prepare(recipe(base, tmp_path, speed_up=speed_up), QUIET)
    model: Any = run.model
    batch = loop._batch(run, run.train_set, [0, 3, 5])
    targets = batch.pop("targets")
    expected = torch.nn.functional.cross_entropy(
        model(**{**batch, "labels": None}).logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        reduction="sum",
    )
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, y: seen.append(y.shape[:-1].numel()))
    loss = loop.target_loss(run, model, {**batch, "targets": targets})
    torch.testing.assert_close(loss, expected)
    assert 0 < len(targets) < batch["labels"].numel()
    assert sum(seen) == (len(targets) if speed_up else batch["labels"].numel())


@pytest.mark.parametrize("speed_up", [True, False])
def test_label_smoothing_is_that_of_transformers_and_only_in_training(
    base: Path, tmp_path: Path, speed_up: bool
) -> None:
    run = prepare(recipe(base, tmp_path, speed_up=speed_up, label_smoothing_factor=0.2), QUIET)
    model: Any = run.model.train()
    batch = loop._batch(run, run.train_set, [0, 3, 5])
    outputs = model(**{name: value for name, value in batch.items() if name != "targets"} | {"labels": None})
    smoother = LabelSmoother(0.2)
    expected = smoother(outputs, batch["labels"], shift_labels=True, num_items_in_batch=1)
    torch.testing.assert_close(loop.target_loss(run, model, batch), expected)
    model.eval()
    plain = LabelSmoother(0.0)(outputs, batch["labels"], shift_labels=True, num_items_in_batch=1)
    torch.testing.assert_close(loop.target_loss(run, model, batch), plain)
    assert abs(plain - expected) > 1e-3 * plain


def test_clipping_bounds_the_update(base: Path, tmp_path: Path) -> None:
    run = prepare(recipe(base, tmp_path, max_grad_norm=1e-3), QUIET)
    gradients: list[torch.Tensor] = []
    step = run.optimizer.step

    def spy() -> None:
        gradients.extend(p.grad.clone() for p in run.trainable if p.grad is not None)
        step()

    run.optimizer.step = spy  # type: ignore[method-assign]
    record, _ = loop.train_step(run)
    assert record["grad_norm"] > 1e-2
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_reaches_only_the_adapters(base: Path, tmp_path: Path) -> None:
    run = prepare(recipe(base, tmp_path, weight_decay=0.1), QUIET)
    names = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert sum(len(g["params"]) for g in run.optimizer.param_groups if g["weight_decay"] == 0.1) == len(names)


def test_gradient_checkpointing_changes_no_loss(base: Path, tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False), ("selective", "selective")):
        train(recipe(base, tmp_path / name, gradient_checkpointing=on, lora_dropout=0.1), console=QUIET)
    found = {name: [r[1] for r in losses(tmp_path / name)] for name in ("with", "without", "selective")}
    assert found["with"] == pytest.approx(found["without"])
    assert found["selective"] == found["with"]


ACCUMULATED = {"quantize": "nf4", "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "bf16": False}


def test_weights_kept_over_micro_batches_change_no_loss(base: Path, tmp_path: Path, monkeypatch) -> None:
    made = []
    expand = dequantize._dequantize
    monkeypatch.setattr(dequantize, "_dequantize", lambda *a, **b: [made.append(0), expand(*a, **b)][1])
    counts = []
    for name, on in (("with", True), ("without", False)):
        made.clear()
        train(recipe(base, tmp_path / name, keep_expanded=on, lora_dropout=0.1, **ACCUMULATED), console=QUIET)
        counts.append(len(made))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert counts[0] * 5 < counts[1]  # 3 micro-batches, twice in each


def test_a_step_that_ran_out_of_memory_is_made_again_without_kept_weights(base: Path, tmp_path: Path) -> None:
    class Scarce(Hooks):
        """Runs out of memory in the second micro-batch of the third step."""

        def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
            real, calls = loop.target_loss, []

            def target_loss(run: Run, model: Any, batch: Any) -> Any:
                calls.append(run.step)
                loss = real(run, model, batch)
                if run.step == 2 and calls.count(2) == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return loss

            monkeypatch.setattr(loop, "target_loss", target_loss)

    said = Console(record=True, width=200, file=io.StringIO())
    options = {"lora_dropout": 0.1, **ACCUMULATED}
    with pytest.MonkeyPatch.context() as patch:
        train(recipe(base, tmp_path / "with", keep_expanded=True, **options), hooks=Scarce(patch), console=said)
    train(recipe(base, tmp_path / "without", **options), console=QUIET)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert said.export_text().count("memory ran out; no weights are kept") == 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        train(recipe(base, tmp_path / "plain", **options), hooks=Scarce(patch), console=QUIET)


def test_speed_up_is_the_default_and_changes_no_loss_on_a_cpu(base: Path, tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        seen = Seen()
        train(recipe(base, tmp_path / name, speed_up=on), hooks=seen, console=QUIET)
        assert bool(seen.parts) == on
    found = [[row[1] for row in losses(tmp_path / name)] for name in ("with", "without")]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Seen(Hooks):
    """What `speed_up` found in the model of a run."""

    def on_start(self, run):
        self.parts = run.model.fastlora_report.parts


def test_bf16_follows_fp32(base: Path, tmp_path: Path) -> None:
    for name, on in (("bf16", True), ("fp32", False)):
        train(recipe(base, tmp_path / name, bf16=on, quantize="nf4"), console=QUIET)
    narrow, wide = ([r[1] for r in losses(tmp_path / name)] for name in ("bf16", "fp32"))
    assert narrow == pytest.approx(wide, rel=2e-2)
    assert narrow != wide


INTERRUPTIBLE = {
    "lora_dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "max_steps": 10,
    "quantize": "nf4",
}


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_resume_is_bit_identical(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Dropout, shuffling, accumulation; interrupted within the second epoch (4 steps each), twice."""
    values = {
        **INTERRUPTIBLE,
        "train_sampling_strategy": strategy,
        "eval_file": str(base / "eval.jsonl"),
        "eval_steps": 3,
    }
    train(recipe(base, tmp_path / "whole", **values), console=QUIET)
    cut = recipe(base, tmp_path / "cut", **values)
    ran = train(cut, hooks=StopAt(monkeypatch, 6), console=QUIET)
    assert (ran.step, ran.interrupted) == (6, "SIGINT")
    torch.rand(7), np.random.rand(7), random.random()  # whatever happens in between
    ran = train(cut, resume=True, hooks=StopAt(monkeypatch, 7, signal.SIGTERM), console=QUIET)
    assert (ran.step, ran.interrupted) == (7, "SIGTERM")
    ran = train(cut, resume=True, console=QUIET)
    assert (ran.step, ran.interrupted) == (10, None)
    for key in ("loss", "eval_loss"):
        ours, expected = lines(tmp_path / "cut", key), lines(tmp_path / "whole", key)
        assert [(r["step"], r[key]) for r in ours] == [(r["step"], r[key]) for r in expected]
    same = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert same[0] == same[1]


def test_lines_after_the_checkpoint_are_not_repeated(base: Path, tmp_path: Path) -> None:
    """A run that was killed has written lines, the last one half, that its newest checkpoint knows nothing of."""
    made = recipe(base, tmp_path / "run", save_steps=4, **INTERRUPTIBLE)
    train(made, console=QUIET)
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    train(made, resume=True, console=QUIET)
    assert losses(tmp_path / "run") == expected


def test_save_total_limit_keeps_the_newest(base: Path, tmp_path: Path) -> None:
    train(recipe(base, tmp_path / "run", save_steps=2, save_total_limit=2, max_steps=7), console=QUIET)
    assert checkpoint.steps(tmp_path / "run") == [6, 7]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "rng-0.pt", "trainer_state.json", "adapter_config.json"]
)
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(base: Path, tmp_path: Path, name: str, how: str) -> None:
    out = tmp_path / "run"
    made = recipe(base, out, save_steps=2, max_steps=4)
    train(made, console=QUIET)
    expected = losses(out)
    damaged = out / "checkpoint-4" / name
    if how == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    console = Console(record=True, width=500, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    train(made, resume=True, console=console)
    text = console.export_text()
    assert f"Damaged checkpoint skipped: {damaged}" in text
    assert "after step 2 of 4" in text
    assert losses(out) == expected
    checkpoint.read(out / "checkpoint-4")  # made again, whole


def test_no_whole_checkpoint_left(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = recipe(base, out, save_steps=4, max_steps=4)
    train(made, console=QUIET)
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing to resume from: .*optimizer.pt is damaged"):
        train(made, resume=True, console=QUIET)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(recipe(base, tmp_path / "none"), resume=True, console=QUIET)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: [],
        lambda state: {},
        lambda state: {**state, "sha256": {}},
        lambda state: {**state, "sha256": {**state["sha256"], "a\0b": ""}},
        lambda state: {**state, "sha256": {**state["sha256"], "x" * 5000: ""}},
        lambda state: {**state, "sha256": dict.fromkeys(state["sha256"])},
        lambda state: {**state, "step": 3},
        lambda state: {**state, "step": "4"},
        lambda state: {**state, "processes": None},
        lambda state: {**state, "processes": 0},
        lambda state: {**state, "processes": 10**12},
        lambda state: {**state, "recipe": []},
        *(lambda state, key=key: {k: v for k, v in state.items() if k != key} for key in checkpoint._KINDS),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_used(base: Path, tmp_path: Path, damage: Any) -> None:
    out = tmp_path / "run"
    made = recipe(base, out, save_steps=2, max_steps=4)
    train(made, console=QUIET)
    path = out / "checkpoint-4" / "trainer_state.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    found, state, damaged = checkpoint.newest(out)
    assert (found.name, state["step"]) == ("checkpoint-2", 2)
    assert [problem.startswith(str(path.parent)) for problem in damaged] == [True]


def test_deeply_nested_state(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"trainer_state.json is missing or damaged"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize(
    "line", [" ", "null", "[]", "{}", '{"step": "x"}', '{"step":', "\0\0\0", "\xff", "[" * 100_000]
)
def test_a_damaged_line_of_metrics_is_told_before_the_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Unless it is one that will be written again, as that of a step after the checkpoint."""
    out = tmp_path / "run"
    made = recipe(base, out, save_steps=2, max_steps=4)
    train(made, console=QUIET)
    path, expected = out / "metrics.jsonl", losses(out)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:2], line, *rows[3:], ""]), encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "prepare", None)
        with pytest.raises(ValueError, match=r"metrics.jsonl:3: the line is damaged: repair"):
            train(made, resume=True, console=QUIET)
    path.write_text("\n".join([*rows[:3], line]), encoding="latin-1")
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: the line is damaged"):
        checkpoint.metrics_until(path, 4)
    shutil.rmtree(out / "checkpoint-4")
    train(made, resume=True, console=QUIET)
    assert losses(out) == expected


@pytest.mark.parametrize(("size", "name"), [(5_000, "adapter_model.safetensors"), (40_000, "optimizer.pt")])
def test_a_full_disk_in_a_checkpoint_loses_nothing_before_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, name: str
) -> None:
    """It fills up in the adapter, which Rust writes, or in the moments."""
    made = recipe(base, tmp_path / "run", save_steps=2, save_total_limit=1, lora_dropout=0.1)
    train(recipe(base, tmp_path / "whole", save_steps=2, lora_dropout=0.1), console=QUIET)
    real = loop._save_checkpoint

    def on_a_full_disk(run: Run) -> None:
        with no_file_beyond(size if run.step == 4 else resource.RLIM_INFINITY):
            real(run)

    kept = rf"; The last good checkpoint is {tmp_path}/run/checkpoint-2"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save_checkpoint", on_a_full_disk)
        with pytest.raises(OSError, match=f"(?i)file too large{kept}") as error:
            train(made, console=QUIET)
    assert Path(error.value.filename) == tmp_path / "run" / ".checkpoint-4.part" / name
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint-2", "metrics.jsonl", "recipe.yaml"}
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    train(made, resume=True, console=QUIET)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_full_disk_at_a_line_of_metrics_leaves_whole_lines(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = recipe(base, out, save_steps=1)

    class Full(Hooks):
        def on_start(self, run: Run) -> None:
            step = run.optimizer.step

            def last() -> None:
                step()
                if run.step == 3:
                    full.enter_context(no_file_beyond((out / "metrics.jsonl").stat().st_size + 20))

            run.optimizer.step = last  # type: ignore[method-assign]

    with contextlib.ExitStack() as full, pytest.raises(OSError, match="checkpoint-3") as error:
        train(made, hooks=Full(), console=QUIET)
    assert error.value.filename == str(out / "metrics.jsonl")
    assert [step for step, _ in losses(out)] == [1, 2, 3]
    assert train(made, resume=True, console=QUIET).step == 6


def test_a_full_disk_at_the_end_does_not_lose_the_adapter(
    base: Path, tmp_path: Path, rescues: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(base, tmp_path / "whole"), console=QUIET).directory
    real, said = loop._finish, rf"No checkpoint yet; the adapter as of step 6 is in ({rescues}/fastlora-\w+)$"

    def on_a_full_disk(run: Run) -> None:
        with no_file_beyond(1000):
            real(run)

    monkeypatch.setattr(loop, "_finish", on_a_full_disk)
    with pytest.raises(OSError, match="too large") as error:
        train(recipe(base, tmp_path / "run"), console=QUIET)
    found = re.search(said, str(error.value.strerror))
    assert found
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path(found[1], name).read_bytes() == (whole / name).read_bytes()

    monkeypatch.setattr(LoRA, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full") as error:
        train(recipe(base, tmp_path / "again"), console=QUIET)
    assert str(error.value.strerror).endswith("No checkpoint yet")
    assert len(list(rescues.iterdir())) == 1


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "loss.png", "adapter_model.safetensors"])
def test_a_folder_in_the_way_of_a_file_is_told_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loop, "prepare", None)
    (tmp_path / "run" / name).mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"output_dir: .*{name} is in the way"):
            train(recipe(base, tmp_path / "run"), resume=resume, console=QUIET)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_file_in_the_way_of_a_checkpoint_is_told_first(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path / "run", save_steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-4").write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a run .checkpoint-4"):
        train(made, console=QUIET)
    with pytest.raises(ValueError, match=r"checkpoint-4 is in the way, as a run makes folders of this name"):
        train(made, resume=True, console=QUIET)
    assert (tmp_path / "run" / "checkpoint-4").read_text() == "mine"


def test_a_run_is_never_overwritten(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path / "run", max_steps=1)
    train(made, console=QUIET)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"already holds a run \(metrics.jsonl.*--resume"):
        train(made, console=QUIET)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resume_refuses_another_recipe_and_other_data(base: Path, tmp_path: Path) -> None:
    values = {"save_steps": 2, "max_steps": 2, "train_file": str(tmp_path / "train.jsonl")}
    shutil.copy(base / "train.jsonl", tmp_path / "train.jsonl")
    train(recipe(base, tmp_path / "run", **values), console=QUIET)
    with pytest.raises(ValueError, match=r"lora_alpha was 32\.0, is now 8\.0"):
        train(recipe(base, tmp_path / "run", lora_alpha=8, **values), resume=True, console=QUIET)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "w1", "completion": " w2"}\n')
    with pytest.raises(ValueError, match="the training data are not those"):
        train(recipe(base, tmp_path / "run", **values), resume=True, console=QUIET)


def test_a_loss_that_is_not_finite_stops_before_the_update(base: Path, tmp_path: Path) -> None:
    class Poison(Hooks):
        def on_start(self, run: Run) -> None:
            real = run.optimizer.step

            def step() -> None:
                real()
                self.good = [p.detach().clone() for p in run.trainable]
                if run.step == 3:
                    run.model.get_input_embeddings().weight.data.fill_(torch.nan)  # type: ignore[operator, union-attr]
                self.run = run

            run.optimizer.step = step  # type: ignore[method-assign]

    poison, out = Poison(), tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 5: loss nan.*last good checkpoint is .*checkpoint-4"):
        train(recipe(base, out, save_steps=2, save_total_limit=1), hooks=poison, console=QUIET)
    assert [record["step"] for record in lines(out)] == [1, 2, 3, 4]
    checkpoint.read(out / "checkpoint-4")
    for now, good in zip(poison.run.trainable, poison.good, strict=True):
        assert torch.equal(now, good)


def test_a_number_that_is_not_finite_is_null_in_metrics_and_read_as_nan(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    made = recipe(base, out, eval_file=str(base / "eval.jsonl"), eval_steps=2, save_steps=2, max_steps=2)
    monkeypatch.setattr(loop, "evaluate", lambda run: math.nan)
    assert math.isnan(train(made, console=QUIET).eval_loss or 0)
    text = (out / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()][2:] == [
        {"step": 2, "eval_loss": None}
    ]
    assert math.isnan(lines(out, "eval_loss")[0]["eval_loss"])
    assert math.isnan(train(made, resume=True, console=QUIET).eval_loss or 0)
    assert (
        plots.as_json({"a": math.inf, "b": -math.inf, "c": 1, "d": "x"}) == '{"a": null, "b": null, "c": 1, "d": "x"}'
    )


def test_columns_that_nothing_reads_are_named_once(base: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (base / "train.jsonl").read_text().splitlines()]
    for name, extra in (("train", {"id": 1, "[b]tools": [2]}), ("eval", {"id": 1, "source": "x"})):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, **extra}) + "\n" for row in rows))
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    train(recipe(base, tmp_path / "run", **files, max_steps=1), console=console)
    said = [line for line in console.export_text().splitlines() if "nothing reads" in line]
    assert said == ["columns of the data that nothing reads: id, [b]tools, source"]


def test_blocks_that_are_compiled_leave_no_trace_in_the_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a compiled run writes has the names of a plain one, and is continued by either."""

    class Compile(Hooks):
        def on_start(self, run: Run) -> None:
            blocks: Any = run.model.model.layers  # type: ignore[union-attr]
            for index, block in enumerate(blocks):
                blocks[index] = torch.compile(block, backend="eager")

    values = {"save_steps": 2, "max_steps": 4}
    train(recipe(base, tmp_path / "plain", **values), console=QUIET)
    train(recipe(base, tmp_path / "compiled", **values), hooks=Compile(), console=QUIET)
    for folder in ("", "checkpoint-2", "checkpoint-4"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            plain, compiled = (tmp_path / run / folder / name for run in ("plain", "compiled"))
            assert compiled.read_bytes() == plain.read_bytes()
    expected = losses(tmp_path / "plain")
    for hooks in (None, Compile()):
        shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
        train(recipe(base, tmp_path / "compiled", **values), resume=True, hooks=hooks, console=QUIET)
        assert losses(tmp_path / "compiled") == expected


def test_signals_are_given_back(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    train(recipe(base, tmp_path / "run"), hooks=StopAt(monkeypatch, 2), console=QUIET)
    assert [signal.getsignal(number) for number in numbers] == before


def test_sighup_stops_a_run_unless_it_is_ignored(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        made = recipe(base, tmp_path / "nohup", max_steps=3)
        assert train(made, hooks=StopAt(monkeypatch, 2, signal.SIGHUP), console=QUIET).interrupted is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        made = recipe(base, tmp_path / "run", max_steps=3)
        ran = train(made, hooks=StopAt(monkeypatch, 2, signal.SIGHUP), console=QUIET)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (ran.step, ran.interrupted) == (2, "SIGHUP")
    assert train(made, resume=True, console=QUIET).step == 3


def test_a_second_signal_acts_at_once() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # handlers run between two instructions of the main thread

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with loop._signals() as caught:
            interrupt()
            assert caught == ["SIGINT"]
            with pytest.raises(KeyboardInterrupt):
                interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


def test_runs_outside_the_main_thread(base: Path, tmp_path: Path) -> None:
    thread = threading.Thread(
        target=train, args=(recipe(base, tmp_path / "run", max_steps=1),), kwargs={"console": QUIET}
    )
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_data_that_do_not_fit_the_model(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": " ".join(["w1"] * 100)}) + "\n")
    with pytest.raises(ValueError, match="max_length: training data reach 101 tokens, the model 64"):
        train(recipe(base, tmp_path / "run", train_file=str(path)), console=QUIET)
    with pytest.raises(ValueError, match="model_name_or_path: cannot load"):
        train(recipe(base, tmp_path / "run", model_name_or_path=str(tmp_path / "nothing")), console=QUIET)


def test_whole_epochs(base: Path, tmp_path: Path) -> None:
    ran = train(recipe(base, tmp_path / "run", max_steps=-1, num_train_epochs=1.5), console=QUIET)
    assert ran.total_steps == 9  # 22 examples, 4 a step: 6 steps an epoch


def test_evaluation_is_the_mean_over_target_tokens(base: Path, tmp_path: Path) -> None:
    run = prepare(recipe(base, tmp_path, eval_file=str(base / "eval.jsonl"), per_device_eval_batch_size=4), QUIET)
    assert run.eval_set is not None
    batch = loop._batch(run, run.eval_set, list(range(len(run.eval_set))))
    del batch["targets"]
    with torch.no_grad():
        expected = run.model.eval()(**batch).loss.item()
    assert loop.evaluate(run) == pytest.approx(expected, rel=1e-5)


def test_progress_prints_lines_where_there_is_no_terminal(base: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    train(recipe(base, tmp_path / "run", logging_steps=3), console=console)
    text = console.export_text()
    for step in (3, 6):
        assert f"step {step}/6  loss " in text
    assert "step 4/6" not in text
    assert "tokens/s" in text
    assert "linear layers replaced" in text
    assert "training: 22 examples" in text


@pytest.mark.slow
def test_two_processes_train_as_one(base: Path, tmp_path: Path) -> None:
    """The same examples per step, split between two; in the last micro-batch of an epoch one of them has none."""
    values = {"max_steps": 8, "eval_file": str(base / "eval.jsonl"), "quantize": "nf4", "save_steps": 6}
    values |= {"train_file": str(tmp_path / "train.jsonl")}
    rows = (base / "train.jsonl").read_text().splitlines(keepends=True)[:21]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    train(recipe(base, tmp_path / "one", **values), console=QUIET)
    path = tmp_path / "two.yaml"
    path.write_text(recipe(base, tmp_path / "two", **values, per_device_train_batch_size=2).to_yaml())
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={_free_port()}"]
    words += ["-m", "fastlora", "train", str(path)]
    root = str(Path(loop.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for key in ("loss", "grad_norm", "eval_loss"):
        ours, expected = lines(tmp_path / "two", key), lines(tmp_path / "one", key)
        assert [r["step"] for r in ours] == [r["step"] for r in expected]
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in expected], rel=2e-5)
    assert (tmp_path / "two" / "checkpoint-6" / "rng-1.pt").is_file()
    resumed = [*words, "--resume", "--set", "save_steps=null"]
    shutil.rmtree(tmp_path / "two" / "checkpoint-8")
    before = losses(tmp_path / "two")
    done = subprocess.run([sys.executable, *resumed], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == before


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
