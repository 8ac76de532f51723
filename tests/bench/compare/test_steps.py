"""`bench steps`: what is compared is what users of peft get, on the same weights, and what is wrong is not timed."""

import csv
import gc
from types import SimpleNamespace

import pytest
import torch

from bench.cli import main
from bench.compare import steps
from fastlora import NF4Weight
from fastlora.training import graphed_step

pytest.importorskip("peft")
pytest.importorskip("transformers")


def run(tmp_path, capsys, *options):
    out = tmp_path / "steps.csv"
    status = main(["steps", "--device", "cpu", "--quick", "--tokens", "24", "--out", str(out), *options])
    rows = list(csv.DictReader(out.open())) if out.exists() else []
    return status, rows, capsys.readouterr().out


def bench(base, checkpointing=True):
    return steps.Bench(steps.Case("qwen3-8b-4", base, 24), torch.device("cpu"), True, checkpointing)


def changed(monkeypatch, provider, change):
    """Every model of this provider is changed after it was built."""
    build = steps.Bench._model

    def model(self, name):
        built = build(self, name)
        if name == provider:
            change(built)
        return built

    monkeypatch.setattr(steps.Bench, "_model", model)


def layers(model):
    return {steps.plain_name(name): part for name, part in model.named_modules() if hasattr(part, "lora_A")}


def test_over_nf4_peft_runs_its_own_4_bit_layers_on_the_same_codes_and_adapters():
    pytest.importorskip("bitsandbytes")
    models = {name: layers(bench("nf4")._model(name)) for name in ("exact", *steps.PROVIDERS)}
    kinds = {name: {type(layer).__qualname__ for layer in found.values()} for name, found in models.items()}
    assert kinds["peft"] == {"Linear4bit"}
    assert kinds["peft-sped-up"] == {"SpedUpLinear4bit"}
    for name, ours in models["fastlora"].items():
        packed = ours.base_layer.weight
        assert torch.equal(models["exact"][name].base_layer.weight, packed.dequantize(torch.float32))
        for provider in ("peft", "peft-sped-up"):
            theirs = models[provider][name]
            same = NF4Weight.from_bnb(theirs.base_layer.weight).tensors()
            assert all(torch.equal(a, b) for a, b in zip(packed.tensors(), same, strict=True))
            for part in ("lora_A", "lora_B"):
                a, b = (getattr(layer, part)["default"].weight for layer in (ours, theirs))
                assert a.dtype == b.dtype == torch.float32
                assert torch.equal(a, b)


def test_an_update_that_is_a_tenth_too_large_is_not_timed(tmp_path, capsys, monkeypatch):
    def larger(model):
        for layer in layers(model).values():
            layer.scaling["default"] *= 1.1

    changed(monkeypatch, "peft-sped-up", larger)
    options = ("--models", "qwen3-8b-4", "--bases", "bf16", "--providers", "peft", "peft-sped-up")
    status, rows, shown = run(tmp_path, capsys, *options)
    assert status == 1
    assert "WRONG, not timed: qwen3-8b-4 bf16 24 tokens peft-sped-up is" in shown
    assert {row["provider"] for row in rows} == {"peft"}


def test_the_first_provider_is_judged_too(tmp_path, capsys, monkeypatch):
    def broken(model):
        for layer in layers(model).values():
            layer.scaling["default"] *= 2

    changed(monkeypatch, "peft", broken)
    status, rows, shown = run(tmp_path, capsys, "--models", "qwen3-8b-4", "--bases", "bf16", "--providers", "peft")
    assert (status, rows) == (1, [])
    assert "15.00% are allowed" in shown


def test_layers_that_step_back_to_peft_are_not_timed(tmp_path, capsys, monkeypatch):
    def stepped_back(model):
        calls = next(iter(layers(model).values())).fastlora_calls
        calls.stepped_back, calls.last_reason = 1, "a reason"

    changed(monkeypatch, "peft-sped-up", stepped_back)
    status, rows, shown = run(tmp_path, capsys, "--models", "qwen3-8b-4", "--bases", "bf16")
    assert status == 1
    assert "peft-sped-up is peft itself: 1 layers step back, a reason" in shown
    assert {row["provider"] for row in rows} == set(steps.PROVIDERS) - {"peft-sped-up", "graphed"}


def test_one_that_fails_while_timed_is_named_and_the_others_have_rows(tmp_path, capsys, monkeypatch):
    times = steps.Bench._time

    def failing(self, runner):
        if runner is self.runners.get("peft"):
            raise RuntimeError("out of memory")
        return times(self, runner)

    monkeypatch.setattr(steps.Bench, "_time", lambda self, runner: failing(self, runner))
    monkeypatch.setattr(steps, "ROUNDS", 1)
    monkeypatch.setattr(steps, "WARM_UP", 0)
    status, rows, shown = run(tmp_path, capsys, "--models", "qwen3-8b-4", "--bases", "bf16")
    assert status == 1
    assert "peft left out: RuntimeError: out of memory" in shown
    assert {row["provider"] for row in rows} == set(steps.PROVIDERS) - {"peft", "graphed"}
    assert gc.get_freeze_count() == 0


