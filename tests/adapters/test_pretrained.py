"""A model that `replace_linear` has adapted behaves for transformers as one that carries an adapter."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import extract_adapter, load_adapter, merge, replace_linear
from fastlora.adapters import pretrained
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from tests.support.models import llama, logits, randomize, snapshot, trained

transformers = pytest.importorskip("transformers")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
OPTIONS = [
    {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    {"target_modules": "all-linear", "quantize": "nf4", "use_rslora": True},
    {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    {"target_modules": ["v_proj"], "init_lora_weights": "olora", "quantize": "nf4"},
]


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def saved_base(tmp_path):
    """The folder of a plain model."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def run(folder, options, steps, resume=None, tie=False, best=False):
    """A model after so many steps of Trainer, which saves at the third."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (12, 9))]
    torch.manual_seed(3)
    model = replace_linear(llama(tie_word_embeddings=tie), r=4, **options)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=3, eval_strategy="steps", eval_steps=3,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
        load_best_model_at_end=best,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return model


def parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_trainer_resumes_bit_for_bit_and_takes_the_best(options, tie, tmp_path):
    torch.manual_seed(0)
    undisturbed = run(tmp_path / "a", options, 6, tie=tie)
    torch.manual_seed(0)
    run(tmp_path / "b", options, 3, tie=tie)
    assert names(tmp_path / "b" / "checkpoint-3") & {*ADAPTER, "model.safetensors"} == ADAPTER
    torch.manual_seed(0)
    resumed = run(tmp_path / "b", options, 6, tmp_path / "b" / "checkpoint-3", tie=tie)
    expected = parameters(undisturbed)
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    torch.manual_seed(0)
    model = run(tmp_path / "c", options, 6, tie=tie, best=True)
    best = load_adapter(replace_linear_again(options, tie), tmp_path / "c" / best_of(tmp_path / "c"))
    for name, parameter in parameters(best).items():
        assert torch.equal(parameter, parameters(model)[name]), name


def replace_linear_again(options, tie):
    torch.manual_seed(3)
    return replace_linear(llama(tie_word_embeddings=tie), r=4, **options)


def best_of(folder):
    state = transformers.TrainerState.load_from_json(folder / "checkpoint-6" / "trainer_state.json")
    return Path(state.best_model_checkpoint).name


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[2], OPTIONS[3]])
def test_from_pretrained_of_what_was_saved(options, saved_base, tmp_path):
    pytest.importorskip("peft")
    model = trained(randomize(replace_linear(loaded(saved_base), r=4, **options)), steps=1).eval()
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") - {"generation_config.json"} == ADAPTER
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load_adapter(loaded(saved_base), tmp_path / "out")), logits(model))
    expected = logits(model)
    merge(model).save_pretrained(tmp_path / "whole")
    assert "model.safetensors" in names(tmp_path / "whole")
    torch.testing.assert_close(logits(loaded(tmp_path / "whole")), expected, rtol=1e-4, atol=1e-5)


def test_from_pretrained_over_nf4(saved_base, tmp_path):
    pytest.importorskip("peft")
    options = {"quantization_config": fastlora.FastLoRANF4Config()}
    model = randomize(replace_linear(loaded(saved_base, **options), r=4))
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") - {"generation_config.json"} == ADAPTER
    again = loaded(tmp_path / "out", quantization_config=fastlora.FastLoRANF4Config())
    assert isinstance(again.model.layers[0].mlp.up_proj, LoRALinear)
    assert isinstance(again.model.layers[0].mlp.up_proj.base_layer, NF4Linear)
    assert not again.training
    assert torch.equal(logits(again), expected)


def test_a_gathered_state_dict_is_what_is_written(saved_base, tmp_path):
    """FSDP and DeepSpeed keep parts of tensors in the model, and give Trainer a state dict with the whole."""
    model = randomize(replace_linear(loaded(saved_base), r=4, modules_to_save=["norm"], target_modules=["q_proj"]))
    expected, whole = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in parameters(model).values():
        parameter.data = parameter.data.new_empty(0)
    model.save_pretrained(tmp_path / "others", state_dict=whole, is_main_process=False)
    with pytest.raises(ValueError, match=r"lora_[AB].weight is empty.*GatheredParameters"):
        model.save_pretrained(tmp_path / "others")
    with pytest.raises(ValueError, match=r"state_dict lacks model.norm.weight, which is trained"):
        model.save_pretrained(
            tmp_path / "others", state_dict={k: v for k, v in whole.items() if k != "model.norm.weight"}
        )
    with pytest.warns(UserWarning, match="no adapter is written, as DeepSpeed keeps the weights"):
        model.save_pretrained(tmp_path / "others", state_dict={})
    assert not (tmp_path / "others").exists()
    model.save_pretrained(tmp_path / "out", state_dict=whole)
    assert torch.equal(logits(load_adapter(loaded(saved_base), tmp_path / "out")), expected)


def test_a_base_without_a_name_is_mentioned(saved_base, tmp_path):
    with pytest.warns(UserWarning, match="the base model has no name or path.*fastlora.load_adapter"):
        replace_linear(llama(), r=4).save_pretrained(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linear(loaded(saved_base), r=4).save_pretrained(tmp_path / "out")


def test_what_an_adapter_cannot_be(tmp_path):
    model = replace_linear(llama(), r=4)
    with pytest.raises(ValueError, match="save_peft_format=False is not for an adapter"):
        model.save_pretrained(tmp_path / "out", save_peft_format=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    assert names(tmp_path) == {"file"}


def test_the_hub_gets_the_adapter(saved_base, tmp_path, monkeypatch):
    sent = {}

    def upload(self, directory, repo, *args, **kwargs):
        sent[repo] = names(Path(directory))

    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    hub = transformers.utils.hub
    made = type("Made", (), {"repo_id": "me/mine"})
    api = type("Api", (), {"create_repo": lambda self, *args, **kwargs: made})
    monkeypatch.setattr(hub, "hf_api", api)
    card = type("Card", (), {"save": lambda self, path: Path(path).touch()})
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card())
    model = replace_linear(loaded(saved_base), r=4)
    model.push_to_hub("me/mine")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
    assert sent == {"me/mine": {*ADAPTER, "README.md", "generation_config.json"}}
    assert names(tmp_path / "mine") >= ADAPTER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("options", OPTIONS[:4])
def test_a_vocabulary_resized_after_adapting(options, tie, dtype, tmp_path):
    llama(tie_word_embeddings=tie).save_pretrained(tmp_path / "base")
    model = randomize(replace_linear(loaded(tmp_path / "base", dtype=dtype), r=4, **options)).eval()
    before = logits(model)
    assert model.resize_token_embeddings(80) is model.get_input_embeddings()
    after = logits(model)
    assert after.shape[-1] == 80
    assert torch.equal(after[..., :64], before)
    head, embedding = (getattr(each, "base_layer", each) for each in (model.lm_head, model.model.embed_tokens))
    assert (head.weight is embedding.weight) == tie
    model.save_pretrained(tmp_path / "out")
    bare = loaded(tmp_path / "base", dtype=dtype)
    with pytest.raises(ValueError, match=r"call model.resize_token_embeddings\(80\) first"):
        load_adapter(bare, tmp_path / "out")
    bare.resize_token_embeddings(80)
    assert torch.equal(logits(load_adapter(bare, tmp_path / "out").eval()), after)


def test_a_vocabulary_that_cannot_be_resized_stays(tmp_path):
    heads = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}
    for options, message in ((OPTIONS[3], "token 5 is trained"), (heads, "output head was changed by its start")):
        model = replace_linear(llama(), r=4, **options)
        before, expected = snapshot(model), logits(model)
        with pytest.raises(ValueError, match=message):
            model.resize_token_embeddings(5)
        assert snapshot(model) == before
        assert torch.equal(logits(model), expected)
        assert model.config.vocab_size == 64


def test_peft_reads_a_resized_vocabulary_and_we_read_its(saved_base, tmp_path):
    peft = pytest.importorskip("peft")
    model = loaded(saved_base)
    model.resize_token_embeddings(70)
    model = randomize(replace_linear(model, r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "ours")
    base = loaded(saved_base)
    base.resize_token_embeddings(70)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    base = loaded(saved_base)
    base.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "theirs")), logits(model))


def test_an_adapter_in_pefts_layers_is_saved_as_one(saved_base, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(loaded(saved_base), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    randomize(theirs).save_pretrained(tmp_path / "theirs")
    model = load_adapter(loaded(saved_base), tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert names(tmp_path / "ours") >= ADAPTER
    assert "model.safetensors" not in names(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(loaded(saved_base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-6)
    injected = loaded(saved_base)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), injected)
    randomize(replace_linear(injected)).save_pretrained(tmp_path / "injected")
    assert torch.equal(logits(loaded(tmp_path / "injected")), logits(injected))


def test_a_folder_with_a_model_and_an_adapter_is_mentioned(saved_base, tmp_path):
    model = replace_linear(loaded(saved_base), r=4, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "out")
        model.save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="holds an adapter as well as this model"):
        llama().save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="holds a whole model as well as this adapter"):
        model.save_pretrained(tmp_path / "out")


def test_a_merged_model_is_no_longer_its_base(saved_base, tmp_path):
    merged = merge(randomize(replace_linear(loaded(saved_base), r=4, target_modules=["q_proj"])))
    model = replace_linear(merged, r=4, target_modules=["k_proj"])
    with pytest.warns(UserWarning, match="base"):
        model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_nothing_is_trainable_unless_asked_over_nf4(saved_base, tmp_path):
    replace_linear(loaded(saved_base), r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "out")
    options = {"quantization_config": fastlora.FastLoRANF4Config()}
    assert not parameters(loaded(tmp_path / "out", **options))


def test_a_model_around_the_adapted_one_saves_the_adapter_too(tmp_path):
    model = llama()
    randomize(replace_linear(model.model, r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    model.model.norm.weight.data.add_(1)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "out")), logits(model))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[3], OPTIONS[5]])
def test_whole_models_of_the_old_kind_become_adapters(options, tmp_path):
    options = {"r": 4, "lora_alpha": 6, **options}
    model = trained(randomize(replace_linear(llama(), **options))).eval()
    transformers.PreTrainedModel.save_pretrained.__wrapped__(model, tmp_path / "old", max_shard_size="40KB")
    extract_adapter(tmp_path / "old", tmp_path / "new", **options)
    expected = {"rtol": 1e-5, "atol": 1e-5} if "init_lora_weights" in options else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "new").eval()), logits(model), **expected)


def test_old_checkpoints_with_containers_and_ties(tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["mlp", "embed_tokens"]}
    model = replace_linear(llama(tie_word_embeddings=True), **options)
    trained(randomize(model)).eval()
    transformers.PreTrainedModel.save_pretrained.__wrapped__(model, tmp_path / "old")
    extract_adapter(tmp_path / "old", tmp_path / "new", **options)
    other = load_adapter(llama(tie_word_embeddings=True), tmp_path / "new").eval()
    assert torch.equal(logits(other), logits(model))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"'lm_head' is not in the file; if its weight was tied, name the other one"):
        extract_adapter(tmp_path / "old", tmp_path / "again", **{**options, "modules_to_save": ["lm_head"]})


def test_trainer_resumes_with_a_container_trained_in_full(tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    torch.manual_seed(0)
    undisturbed = parameters(run(tmp_path / "a", options, 6))
    torch.manual_seed(0)
    run(tmp_path / "b", options, 3)
    torch.manual_seed(0)
    resumed = parameters(run(tmp_path / "b", options, 6, tmp_path / "b" / "checkpoint-3"))
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


def test_what_is_no_old_checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no adapters of fastlora's"):
        extract_adapter(tmp_path / "plain", tmp_path / "new")
    with pytest.raises(ValueError, match="no option 'alpha'"):
        extract_adapter(tmp_path / "plain", tmp_path / "new", alpha=3)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        extract_adapter(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_models_pass_through(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(loaded(tmp_path / "plain")), logits(model))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model)
    assert model.resize_token_embeddings(66).num_embeddings == 66
    assert pretrained.adapter_name_of(model) is None


def test_trainer_imported_later_is_extended_too():
    code = (
        "import sys, fastlora; fastlora.replace_linear\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers.trainer as t, transformers.modeling_utils as m\n"
        "trainer, model = t.Trainer, m.PreTrainedModel\n"
        "for method in (trainer._load_from_checkpoint, trainer._load_best_model, model.save_pretrained):\n"
        "    assert method.__wrapped__, method\n"
        "assert not any(type(finder).__name__ == '_Waiting' for finder in sys.meta_path)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
