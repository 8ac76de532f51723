"""What the keys of other tools mean here: the answer to a recipe's key that fastlora does not have.

Recipes take their names from transformers, peft and TRL, so people bring the rest of those tools' keys along.
"""

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Collection

# Other tools' or older names for a key, to which spelling would not lead.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "max_seq_length": "max_length",
    "load_in_4bit": "quantize",
    "group_by_length": "train_sampling_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "no_cuda": "use_cpu",
}

_PACKING = (
    "padding_free puts the examples of a micro-batch in one row without padding, where the model can; "
    "per_device_train_batch_size says how many"
)
_OWN_SCRIPT = "not in recipes; with a training script of your own, fastlora.replace_linear speeds up its model"
_STRATEGY = "there is no strategy to choose: {} says after how many steps"
_ALWAYS = "it cannot be chosen: {}"
_REPORTS = "a run writes metrics.jsonl and loss.png into output_dir, and reports nowhere else"
_NO_HUB = "a run uploads nothing: output_dir holds an adapter in peft's format, ready for the hub"
_OPTIMIZER = _ALWAYS.format("it is AdamW, whose keys are adam_beta1, adam_beta2, adam_epsilon and weight_decay")
_LOADER = _ALWAYS.format("the examples are tokenized before the first step and kept in memory")

# Well-known keys that are not a matter of spelling.
MEANINGS = {
    "packing": _PACKING,
    "eval_packing": _PACKING,
    "packing_strategy": _PACKING,
    "sample_packing": _PACKING,
    "pad_to_multiple_of": _ALWAYS.format("batches are padded to a multiple of 8"),
    "pad_token": "padding carries no loss and is masked, so which token it is changes nothing",
    "eos_token": "the tokenizer's eos_token ends an example: set it in the tokenizer's files",
    "chat_template_path": "the tokenizer's chat template is used: set it in the tokenizer's files",
    "dataset_text_field": "the column must be called text",
    "dataset_num_proc": _LOADER,
    "dataset_kwargs": "prepare the data set yourself, and give its folder as dataset_name or a file as train_file",
    "truncation_mode": _ALWAYS.format("what is longer than max_length is cut at the end"),
    "shuffle_dataset": "train_sampling_strategy: random (the default) shuffles, sequential does not",
    "loss_type": _ALWAYS.format("the loss is the mean cross-entropy per target token"),
    "average_tokens_across_devices": _ALWAYS.format("the loss is a mean over the target tokens of all devices"),
    "router_aux_loss_coef": _ALWAYS.format("the loss has no term for a router"),
    "neftune_noise_alpha": "not yet",
    "use_liger_kernel": "not yet",
    "model_init_kwargs": _ALWAYS.format("bf16 says in which dtype the model is loaded, and quantize whether in NF4"),
    "trust_remote_code": "code that comes with a model is not run: save the model with a class that transformers has",
    "eval_strategy": _STRATEGY.format("eval_steps"),
    "evaluation_strategy": _STRATEGY.format("eval_steps"),
    "do_eval": "an evaluation set (eval_file or dataset_test_split) is evaluated; without one there is no evaluation",
    "do_train": "fastlora train always trains",
    "save_strategy": _STRATEGY.format("save_steps (null: none)"),
    "logging_strategy": _STRATEGY.format("logging_steps"),
    "logging_first_step": "every step is in metrics.jsonl; logging_steps: 1 prints every step",
    "logging_dir": _REPORTS,
    "report_to": _REPORTS,
    "run_name": _REPORTS,
    "push_to_hub": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "load_in_8bit": "not supported: quantize: nf4 is what there is",
    "bnb_4bit_quant_type": _ALWAYS.format("quantize: nf4 is what there is"),
    "bnb_4bit_use_double_quant": _ALWAYS.format("quantize: nf4 quantizes the scales too"),
    "bnb_4bit_compute_dtype": "bf16 says in which dtype is computed",
    "fp16": "not supported: bf16: true, or bf16: false for float32",
    "tf32": "not a key: torch.set_float32_matmul_precision in a script of your own",
    "optim_args": _OPTIMIZER,
    "load_best_model_at_end": "not yet: checkpoints are kept by age; evaluation losses are in metrics.jsonl",
    "metric_for_best_model": "not yet: checkpoints are kept by age; evaluation losses are in metrics.jsonl",
    "resume_from_checkpoint": "not a key: the option --resume continues the run in output_dir",
    "overwrite_output_dir": "a run never overwrites another: give another output_dir, or --resume",
    "gradient_checkpointing_kwargs": _ALWAYS.format("use_reentrant is false"),
    "data_seed": "seed is that of the data too",
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "remove_unused_columns": "columns that nothing reads are named when a run starts",
    "deepspeed": _OWN_SCRIPT,
    "fsdp": _OWN_SCRIPT,
    "fsdp_config": _OWN_SCRIPT,
}


def answer(key: str, known: Collection[str]) -> str:
    """What to say of a key that is not one of the `known`: its meaning, or the nearest that exists, or neither."""
    name = key[:100].lower()
    if name in ALIASES:
        return f"; did you mean {ALIASES[name]!r}?"
    if name in MEANINGS:
        return f": {MEANINGS[name]}"
    for owner in _owners(name):
        return f": a field of {owner} that fastlora's recipes do not have; `fastlora keys` lists those that exist"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else "; `fastlora keys` lists those that exist"


def _owners(name: str) -> list[str]:
    """The classes of transformers, TRL and peft that have a field of this name, of those that are installed."""
    found = []
    with contextlib.suppress(ImportError):
        from transformers import TrainingArguments

        found += ["transformers' TrainingArguments"] if _has(TrainingArguments, name) else []
    with contextlib.suppress(ImportError):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of what is not needed
        from peft import LoraConfig

        found += ["peft's LoraConfig"] if _has(LoraConfig, name) else []
    return found


def _has(kind: type, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
