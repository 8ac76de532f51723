"""TRL's trainers take sped-up peft models: the losses, the reference model and the adapter are peft's.

Each run is made three times from the same start: peft in fp64 (the oracle), peft in fp32 (the baseline), and sped up in
fp32; the losses of all steps and the trained adapters are held to the rule of `numerics`.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from tests.support.models import llama, randomize, snapshot
from tests.support.numerics import assert_as_accurate

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
DEMO_MODEL = Path(fastlora.__file__).parent / "demo" / "model"
STEPS = 4
# At ten times this rate a rounding error grows tenfold from step to step: then what is compared is luck.
STABLE_RATE = 0.05


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)


def base(dtype, **options):
    return llama(vocab_size=4096, num_hidden_layers=1, attn_implementation="eager", **options).to(dtype)


def config(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def arguments(kind, out, learning_rate=0.5, **options):
    return kind(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=learning_rate, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        bf16=False, save_strategy="no", **options,
    )  # fmt: skip


class Losses(transformers.TrainerCallback):
    """The loss of every step, before it is rounded for the log."""

    def __init__(self, trainer):
        self.values, compute = [], trainer.compute_loss

        def kept(*args, **kwargs):
            result = compute(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.values.append(loss.detach().double())
            return result

        trainer.compute_loss = kept


def sft(out, tokenizer, dtype, model=None, in_peft=True, **options):
    rows = [{"text": "Once upon a time there was a small red hen. " * (1 + i % 3)} for i in range(8)]
    settings = arguments(trl.SFTConfig, out, max_length=32, **options)
    return trl.SFTTrainer(
        model or base(dtype), settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=config() if in_peft else None,
    )  # fmt: skip


def dpo(out, tokenizer, dtype, model=None, **options):
    rows = [{"prompt": "The hen was", "chosen": " red" * (1 + i % 3), "rejected": " not a cat"} for i in range(8)]
    settings = arguments(trl.DPOConfig, out, max_length=32, beta=0.5, **options)
    return trl.DPOTrainer(
        model or base(dtype), args=settings, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=None if model else config(),
    )  # fmt: skip


def trained(make, out, tokenizer, dtype=torch.float32, sped_up=False, **options):
    """(losses, adapter by name, trainer) of a short training."""
    torch.manual_seed(3)
    trainer = make(out, tokenizer, dtype, **options)
    randomize(trainer.model)
    if sped_up:
        fastlora.replace_linear(trainer.model)
    losses = Losses(trainer)
    trainer.train()
    adapter = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(losses.values) == STEPS
    return torch.stack(losses.values), adapter, trainer


def counts(model):
    calls = [module.fastlora_calls for module in model.modules() if hasattr(module, "fastlora_calls")]
    assert calls
    return sum(c.sped_up for c in calls), sum(c.stepped_back for c in calls), {c.last_reason for c in calls} - {""}


def check(make, tmp_path, tokenizer, **options):
    """Train three times and compare. Returns the sped-up trainer, for further checks."""
    options["learning_rate"] = STABLE_RATE
    true_losses, true_adapter, _ = trained(make, tmp_path / "oracle", tokenizer, torch.float64, **options)
    base_losses, base_adapter, _ = trained(make, tmp_path / "peft", tokenizer, **options)
    losses, adapter, trainer = trained(make, tmp_path / "sped up", tokenizer, sped_up=True, **options)
    assert true_losses[0] != true_losses[-1], "it trains"
    assert_as_accurate(losses, base_losses, true_losses, "losses")
    assert adapter.keys() == true_adapter.keys()
    for name, value in adapter.items():
        assert_as_accurate(value, base_adapter[name], true_adapter[name].double(), name)
    return trainer


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft(tmp_path, tokenizer, checkpointing):
    trainer = check(sft, tmp_path, tokenizer, gradient_checkpointing=checkpointing)
    sped_up, back, _ = counts(trainer.model)
    assert sped_up == 7 * STEPS * (2 if checkpointing else 1)
    assert back == 0


def test_sft_packs_without_padding(tmp_path, tokenizer):
    trainer = check(sft, tmp_path, tokenizer, packing=True, packing_strategy="wrapped", gradient_checkpointing=False)
    assert counts(trainer.model)[:2] == (7 * STEPS, 0)


@pytest.mark.parametrize(("make", "options"), [(sft, {"in_peft": False}), (dpo, {})])
def test_a_model_that_is_sped_up_before_trains_the_same(tmp_path, tokenizer, make, options):
    """TRL puts a forward of its own around the model's."""
    found = []
    for sped_up in (False, True):
        model = base(torch.float32)
        if sped_up:
            fastlora.speed_up(model)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config())
        given = {**options, "model": adapted, "gradient_checkpointing": False}
        trainer = make(tmp_path / str(sped_up), tokenizer, torch.float32, **given)
        losses = Losses(trainer)
        trainer.train()
        found.append(torch.stack(losses.values))
    assert len(found[0]) == STEPS
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
    fastlora.restore(model)
    ids = torch.arange(24).view(2, 12)
    assert trainer.model.get_base_model()(input_ids=ids, labels=ids).loss.isfinite()


