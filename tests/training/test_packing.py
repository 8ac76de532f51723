"""Micro-batches in one row: each example is what it is alone, and a run what it is with padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastlora
from fastlora.training import data, packing
from fastlora.training.loop import _batch, target_loss, train
from fastlora.training.run import prepare
from tests.support.models import SIZES, llama, transformers
from tests.support.runs import QUIET, losses, recipe

LENGTHS = (5, 1, 9, 3)


def examples_of(lengths=LENGTHS) -> data.TokenSet:
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 60, sum(lengths)).astype(np.int32)
    labels = np.where(generator.random(len(tokens)) < 0.3, data.IGNORED, tokens).astype(np.int32)
    return data.TokenSet(tokens, labels, np.cumsum([0, *lengths]))


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}


def model_of(name="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_a_row_holds_all_examples_and_nothing_else():
    examples = examples_of()
    batch = packing.pack(examples, [2, 0, 1], 63)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, 16)
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 9, 14, 15, 16]
    assert batch["max_length_q"] == batch["max_length_k"] == 9
    assert batch["position_ids"].tolist() == [[*range(9), *range(5), 0, 0]]
    tokens, offsets = examples.tokens.tolist(), examples.offsets
    rows = [tokens[offsets[row] : offsets[row + 1]] for row in (2, 0, 1)]
    assert batch["input_ids"].tolist() == [[*rows[0], *rows[1], *rows[2], 63]]
    labels = examples.labels.tolist()
    assert batch["labels"][0, 9:14].tolist() == [data.IGNORED, *labels[1:5]]
    assert batch["labels"][0, 14:].tolist() == [data.IGNORED] * 2
    padded = data.collate(examples, [2, 0, 1], 63)
    assert data.count_targets(batch) == data.count_targets(padded)
    ids, places = batch["labels"][0], data.before_targets(batch["labels"])
    wanted, there = padded["labels"].flatten(), data.before_targets(padded["labels"])
    assert ids[places + 1].tolist() == wanted[there + 1].tolist()


def test_a_row_that_needs_no_filling():
    batch = packing.pack(examples_of((8, 8)), [0, 1], 0)
    assert batch["cu_seq_lens_q"].tolist() == [0, 8, 16]


def test_rows_of_few_shapes():
    room = packing.Room(6, 9)
    shapes = set()
    for lengths in ((5, 1, 9, 3), (9, 9, 9, 9, 9, 9), (1,), (2, 2, 2, 2, 2, 2), (8, 8, 8, 8), (9,) * 6):
        examples = examples_of(lengths)
        rows = list(range(len(lengths)))
        batch, plain = packing.pack(examples, rows, 63, room), packing.pack(examples, rows, 63)
        begins = batch["cu_seq_lens_q"]
        assert begins.diff().min() >= 0
        assert begins.diff().max() <= batch["max_length_q"] == 9
        assert begins[-1] == batch["input_ids"].shape[1]
        tokens = sum(lengths)
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(batch[name][0, :tokens], plain[name][0, :tokens])
        assert (batch["labels"][0, tokens:] == data.IGNORED).all()
        shapes.add(tuple((name, getattr(value, "shape", value)) for name, value in batch.items()))
    assert len(shapes) == 1
    sizes = {packing._unit(tokens) * -(-tokens // packing._unit(tokens)) for tokens in range(1, 8193)}
    assert sorted(sizes) == [
        64,
        128,
        192,
        256,
        *(octave * part // 4 for octave in (256, 512, 1024, 2048, 4096) for part in (5, 6, 7, 8)),
    ]


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen2", "Qwen3", "Gemma", "Phi3", "Mistral", "GPTNeoX", "Olmo2", "Cohere", "Mixtral"]
)
def test_an_example_is_to_the_bit_what_it_is_alone(name):
    model = model_of(name, **{"Phi3": {"pad_token_id": 0}, "Mixtral": {"num_local_experts": 2}}.get(name, {}))
    examples = examples_of((8, 16, 24))
    assert packing.prepare(model, 1024) == ""
    with torch.no_grad(), packing.packed():
        found = model(**inputs(packing.pack(examples, [0, 1, 2], 0))).logits[0].split([8, 16, 24])
    with torch.no_grad():
        for row in range(3):
            alone = model(**inputs(packing.pack(examples, [row], 0)) | {"cu_seq_lens_q": None}).logits[0]
            assert torch.equal(found[row], alone) or name == "Mixtral"  # whose experts' products have other sizes
            torch.testing.assert_close(found[row], alone)


def test_loss_and_gradients_are_those_of_the_padded_batch():
    model = fastlora.replace_linear(llama(), r=4)
    examples, found = examples_of(), []
    for row in (False, True):
        if row:
            assert packing.prepare(model, 1024) == ""
        for checkpointing in (None, {}, {"context_fn": fastlora.keep_linears}):
            model.train().zero_grad()
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": False, **checkpointing})
                model.enable_input_require_grads()
            batch = (packing.pack if row else data.collate)(examples, [0, 1, 2, 3], 0)
            with packing.packed():
                logits = model(**inputs(batch)).logits.flatten(0, 1)
            places = data.before_targets(batch["labels"])
            loss = torch.nn.functional.cross_entropy(logits[places], batch["labels"].flatten()[places + 1])
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            model.gradient_checkpointing_disable()
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want)


def test_other_calls_of_the_model_are_as_before():
    model = model_of()
    ids = torch.randint(0, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=4)
    positions = torch.arange(9).remainder(5).expand(2, -1)
    apart = model(ids, position_ids=positions, use_cache=False).logits
    assert packing.prepare(model, 1024) == ""
    assert model.config._attn_implementation == packing.NAME
    found = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=4)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(model(ids, position_ids=positions, use_cache=False).logits, apart)


@pytest.mark.parametrize(
    ("name", "options", "longest", "reason"),
    [
        ("Llama", {"attn_implementation": "eager"}, 64, "its attention is eager"),
        ("Mistral", {"sliding_window": 32}, 64, "reaches 32 tokens"),
        ("Mamba", {"state_size": 4}, 64, "its attention is|see each other|could not be tried"),
        ("Bloom", {"n_head": 4}, 64, "its attention is|could not be tried|see each other|off in one row"),
    ],
)
def test_models_that_cannot_are_left_as_they_were(name, options, longest, reason):
    model = model_of(name, **options)
    own = model.config._attn_implementation
    assert torch.tensor([part in packing.prepare(model, longest) for part in reason.split("|")]).any()
    assert model.config._attn_implementation == own


class Leaks(transformers.models.llama.modeling_llama.LlamaMLP):
    """Mixes each token with the one before."""

    def forward(self, x):
        return super().forward(x + 0.1 * x.roll(1, 1))


class Counts(transformers.models.llama.modeling_llama.LlamaMLP):
    """Adds the place in the row."""

    def forward(self, x):
        return super().forward(x + torch.arange(x.shape[1])[:, None] * 0.3)


@pytest.mark.parametrize(("kind", "reason"), [(Leaks, "see each other"), (Counts, "off in one row with another")])
def test_the_trial_finds_what_no_name_tells(kind, reason):
    model = model_of()
    model.model.layers[0].mlp.__class__ = kind
    assert reason in packing.prepare(model, 64)
    assert model.config._attn_implementation == "sdpa"


def test_a_window_as_wide_as_the_longest_example_is_none():
    assert packing.prepare(model_of("Mistral", sliding_window=64), 64) == ""


def test_a_run_without_padding_is_the_run_with_it(base: Path, tmp_path: Path) -> None:
    for name, free in (("free", None), ("padded", False)):
        train(recipe(base, tmp_path / name, padding_free=free, gradient_accumulation_steps=2), console=QUIET)
    free, padded = ([loss for _, loss in losses(tmp_path / name)] for name in ("free", "padded"))
    assert free == pytest.approx(padded, rel=1e-5)


def test_no_token_is_computed_for_padding(base: Path, tmp_path: Path) -> None:
    run = prepare(recipe(base, tmp_path), QUIET)
    assert run.padding_free
    rows = list(range(len(run.train_set)))
    batch = _batch(run, run.train_set, rows)
    tokens = int(run.train_set.lengths.sum())
    assert batch["input_ids"].shape == (1, -(-tokens // 8) * 8)
    assert target_loss(run, run.model, batch).isfinite()


def test_a_run_that_cannot_says_so(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(packing, "prepare", lambda model, longest: "its attention is strange")
    with pytest.raises(ValueError, match="padding_free: its attention is strange; set it to null or false"):
        prepare(recipe(base, tmp_path, padding_free=True), QUIET)
    from rich.console import Console

    console = Console(width=200)
    assert not prepare(recipe(base, tmp_path), console).padding_free
    assert "batches are padded, for in one row without padding: its attention is strange" in capsys.readouterr().out


@pytest.mark.parametrize("speed_up", [True, False])
def test_a_run_that_is_recorded_is_the_run_that_is_not(base: Path, tmp_path: Path, speed_up, monkeypatch) -> None:
    from fastlora.training import graphed_step, loop
    from fastlora.training import run as runs
    from tests.training.test_graphed_step import Rerun

    kinds = []

    def record(step, pool):
        model = kinds[0]
        kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        found = step()
        for p, gradient in kept.items():
            p.grad.copy_(gradient)
        kinds.append(step)
        return Rerun(step, found), found, "pool"

    class Seen(loop.Hooks):
        def on_start(self, run):
            kinds.append(run.model)
            self.run = run

    options = {"speed_up": speed_up, "gradient_accumulation_steps": 2, "max_steps": 12, "eval_on_start": True}
    options["eval_file"] = str(base / "train.jsonl")
    train(recipe(base, tmp_path / "usual", **options), console=QUIET)
    for place in (graphed_step, runs):
        monkeypatch.setattr(place, "obstacle", lambda model: "")
    monkeypatch.setattr(graphed_step, "_recorded", record)
    seen = Seen()
    train(recipe(base, tmp_path / "recorded", cuda_graphs=True, **options), hooks=seen, console=QUIET)
    usual, recorded = ([loss for _, loss in losses(tmp_path / name)] for name in ("usual", "recorded"))
    assert seen.run.graphed.replayed > 0
    assert recorded == pytest.approx(usual, rel=1e-5)


def test_what_cannot_be_recorded_is_told(base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(ValueError, match="cuda_graphs: the model is not on a CUDA device; set it to false"):
        prepare(recipe(base, tmp_path, cuda_graphs=True), QUIET)
    with pytest.raises(ValueError, match="cuda_graphs: needs padding_free"):
        recipe(base, tmp_path, cuda_graphs=True, padding_free=False)
    from rich.console import Console

    from fastlora.training import graphed_step
    from fastlora.training import run as runs

    for place in (graphed_step, runs):
        monkeypatch.setattr(place, "obstacle", lambda model: "")
    monkeypatch.setattr(graphed_step, "_recorded", lambda step, pool: 1 / 0)
    train(recipe(base, tmp_path / "run", cuda_graphs=True, max_steps=12), console=Console(width=200))
    told = capsys.readouterr().out
    assert told.count("cuda_graphs: steps run as usual, not recorded: ZeroDivisionError") == 1
