"""Getting a run ready: what is refused, in which words, before what; and how the base is loaded."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from fastlora.layers.nf4_linear import NF4Linear
from fastlora.methods import lora as methods_lora
from fastlora.training import run as runs
from fastlora.training.loop import train
from fastlora.training.run import prepare
from tests.support.runs import QUIET, WORDS, losses, recipe


def refused(made: Any, *words: str) -> None:
    """`prepare` refuses it on one short line that names the key and holds these words."""
    with pytest.raises(ValueError, match=r"^model_name_or_path: ") as error:
        prepare(made, QUIET)
    said = str(error.value)
    assert [word for word in words if word not in said] == [], said
    assert len(said.splitlines()) == 1
    assert len(said) < 700


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def as_pickle(folder: Path, content: bytes | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    if content is not None:
        (folder / "pytorch_model.bin").write_bytes(content)


def without(folder: Path, part: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert kept.keys() < tensors.keys()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configured(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "header": (lambda p: cut(p / "model.safetensors", 99), ("the model's weights", "header")),
    "short": (lambda p: cut(p / "model.safetensors", -99), ("the model's weights", "incomplete")),
    "empty": (lambda p: cut(p / "model.safetensors", 0), ("the model's weights",)),
    "pickle": (lambda p: (p / "model.safetensors").write_bytes(pickle.dumps([1])), ("copy the files again",)),
    "code": (lambda p: as_pickle(p, pickle.dumps(print)), ("a pickle of more than tensors", "safetensors")),
    "short pickle": (lambda p: (as_pickle(p), cut(p / "pytorch_model.bin", -99)), ("the model's weights",)),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ("the model's weights", "no file named")),
    "shape": (lambda p: configured(p, intermediate_size=64), ("[64, 128]", "[64, 64]")),
    "layer": (lambda p: without(p, "layers.1.mlp"), ("lacks 3 of the weights", "model.layers.1.mlp.down_proj.weight")),
    "norm": (lambda p: without(p, "model.norm"), ("lacks 1 of the weights", "model.norm.weight")),
    "more layers": (lambda p: configured(p, num_hidden_layers=3), ("lacks 9 of the weights", "model.layers.2.")),
    "no config": (lambda p: (p / "config.json").unlink(), ("config.json",)),
    "config": (lambda p: cut(p / "config.json", 20), ("config.json",)),
    "config list": (lambda p: (p / "config.json").write_text("[]"), ("config.json",)),
    "no tokenizer": (lambda p: [f.unlink() for f in p.glob("token*")], ("a tokenizer", "put the base model's")),
    "tokenizer": (lambda p: cut(p / "tokenizer.json", 20), ("a tokenizer", "put the base model's")),
}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_one_line(base: Path, tmp_path: Path, damage: str, quantize: str | None) -> None:
    shutil.copytree(base, tmp_path / "model")
    harm, words = DAMAGES[damage]
    harm(tmp_path / "model")
    made = recipe(base, tmp_path / "run", model_name_or_path=str(tmp_path / "model"), quantize=quantize)
    refused(made, *words)


@pytest.mark.parametrize("name", ["/none/such", "a b/c/d", "a" * 5000])
def test_a_model_that_is_nowhere(base: Path, tmp_path: Path, name: str) -> None:
    refused(recipe(base, tmp_path / "run", model_name_or_path=name), "cannot load")


def test_an_adapter_is_no_model(base: Path, tmp_path: Path) -> None:
    train(recipe(base, tmp_path / "adapter", max_steps=1), console=QUIET)
    made = recipe(base, tmp_path / "run", model_name_or_path=str(tmp_path / "adapter"))
    refused(made, "cannot load the model's config.json", "it is an adapter: give its base model")
    shutil.copytree(base, tmp_path / "adapter", dirs_exist_ok=True)
    for quantize in (None, "nf4"):
        refused(made.replace(quantize=quantize), "holds an adapter next to a model", "or merge the two")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "gemma", "qwen2"])
def test_a_tokenizer_that_transformers_makes_from_nothing(base: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    made = recipe(base, tmp_path / "run", model_name_or_path=str(tmp_path))
    refused(made, "cannot load a tokenizer", "its vocabulary is empty", "put the base model's")


def test_a_pickled_model_of_tensors_alone_is_read(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    as_pickle(tmp_path / "model")
    for name in (tmp_path / "model", base):
        train(recipe(base, tmp_path / f"of {name.name}", model_name_or_path=str(name)), console=QUIET)
    assert losses(tmp_path / "of model") == losses(tmp_path / f"of {base.name}")


def test_a_model_that_sees_later_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = BertConfig(
        vocab_size=WORDS + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    made = recipe(base, tmp_path / "run", model_name_or_path=str(tmp_path / "bert"))
    refused(made, "not a causal language model", "BertLMHeadModel")
    configured(tmp_path / "bert", is_decoder=True)
    assert prepare(made, QUIET).model.training is False


TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "ctrl": {"n_embd": 32, "n_layer": 1, "n_head": 2, "dff": 32},  # scales its embeddings in place
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32},  # has the batch on the second axis
    "rwkv": {"attention_hidden_size": 32, "num_hidden_layers": 2},
    "mamba": {"state_size": 4},
    **{key: {"num_key_value_heads": 1, "head_dim": 16} for key in ("gemma", "qwen3_moe")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        *((kind, True) for kind in ("llama", "gemma", "qwen3_moe", "gpt2", "ctrl", "mamba", "rwkv")),
        *((kind, False) for kind in ("bert", "roberta", "electra", "xlnet")),
    ],
)
def test_who_sees_later_tokens(base: Path, tmp_path: Path, kind: str, causal: bool, dtype: torch.dtype) -> None:
    named = {} if kind in ("ctrl", "gpt2", "xlnet") else TINY
    config = AutoConfig.for_model(kind, vocab_size=64, pad_token_id=0, **{**named, **OTHER_NAMES.get(kind, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    made = recipe(base, tmp_path / "run")
    if causal:
        runs.check_causal(model, made)
    else:
        with pytest.raises(ValueError, match=f"not a causal language model: as a {type(model).__name__} it sees"):
            runs.check_causal(model, made)


def test_data_are_checked_before_the_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "load_base", None)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "w1 " * 100}))
    good = str(base / "train.jsonl")
    cases = [
        ({"train_file": str(tmp_path / "bad.jsonl")}, "bad.jsonl:1: "),
        ({"train_file": good, "eval_file": str(tmp_path / "bad.jsonl")}, "bad.jsonl:1: "),
        ({"train_file": str(tmp_path / "long.jsonl")}, "training data reach 101 tokens, the model 64"),
        ({"train_file": None, "dataset_name": str(tmp_path / "none")}, "dataset_name: cannot load"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(recipe(base, tmp_path / "run", **values), QUIET)


def test_too_little_room_is_told_before_the_first_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(ValueError, match=r"output_dir: .*/run has room for 0.1 MB, and .* take 0.1 MB: make room"):
        train(recipe(base, tmp_path / "run", save_steps=2), console=QUIET)
    train(recipe(base, tmp_path / "run", save_steps=None, max_steps=1), console=QUIET)


@pytest.mark.parametrize("exclude", [None, ["q_proj", "layers.1.mlp.up_proj"], r".*layers\.1\..*"])
def test_weights_become_nf4_as_they_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exclude: Any
) -> None:
    """The same layers and the same losses as when the whole model is loaded first and quantized then."""
    real, read, quantized = methods_lora.replace_linear, {}, {}

    def spied(model: nn.Module, **options: Any) -> nn.Module:
        read[name] = {key for key, module in model.named_modules() if isinstance(module, NF4Linear)}
        real(model, **options)
        quantized[name] = {
            key.removesuffix(".base_layer") for key, module in model.named_modules() if isinstance(module, NF4Linear)
        }
        return model

    monkeypatch.setattr(methods_lora, "replace_linear", spied)
    made = {"quantize": "nf4", "exclude_modules": exclude, "max_steps": 3}
    name = "read"
    train(recipe(base, tmp_path / name, **made), console=QUIET)
    name = "whole"
    monkeypatch.setattr(runs, "_into_nf4", lambda recipe, plain, device: {})
    train(recipe(base, tmp_path / name, **made), console=QUIET)
    assert len(read["read"]) == {None: 14, list: 11, str: 7}[exclude and type(exclude)]
    assert read["read"] == quantized["read"] == quantized["whole"]
    assert read["whole"] == set()
    assert losses(tmp_path / "read") == losses(tmp_path / "whole")


def test_layers_that_are_no_linear_become_nf4_after_loading(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS + 1, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    made = recipe(base, tmp_path / "run", model_name_or_path=str(tmp_path / "gpt2"), quantize="nf4")
    model = prepare(made, QUIET).model
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 4