def test_nf4_comes_first_and_each_line_is_printed_again_in_the_end(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    _, rows, shown = run(tmp_path, capsys, "--providers", "fastlora", "--no-checkpointing")
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    assert kernels == [f"step_{model}-kept_{base}" for base in ("nf4", "bf16") for model in steps.MODELS]
    assert shown.count(steps.HEADING) == 2
    assert shown.count("qwen3-8b-4 nf4 24 tokens fastlora") == 2


def test_what_only_a_gpu_gives_has_rows_and_cells(monkeypatch):
    one = bench("bf16")
    one.admit("fastlora")
    kernels = {"a": (2, 1500.0), "b": (1, 500.0)}
    monkeypatch.setattr(one, "_profile", lambda runner: kernels)
    one.device, one.peaks = SimpleNamespace(type="cuda"), {"fastlora": 3_000_000}
    rows = one._on_device("fastlora")
    found = {(row.mode, row.metric): row.p50 for row in rows}
    assert found == {
        ("kernels", "time"): 2.0,
        ("step", "launches"): 3,
        ("step", "peak_memory"): 3.0,
        ("model", "peak_memory"): 0.0,
    }
    cells = one._line("fastlora", [*one._times("fastlora", [0.024], [0.012]), *rows], None).split()
    assert cells[-9:-1] == ["24.0", "12.0", "2.0", "3", "1000", "3", "0", "-"]


@pytest.mark.parametrize("tokens", ["0", "3000"])
def test_tokens_that_are_no_whole_samples_are_refused(tokens, capsys):
    with pytest.raises(SystemExit):
        main(["steps", "--device", "cpu", "--quick", "--tokens", tokens])
    assert "a multiple of it" in capsys.readouterr().err


def test_long_steps_are_timed_in_fewer_rounds(monkeypatch):
    one = bench("bf16")
    one.admit("fastlora")
    calls = []
    monkeypatch.setattr(one, "_time", lambda runner: calls.append(runner) or (1.0, 1.0))
    for limit, rounds in ((60.0, steps.ROUNDS), (0.0, steps.LEAST_ROUNDS)):
        monkeypatch.setattr(steps, "ROUNDS_S", limit)
        calls.clear()
        list(one.measure())
        assert len(calls) == steps.WARM_UP + rounds


@pytest.mark.parametrize("model", steps.MODELS)
def test_a_graph_takes_the_step_too(model, tmp_path, capsys, monkeypatch):
    class Rerun:
        def replay(self):
            self.step()

    def recorded(step, pool):
        graph = Rerun()
        graph.step = step
        return graph, step(), pool

    monkeypatch.setattr(graphed_step, "_recorded", recorded)
    monkeypatch.setattr(graphed_step, "obstacle", lambda model: "")
    monkeypatch.setattr(steps, "_absent", lambda *case: "")
    status, rows, shown = run(
        tmp_path, capsys, "--models", model, "--bases", "bf16", "--providers", "fastlora", "graphed"
    )
    assert status == 0, shown
    assert {row["provider"] for row in rows} == {"fastlora", "graphed"}


def test_every_provider_takes_the_step_of_peft(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    status, rows, shown = run(tmp_path, capsys)
    assert status == 0, shown
    timed = {(row["kernel"], row["provider"]) for row in rows if row["metric"] == "time"}
    kernels = {f"step_{model}_{base}" for model in steps.MODELS for base in ("nf4", "bf16")}
    assert timed == {(kernel, provider) for kernel in kernels for provider in set(steps.PROVIDERS) - {"graphed"}}
    for row in rows:
        if row["metric"] == "host":
            assert float(row["p50"]) > 0
    assert len(rows) == 3 * len(timed)  # time, host, tokens a second


def test_a_step_that_is_off_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "CLOSE", 1e-9)
    options = ("--models", "qwen3-8b-4", "--bases", "bf16", "--providers", "peft", "fastlora")
    status, rows, shown = run(tmp_path, capsys, *options)
    assert status == 1
    assert "WRONG, not timed: qwen3-8b-4 bf16 24 tokens fastlora is" in shown
    assert {row["provider"] for row in rows} == {"peft"}


def test_a_provider_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    model = steps.Bench._model

    def failing(self, provider):
        if provider == "peft":
            raise RuntimeError("out of memory")
        return model(self, provider)

    monkeypatch.setattr(steps.Bench, "_model", failing)
    options = ("--models", "qwen3-0.6b", "--bases", "bf16", "--no-checkpointing")
    status, rows, shown = run(tmp_path, capsys, *options)
    assert status == 1
    assert "peft left out: " in shown
    assert "out of memory" in shown
    assert {row["provider"] for row in rows} == set(steps.PROVIDERS) - {"peft", "graphed"}


def test_nothing_begins_after_the_limit(tmp_path, capsys):
    status, rows, shown = run(tmp_path, capsys, "--limit", "-1")
    assert (status, rows) == (0, [])
    assert "stopped at the limit before qwen3-8b-4 nf4 24 tokens" in shown
