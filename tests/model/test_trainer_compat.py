"""transformers' Trainer takes a model that bitsandbytes loaded and `replace_linear` adapted."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

import fastlora

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
DEMO_MODEL = Path(fastlora.__file__).parent / "demo" / "model"


def load_in_nf4():
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=config)


def trainer_for(model, out, **options):
    tokens = torch.arange(64) % 61
    rows = [{"input_ids": tokens, "labels": tokens}] * 8
    arguments = transformers.TrainingArguments(
        str(out), per_device_train_batch_size=2, learning_rate=5e-3, lr_scheduler_type="constant", report_to=[],
        use_cpu=True, logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows)


def test_trainer_trains_and_resumes_a_model_that_bitsandbytes_loaded(tmp_path):
    model = fastlora.replace_linear(load_in_nf4(), r=8)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    trainer = trainer_for(model, tmp_path, max_steps=8, save_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())

    again = trainer_for(fastlora.replace_linear(load_in_nf4(), r=8), tmp_path, max_steps=8, save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == losses


def test_trainer_still_refuses_a_model_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(load_in_nf4(), tmp_path)


def test_the_quantizer_stays_what_it_was_but_for_one_answer():
    model = load_in_nf4()
    kind = type(model.hf_quantizer)
    assert not model.hf_quantizer.is_qat_trainable
    fastlora.replace_linear(model, r=4)
    copied = copy.deepcopy(model.hf_quantizer)
    unpickled = pickle.loads(pickle.dumps(model.hf_quantizer))
    for quantizer in (model.hf_quantizer, copied, unpickled):
        assert isinstance(quantizer, kind)
        assert quantizer.is_qat_trainable
        assert quantizer.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert model.is_quantized