def test_the_adapter_of_sft_is_saved_and_loaded(tmp_path, tokenizer):
    _, adapter, trainer = trained(sft, tmp_path, tokenizer, sped_up=True, gradient_checkpointing=False)
    trainer.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {name.replace(".default.", ".") for name in adapter} == saved.keys()
    loaded = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path / "saved").eval()
    again = fastlora.replace_linear(copy.deepcopy(loaded))
    ids = torch.arange(24).view(2, 12)
    model = trainer.model.eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)


def test_dpo_with_adapters_off_as_reference(tmp_path, tokenizer):
    trainer = check(dpo, tmp_path, tokenizer, gradient_checkpointing=False)
    assert trainer.ref_model is None
    sped_up, back, reasons = counts(trainer.model)
    assert (sped_up, back) == (7 * STEPS, 7 * STEPS)
    assert reasons == {"adapters are disabled"}
    trainer.save_model(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path / "saved")
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_dpo_with_a_frozen_copy_of_the_adapter_as_reference(tmp_path, tokenizer):
    """A model with an adapter of its own is its own reference: TRL adds a copy of the adapter after replace_linear."""
    found = {}
    for kind, dtype in (("oracle", torch.float64), ("peft", torch.float32), ("sped up", torch.float32)):
        torch.manual_seed(3)
        model = randomize(peft.get_peft_model(base(dtype), config()))
        if kind == "sped up":
            fastlora.replace_linear(model)
        trainer = dpo(tmp_path / kind, tokenizer, dtype, model, gradient_checkpointing=False)
        losses = Losses(trainer)
        trainer.train()
        found[kind] = torch.stack(losses.values)
    assert_as_accurate(found["sped up"], found["peft"], found["oracle"], "losses")
    assert found["oracle"][0].item() == pytest.approx(math.log(2)), "the copy is the adapter at the start"
    assert list(trainer.model.peft_config) == ["default", "ref"]
    assert counts(trainer.model)[:2] == (2 * 7 * STEPS, 0), "the reference is sped up too"


