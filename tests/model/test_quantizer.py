"""`from_pretrained(..., quantization_config=FastLoRANF4Config())`: NF4 while loading, without bitsandbytes."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.layers.nf4_linear import NF4Linear
from tests.support.models import SIZES, bnb_llama, llama, qwen2, randomize, tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.quantizers")
from_pretrained = transformers.AutoModelForCausalLM.from_pretrained


def tied():
    return llama(tie_word_embeddings=True)


def load(directory, model=None, **options):
    """A model of this folder, in which another may be saved first, with every tensor of the file accounted for."""
    if model is not None:
        model.save_pretrained(directory)
    loaded, info = from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    return loaded


def in_nf4(model):
    return {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}


@pytest.mark.parametrize("make", [llama, qwen2, tied])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_what_replace_linear_would_quantize(tmp_path, make, dtype):
    config = fastlora.FastLoRANF4Config()
    loaded = load(tmp_path, make(), quantization_config=config, dtype=dtype)
    expected = fastlora.replace_linear(from_pretrained(tmp_path, dtype=dtype), r=2, quantize="nf4")
    assert len(in_nf4(loaded)) == 14
    assert type(loaded.lm_head) is nn.Linear
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (make is tied)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)


def test_options(tmp_path):
    skipped = ["k_proj", "model.layers.1"]
    config = fastlora.FastLoRANF4Config(blocksize=128, double_quant=False, modules_to_not_convert=skipped)
    loaded = load(tmp_path, llama(), quantization_config=config)
    assert in_nf4(loaded) == {
        f"model.layers.0.{name}"
        for name in (
            "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
        )
    }  # fmt: skip
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert (weight.blocksize, weight.nested) == (128, False)
    again = load(tmp_path / "again", loaded)
    assert in_nf4(again) == in_nf4(loaded)
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)


@pytest.mark.parametrize("make", [llama, qwen2, tied])
def test_saved_and_loaded_again(tmp_path, make):
    """The config in the folder is enough; a second round writes the same bytes."""
    loaded = load(tmp_path / "dense", make(), quantization_config=fastlora.FastLoRANF4Config())
    again = load(tmp_path / "nf4", loaded)
    assert isinstance(again.hf_quantizer.quantization_config, fastlora.FastLoRANF4Config)
    assert again.is_quantized
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)
    again.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "model.safetensors" for name in ("nf4", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_the_file_has_the_tensors_of_bitsandbytes(tmp_path):
    load(tmp_path / "dense", llama(), quantization_config=fastlora.FastLoRANF4Config()).save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), bnb_llama().state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert {key for key in ours if key.startswith(name)} == {key for key in theirs if key.startswith(name)}
    assert torch.equal(ours[name], theirs[name].data)


def test_replace_linear_adopts_it_and_trainer_trains_it(tmp_path):
    pytest.importorskip("accelerate")
    loaded = load(tmp_path / "dense", llama(), quantization_config=fastlora.FastLoRANF4Config())
    codes = loaded.model.layers[0].mlp.down_proj.codes
    model = randomize(fastlora.replace_linear(loaded, r=4))
    assert model.model.layers[0].mlp.down_proj.base_layer.codes is codes
    assert sum(row.replaced and row.quantized for row in model.fastlora_report.rows) == 14
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens()] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_dequantize_gives_a_plain_model(tmp_path):
    loaded = load(tmp_path, llama(), quantization_config=fastlora.FastLoRANF4Config())
    expected = loaded(tokens()).logits
    plain = loaded.dequantize()
    assert not in_nf4(plain)
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocksize": 48}, "blocksize must be one of 32, 64"),
        ({"bnb_4bit_quant_type": "nf4"}, "no option 'bnb_4bit_quant_type'"),
        ({"modules_to_not_convert": "k_proj"}, r"must be a list of names: \['k_proj'\]"),
        ({"quant_method": "bitsandbytes"}, "not 'bitsandbytes'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastlora.FastLoRANF4Config(**options)


def test_what_cannot_be_loaded(tmp_path, caplog):
    model = llama()
    model.save_pretrained(tmp_path / "good")
    config = fastlora.FastLoRANF4Config()
    for entry in ("key_proj", "layers.1"):
        config.modules_to_not_convert = [entry]
        with pytest.raises(ValueError, match=f"'{entry}' matches no linear layer of LlamaForCausalLM"):
            load(tmp_path / "good", quantization_config=config)
    config.modules_to_not_convert = None
    several = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="must be on one device, not on cpu, disk"):
        load(tmp_path / "good", quantization_config=config, device_map=several)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(RuntimeError, match="look at the `CONVERSION` entries"):
        load(tmp_path / "bad", quantization_config=config)
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text
    assert "the weight holds nan at [3, 4]: repair the checkpoint first" in caplog.text


def test_bitsandbytes_is_not_needed(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails
    model = load(tmp_path, llama(num_hidden_layers=1), quantization_config=fastlora.FastLoRANF4Config())
    model = fastlora.replace_linear(model, r=4)
    model(tokens(), labels=tokens()).loss.backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 14
    with pytest.raises(ImportError):
        import bitsandbytes  # noqa: F401


def test_a_mixture_of_experts_keeps_its_experts(tmp_path, caplog):
    """They are 3-d parameters, which transformers merges from one weight an expert while loading."""
    options = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**SIZES, **options}))
    loaded = load(tmp_path / "dense", model, quantization_config=fastlora.FastLoRANF4Config())
    assert in_nf4(loaded) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert "not quantized: 2 expert weights are 3-d parameters" in caplog.text
    again = load(tmp_path / "nf4", loaded)
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)


@pytest.mark.parametrize("how", ["fastlora", "bitsandbytes"])
def test_a_merged_model_is_saved_as_a_plain_one(tmp_path, how):
    """No layer is quantized any more, and the config must not say so."""
    if how == "fastlora":
        config = fastlora.FastLoRANF4Config()
    else:
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = load(tmp_path / "dense", llama(), quantization_config=config)
    model = randomize(fastlora.replace_linear(loaded, r=4)).train()
    expected = model(tokens()).logits
    merged = fastlora.merge(model)
    assert not getattr(merged, "is_quantized", False)
    again = load(tmp_path / "merged", merged)
    assert {type(module).__name__ for module in again.modules() if "Linear" in type(module).__name__} == {"Linear"}
    torch.testing.assert_close(again(tokens()).logits, expected, rtol=1e-3, atol=1e-4)
