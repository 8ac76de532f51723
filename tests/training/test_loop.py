"""The loop: normalisation, resuming bit for bit, damaged checkpoints, interruption, and what it refuses."""

import json
import os
import random
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastlora.training import checkpoint, loop, plots
from fastlora.training.loop import Hooks, train
from fastlora.training.recipe import Recipe, from_mapping
from fastlora.training.run import Run, prepare

WORDS = 60
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, a tokenizer with one token a word, and sentences of unequal length."""
    root = tmp_path_factory.mktemp("base")
    words = ["<end>", *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(root)
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root)
    generator = random.Random(0)
    for name, count in (("train", 22), ("eval", 6)):
        rows = []
        for _ in range(count):
            said = [f"w{generator.randrange(WORDS)}" for _ in range(generator.randint(2, 20))]
            rows.append({"prompt": said[0], "completion": " " + " ".join(said[1:])})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe(base: Path, out: Path, **values: Any) -> Recipe:
    return from_mapping(
        {
            "model_name_or_path": str(base),
            "train_file": str(base / "train.jsonl"),
            "output_dir": str(out),
            "r": 4,
            "bf16": False,
            "use_cpu": True,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "save_steps": None,
            **values,
        }
    )


def lines(out: Path, key: str = "loss") -> list[dict[str, float]]:
    return [record for record in plots.read_metrics(out / "metrics.jsonl") if key in record]


def losses(out: Path) -> list[tuple[float, float]]:
    return [(record["step"], record["loss"]) for record in lines(out)]


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
    loss = run.model(**batch).loss  # type: ignore[operator]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.trainable if p.grad is not None])
    run.optimizer.zero_grad()
    record, _ = loop.train_step(run)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


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
    for name, on in (("with", True), ("without", False)):
        train(recipe(base, tmp_path / name, gradient_checkpointing=on, lora_dropout=0.1), console=QUIET)
    assert [r[1] for r in losses(tmp_path / "with")] == pytest.approx([r[1] for r in losses(tmp_path / "without")])


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


def test_signals_are_given_back(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(recipe(base, tmp_path / "run"), hooks=StopAt(monkeypatch, 2), console=QUIET)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


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