@pytest.mark.parametrize(
    ("tie", "trained_too"),
    [
        (False, {"target_modules": ["q_proj", "lm_head"]}),
        (True, {"target_modules": ["q_proj", "lm_head"]}),
        (False, {"trainable_token_indices": {"lm_head": [273, 483]}}),
        (True, {"trainable_token_indices": [273, 483]}),
    ],
)
def test_an_adapted_head_counts_in_a_loss_that_reads_its_weight(tmp_path, tokenizer, tie, trained_too):
    """SFT multiplies by the head's weight and never calls the head; peft's adapted heads it refuses."""
    options = {"r": 4, "target_modules": ["q_proj"], **trained_too}
    model = randomize(fastlora.replace_linear(base(torch.float32, tie_word_embeddings=tie), **options))
    for rows in (module.trained_rows for module in model.modules() if hasattr(module, "trained_rows")):
        torch.nn.init.normal_(rows)
    trainer = sft(tmp_path, tokenizer, torch.float32, model, in_peft=False, gradient_checkpointing=False)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    labels = batch["labels"]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trains) >= 3
    found, wanted = (torch.autograd.grad(each, list(trains.values())) for each in (loss, expected))
    for name, one, other in zip(trains, found, wanted, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_peft_config_on_an_adapted_model_is_refused_before_anything_changes(tmp_path, tokenizer, quantize):
    rows = [{"prompt": "The hen was", "chosen": " red", "rejected": " not a cat"}] * 2
    model = fastlora.replace_linear(base(torch.float32), r=4, quantize=quantize)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Two orders work.*fastlora.replace_linear\(trainer.model\)"):
        sft(tmp_path, tokenizer, torch.float32, model)
    with pytest.raises(ValueError, match=r"Two orders work.*no peft_config"):
        trl.DPOTrainer(
            model, args=arguments(trl.DPOConfig, tmp_path), train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=config(),
        )  # fmt: skip
    assert snapshot(model) == before


def test_both_orders_train(tmp_path, tokenizer):
    """peft first and replace_linear(trainer.model) afterwards, or replace_linear alone: every adapter moves."""
    rows = [{"text": "Once upon a time there was a small red hen."}] * 8
    for order in ("peft first", "fastlora only"):
        model = base(torch.float32)
        if order == "fastlora only":
            model = fastlora.replace_linear(model, r=4, lora_alpha=8)
        settings = arguments(trl.SFTConfig, tmp_path, learning_rate=1.0, max_length=32)
        trainer = trl.SFTTrainer(
            model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=config() if order == "peft first" else None,
        )  # fmt: skip
        if order == "peft first":
            fastlora.replace_linear(trainer.model)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert len(start) == 2 * 7
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(history) == STEPS
        assert all(entry["grad_norm"] > 0 for entry in history)
        assert history[-1]["loss"] < 0.99 * history[0]["loss"]
        for name, parameter in trainer.model.named_parameters():
            assert name not in start or not torch.equal(parameter, start[name]), name


def loaded_in_nf4():
    return fastlora.replace_linear(
        transformers.AutoModelForCausalLM.from_pretrained(
            DEMO_MODEL, quantization_config=fastlora.FastLoRANF4Config(), dtype=torch.float32
        ),
        r=8,
    )


@pytest.mark.parametrize(
    "make", [lambda: fastlora.replace_linear(base(torch.float32), r=8, quantize="nf4"), loaded_in_nf4]
)
def test_sft_of_a_plain_model_in_nf4(tmp_path, tokenizer, make):
    """Without peft: fastlora's own adapters over its own NF4."""
    rows = [{"text": "Once upon a time there was a small red hen."}] * 8
    model = make()
    settings = arguments(trl.SFTConfig, tmp_path, max_length=32, gradient_checkpointing=True)
    trainer = trl.SFTTrainer(
        model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    losses = Losses(trainer)
    trainer.train()
    assert losses.values[-1] < 0.99 * losses.values[0]
    fastlora.save_adapter(model, tmp_path / "saved")
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in load_file(
        tmp_path / "saved" / "adapter_model.safetensors"
    )


def test_qlora_over_bitsandbytes(tmp_path, tokenizer):
    """TRL turns the adapters of a 4-bit model to bf16; these are sped up and learn as in peft."""
    pytest.importorskip("bitsandbytes")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    rows, found = [{"text": "Once upon a time there was a small red hen."}] * 8, []
    for sped_up in (False, True):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=quantization)
        settings = arguments(trl.SFTConfig, tmp_path, max_length=32, gradient_checkpointing=True)
        trainer = trl.SFTTrainer(
            model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=config(),
        )  # fmt: skip
        if sped_up:
            fastlora.replace_linear(trainer.model)
        losses = Losses(trainer)
        trainer.train()
        found.append(torch.stack(losses.values))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert counts(trainer.model)[:2] == (2 * 28 * STEPS, 0)
    assert found[1][-1] < 0.95 * found[1][0]
    torch.testing.assert_close(found[1], found[0], rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_dpo_of_a_plain_model_with_a_reference_of_its_own(tmp_path, tokenizer):
    """Without peft nothing can be switched off: the reference is the model before it was adapted."""
    rows = [{"prompt": "The hen was", "chosen": " red", "rejected": " not a cat"}] * 8
    settings = arguments(trl.DPOConfig, tmp_path, max_length=32, beta=0.5, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(
        fastlora.replace_linear(base(torch.float32), r=4), base(torch.float32), args=settings,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    losses = Losses(trainer)
    trainer.train()
    assert losses.values[0].item() == pytest.approx(math.log(2), abs=1e-5), "the adapters start at nothing"
    assert losses.values[-1] < losses.values[0] - 0.01
