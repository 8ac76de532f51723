"""Adapters on disk: peft reads ours and we read peft's, refusals leave the model as it was, and merging."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.files import peft_files
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear
from tests.support.models import Own, bnb_llama, llama, logits, qwen2, randomize, snapshot

PREFIX = "base_model.model."


def adapted(base=llama, **options):
    return randomize(replace_linear(base(), **{"r": 4, "lora_alpha": 6, **options}))


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (llama, {}),
        (qwen2, {"use_rslora": True, "lora_dropout": 0.1}),
        (llama, {"target_modules": ["q_proj", "mlp.down_proj"]}),
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
        (qwen2, {"rank_pattern": {"k_proj": 2, r"layers\.1\..*q_proj": 3}, "alpha_pattern": {"up_proj": 40}}),
    ],
)
def test_peft_opens_what_we_save(base, options, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(base, **options).eval()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    layers = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert layers == {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    mine = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    others = {name.removeprefix(PREFIX): value for name, value in theirs.state_dict().items() if "lora_" in name}
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert isinstance(theirs, peft.PeftModelForCausalLM)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "lora_dropout": 0.1}])
@pytest.mark.parametrize("bare", [True, False])
def test_we_open_what_peft_saves(options, bare, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **options)
    theirs = randomize(peft.get_peft_model(llama(), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = llama()
    if not bare:
        # other scaling, dropout and values: the file decides
        rank_pattern = options.get("rank_pattern")
        replace_linear(model, r=4, lora_alpha=99, target_modules=["q_proj", "v_proj"], rank_pattern=rank_pattern)
    assert load_adapter(model, tmp_path) is model
    model.eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 8
    assert all("lora_" in name for name in trainable)


def test_round_trip_of_a_quantized_model(tmp_path):
    model = adapted(quantize="nf4", adapter_dtype=torch.float32)
    save_adapter(model, tmp_path)
    other = load_adapter(llama(), tmp_path, quantize="nf4")
    assert torch.equal(logits(other), logits(model))
    third = replace_linear(llama(), r=4, quantize="nf4")
    load_adapter(third, tmp_path)
    assert torch.equal(logits(third), logits(model))


def test_bitsandbytes_base(tmp_path):
    model = adapted(bnb_llama)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(bnb_llama(), tmp_path)), logits(model))


def test_how_an_adapter_was_initialized_matters_only_where_it_changed_the_base(tmp_path):
    model = adapted()
    for init in ("eva", "orthogonal", "gaussian"):
        save_adapter(model, tmp_path)
        change(config={"init_lora_weights": init, "eva_config": {"rho": 2.0} if init == "eva" else None})(tmp_path)
        assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))
    for init, message in (("pissa_niter_4", "the change was random"), ("loftq", "load it with quantize='nf4'")):
        change(config={"init_lora_weights": init})(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_adapter(llama(), tmp_path)
    change(config={"init_lora_weights": "olora"})(tmp_path)
    with pytest.raises(ValueError, match="load it into a model without adapters"):
        load_adapter(adapted(), tmp_path)


def test_wrappers_leave_no_trace_in_the_names(tmp_path):
    model = adapted()
    save_adapter(torch.compile(nn.DataParallel(model)), tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    save_adapter(model, tmp_path / "inner")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "inner" / name).read_bytes()
    other = torch.compile(replace_linear(llama(), r=4))
    assert load_adapter(other, tmp_path) is other
    assert torch.equal(logits(other._orig_mod), logits(model))


def test_names_that_end_alike_stay_apart(tmp_path):
    """`0` is the end of `a.0`, too: the saved targets must mean one of them."""
    peft = pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"0": nn.Linear(8, 8), "a": nn.ModuleDict({"0": nn.Linear(8, 8), "0_1": nn.Linear(8, 8)})})

    for pattern, rank in (("0", {}), (r"0|a\.0", {"^0": 3})):
        model = randomize(replace_linear(base(), r=2, target_modules=pattern, rank_pattern=rank))
        save_adapter(model, tmp_path)
        expected = {name: m.r["default"] for name, m in model.named_modules() if isinstance(m, LoRALinear)}
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path).base_model.model
        found = {n: m.r["default"] for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
        assert found == expected
        other = load_adapter(base(), tmp_path)
        assert {n: m.r["default"] for n, m in other.named_modules() if isinstance(m, LoRALinear)} == expected


def test_files_are_only_safetensors_and_json(tmp_path):
    save_adapter(adapted(), tmp_path / "deep" / "dir")
    assert sorted(p.name for p in (tmp_path / "deep" / "dir").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "deep" / "dir" / "adapter_model.safetensors")
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    config = json.loads((tmp_path / "deep" / "dir" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_adapter(where, tmp_path, monkeypatch):
    model = adapted()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.model.layers[0].mlp.up_proj.lora_B["default"].weight.data.add_(1)

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr({"save_file": peft_files, "fsync": os, "replace": Path}[where], where, crash)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter 'default'; it has none"):
        save_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"no adapter 'other'; it has \['default'\]"):
        save_adapter(adapted(), tmp_path, "other")
    assert not list(tmp_path.iterdir())


KEY = f"{PREFIX}model.layers.1.mlp.up_proj.lora_A.weight"


def change(tensors=None, config=None):
    """A function that edits a saved adapter."""

    def apply(directory):
        if tensors:
            path = directory / "adapter_model.safetensors"
            values = load_file(path)
            tensors(values)
            save_file(values, path)
        if config:
            path = directory / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    return apply


def truncate(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


FAULTS = {
    "truncated": (truncate, "adapter_model.safetensors is truncated or not a safetensors file"),
    "no file": (lambda d: (d / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors does not exist"),
    "pickle": (pickled, "adapter_model.bin is a pickle, which is not read"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"adapter_config\.json does not exist"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
    "foreign": (change(lambda t: t.update({"model.weight": torch.ones(2)})), "'model.weight': not a LoRA tensor"),
    "shape": (
        change(lambda t: t.update({KEY: torch.ones(4, 65)})),
        rf"{KEY} has shape \[4, 65\] in the file, \[4, 64\] in the model",
    ),
    "half a pair": (change(lambda t: t.pop(KEY)), "up_proj has only lora_B"),
    "not a matrix": (change(lambda t: t.update({KEY: torch.ones(4)})), r"must be a matrix of floats, not .* \[4\]"),
    "unknown module": (
        change(lambda t: t.update({f"{PREFIX}z.lora_{p}.weight": torch.ones(4, 4) for p in "AB"})),
        r"z\.lora_A\.weight is in the file, but the model has no",
    ),
    "other method": (change(config={"peft_type": "IA3"}), "the config is for 'IA3'"),
    "dora": (change(config={"use_dora": True}), "use_dora=True is not supported|lora_magnitude_vector is missing"),
    "empty": (change(lambda t: t.clear()), "the file holds no tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("bare", [True, False])
def test_a_file_that_does_not_fit_changes_nothing(fault, bare, tmp_path):
    save_adapter(adapted(), tmp_path)
    spoil, message = FAULTS[fault]
    spoil(tmp_path)
    model = llama() if bare else adapted()
    before, expected = snapshot(model), logits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


def test_a_file_that_lacks_a_module_is_refused(tmp_path):
    save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
    with pytest.raises(ValueError, match=r"k_proj\.lora_A\.weight is missing from the file"):
        load_adapter(adapted(target_modules=["q_proj", "k_proj"]), tmp_path)
    with pytest.raises(ValueError, match="quantize is for a model without adapters"):
        load_adapter(adapted(target_modules=["q_proj"]), tmp_path, quantize="nf4")


def test_a_layer_that_cannot_be_replaced_is_named(tmp_path):
    save_adapter(randomize(replace_linear(nn.Sequential(nn.Linear(8, 8)), r=2)), tmp_path)
    with pytest.raises(ValueError, match=r"0\.lora_A\.weight is in the file, but 0: Own has a forward of its own"):
        load_adapter(nn.Sequential(Own(8, 8)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge(dtype, quantize):
    model = adapted(lambda: qwen2().to(dtype), quantize=quantize).eval()
    expected = logits(model)
    assert merge(model) is model
    assert not any(isinstance(module, (LoRALinear, NF4Linear)) for module in model.modules())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert list(model.state_dict()) == list(qwen2().state_dict())
    assert not hasattr(model, "fastlora_report")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(logits(model), expected, **tolerance)
    with pytest.raises(ValueError, match="no fastlora layers to merge"):
        merge(model)
    replace_linear(model, r=2)  # a merged model is a plain one again


def test_merge_equals_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).merge_and_unload()
    for name, value in merge(model).state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_merge_of_a_bitsandbytes_base_and_of_layers_without_adapter():
    model = adapted(bnb_llama).train()
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=1e-4, atol=1e-5)
    model = adapted(quantize="nf4", target_modules=["q_proj"])
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model, torch.float32)), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


def test_merge_of_a_tied_head_leaves_the_embedding():
    model = adapted(lambda: llama(tie_word_embeddings=True), target_modules=["lm_head"]).eval()
    embedding, expected = model.model.embed_tokens.weight.detach().clone(), logits(model)
    with pytest.warns(UserWarning, match="lm_head shared its weight with another module"):
        merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_carries_pefts_layers(tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        config = peft.LoraConfig(r=4, target_modules=["q_proj"])
        return randomize(peft.get_peft_model(llama(), config)).eval()

    model = replace_linear(make())
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(model))
    other = make()
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert torch.equal(logits(load_adapter(replace_linear(other), tmp_path)), logits(model))
    load_adapter(other, tmp_path, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    save_adapter(other, tmp_path / "second", "second")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "second"))
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    torch.testing.assert_close(logits(merge(model)), logits(other), rtol=1e-4, atol=1e-5)


def test_pefts_layers_refuse_files_that_do_not_fit(tmp_path):
    peft = pytest.importorskip("peft")
    model = randomize(peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])))
    expected = logits(model)
    good = tmp_path / "good"
    save_adapter(model, good)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    faults = [
        (change(lambda t: t.update({key: torch.ones(4, 65)})), r"has shape \[4, 65\] in the file, \[4, 64\]"),
        (change(lambda t: t.pop(key)), f"{key} is missing from the file"),
        (change(config={"lora_alpha": 7}), "lora_alpha is 7 in the file, 6 in the model"),
        (truncate, "truncated"),
    ]
    for number, (spoil, message) in enumerate(faults):
        bad = shutil.copytree(good, tmp_path / str(number))
        spoil(bad)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, bad)
        assert torch.equal(logits(model), expected)
    bad = shutil.copytree(good, tmp_path / "new")
    faults[0][0](bad)
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter(model, bad, "new")
    assert snapshot(model) == before


def test_injected_adapters_are_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = randomize(peft.inject_adapter_in_model(config, llama()))
    save_adapter(replace_linear(model), tmp_path)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(model))
    other = peft.inject_adapter_in_model(config, llama())
    assert torch.equal(logits(load_adapter(replace_linear(other), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="this model had adapters injected"):
        merge(model)
