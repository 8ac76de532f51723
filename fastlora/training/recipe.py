"""The recipe of a training run: one flat table of keys, read from YAML, overridden by `--set key=value`.

A key has the name it has elsewhere, so nothing must be learned twice:

- of the run (`max_steps`, `learning_rate`, `save_steps`, ...): transformers' `TrainingArguments`;
- of the adapters (`r`, `lora_alpha`, `target_modules`, ...): peft's `LoraConfig`;
- of the data (`max_length`, `completion_only_loss`, `dataset_name`, ...): TRL's `SFTConfig`.

Everything is checked before anything is loaded. The error for an unknown key says what it means here, or names the
nearest one that exists (`foreign_keys`); the error for a value of the wrong type or range says what was expected.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from fastlora.layers.quoted import clipped, reason, shown
from fastlora.training.foreign_keys import answer
from fastlora.training.inputs import read_text

BUILT_IN = Path(__file__).resolve().parent / "recipes"
_UNUSABLE = re.compile(r"[\0-\x1f\ud800-\udfff]")  # in a path
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
SAMPLING = ("random", "sequential", "group_by_length")
CHECKPOINTING = ("min", "selective", "auto")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
_OF_METHOD = {  # method -> the keys that mean something only with it
    "lora": (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "init_lora_weights",
        "loraplus_lr_ratio", "cuda_graphs",
    ),
    "houlsby": ("bottleneck",),
    "prefix": ("num_virtual_tokens", "init_text", "prefix_projection", "encoder_hidden_size"),
    "prompt": ("num_virtual_tokens", "init_text"),
    "full": (),
}  # fmt: skip
METHODS = tuple(_OF_METHOD)

# A resumed run may change these: they affect what is shown, kept or evaluated, never a training loss.
# The training data are compared by content, so a file may move.
FREE_ON_RESUME = frozenset(
    [
        "output_dir",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "eval_steps",
        "eval_on_start",
        "eval_file",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
        "cuda_graphs",
        "torch_compile",
        "keep_expanded",
        "activation_offloading",
        "train_file",
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
    ]
)


@dataclass(frozen=True)
class Recipe:
    """All the keys of a run, with their defaults. Make one with `load`, `from_mapping` or keywords.

    Raises:
        ValueError: a value out of its range, or keys that contradict each other; the message names the key.
    """

    model_name_or_path: Annotated[str, "a directory in Hugging Face layout, or a hub name"] = ""
    quantize: Annotated[str | None, "nf4: the frozen base in 4 bits (QLoRA); null: bfloat16 or float32, by bf16"] = None

    method: Annotated[str, "lora | houlsby | prefix | prompt | full; qlora is lora with quantize: nf4"] = "lora"

    r: Annotated[int, "rank of the adapters, 1 to 256"] = 16
    lora_alpha: Annotated[float, "the update is scaled by lora_alpha / r"] = 32.0
    lora_dropout: Annotated[float, "dropout on the adapters' input"] = 0.0
    target_modules: Annotated[str | list[str], "names or regular expression of the layers to adapt"] = "all-linear"
    exclude_modules: Annotated[str | list[str] | None, "names or regular expression of layers to leave out"] = None
    use_rslora: Annotated[bool, "scale by lora_alpha / sqrt(r) instead"] = False
    init_lora_weights: Annotated[bool | str, "how A and B start: true, gaussian, pissa, olora, ..., as in peft"] = True
    loraplus_lr_ratio: Annotated[float | None, "LoRA+: the rate of B over that of A"] = None
    bottleneck: Annotated[int, "houlsby: features inside an adapter"] = 64
    num_virtual_tokens: Annotated[int, "prefix, prompt: trained tokens before the text"] = 20
    init_text: Annotated[str | None, "prefix, prompt: what they start as; null: words drawn at random"] = None
    prefix_projection: Annotated[bool, "prefix: an MLP makes the keys and values while they are trained"] = False
    encoder_hidden_size: Annotated[int, "prefix: features inside that MLP"] = 512

    train_file: Annotated[str | None, "JSONL or JSON (.gz) with text | prompt + completion | messages (+ tools)"] = None
    eval_file: Annotated[str | None, "the same, for evaluation"] = None
    dataset_name: Annotated[str | None, "instead of files: what datasets.load_dataset accepts"] = None
    dataset_config: Annotated[str | None, "its configuration"] = None
    dataset_train_split: Annotated[str, "its split to train on"] = "train"
    dataset_test_split: Annotated[str | None, "its split to evaluate on"] = None
    max_length: Annotated[int, "longer examples are cut at the end; how many is reported"] = 1024
    completion_only_loss: Annotated[bool, "prompt + completion: no loss on the prompt"] = True
    assistant_only_loss: Annotated[bool, "messages: loss only on what the assistant says"] = True
    train_sampling_strategy: Annotated[str, "random | sequential | group_by_length"] = "random"

    output_dir: Annotated[str, "adapter, checkpoints, metrics.jsonl and loss.png go here"] = "runs/train"
    max_steps: Annotated[int, "optimizer steps; -1: as num_train_epochs says"] = -1
    num_train_epochs: Annotated[float, "passes over the training data, when max_steps is -1"] = 1.0
    per_device_train_batch_size: Annotated[int, "examples in one forward pass of one device"] = 8
    per_device_eval_batch_size: Annotated[int, "the same, in evaluation"] = 8
    gradient_accumulation_steps: Annotated[int, "forward passes in one optimizer step"] = 1
    learning_rate: Annotated[float, "peak learning rate"] = 2e-4
    lr_scheduler_type: Annotated[str, "linear | cosine | constant | constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 0
    warmup_ratio: Annotated[float, "the same, as a share of all steps"] = 0.0
    label_smoothing_factor: Annotated[float, "share of a target spread over the vocabulary, in training"] = 0.0
    optim: Annotated[str, "adamw_torch | adamw_8bit | paged_adamw_8bit; the last two are bitsandbytes'"] = "adamw_torch"
    weight_decay: Annotated[float, "AdamW's, on what is trained"] = 0.0
    adam_beta1: Annotated[float, "AdamW's"] = 0.9
    adam_beta2: Annotated[float, "AdamW's"] = 0.999
    adam_epsilon: Annotated[float, "AdamW's"] = 1e-8
    max_grad_norm: Annotated[float, "gradients are scaled down to this norm; 0: never"] = 1.0
    bf16: Annotated[bool | None, "compute in bfloat16; null: if the hardware has it"] = None
    gradient_checkpointing: Annotated[bool | str, "recompute activations in backward; min | selective | auto"] = False
    speed_up: Annotated[bool, "norms, rotary embedding, gated MLPs, head and loss by fastlora, where it can"] = True
    padding_free: Annotated[bool | None, "a micro-batch's examples in one row; null: if the model can"] = None
    cuda_graphs: Annotated[bool, "record steps of few shapes and replay them: one launch where Python is slow"] = False
    torch_compile: Annotated[bool, "blocks by torch.compile; for models of whose parts speed_up knows few"] = False
    keep_expanded: Annotated[bool, "NF4 weights expanded once a step, not in each micro-batch; 2 bytes a weight"] = (
        False
    )
    activation_offloading: Annotated[bool, "inputs of recomputed layers wait in host memory; on CUDA"] = False
    use_cpu: Annotated[bool, "use the CPU even if there is a GPU"] = False
    seed: Annotated[int, "of adapters, dropout and the order of the data"] = 42
    logging_steps: Annotated[int, "steps between two printed lines if there is no live display"] = 10
    eval_steps: Annotated[int | None, "steps between evaluations; null: only at the end"] = None
    eval_on_start: Annotated[bool, "evaluate before the first step too"] = False
    save_steps: Annotated[int | None, "steps between checkpoints; null: none"] = 500
    save_total_limit: Annotated[int | None, "checkpoints kept, the newest; null: all"] = None

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerced(spec.name, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        if self.method == "qlora":
            object.__setattr__(self, "method", "lora")
            object.__setattr__(self, "quantize", "nf4")
        _check_ranges(self)
        _check_together(self)

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included; `load` reads it back to an equal recipe."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some keys changed, checked again."""
        return dataclasses.replace(self, **changes)


_TYPES: dict[str, Any] = typing.get_type_hints(Recipe)
_DEFAULTS = {spec.name: spec.default for spec in dataclasses.fields(Recipe)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _coerced(key: str, value: Any) -> Any:
    """`value` in the type of `key`. YAML 1.1 reads `1e-3` as a string; here it is a number."""
    wanted = _alternatives(_TYPES[key])
    if value is None and type(None) in wanted:
        return None
    if bool in wanted and isinstance(value, bool):
        return value
    if list[str] in wanted and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return list(value)
    if str in wanted and isinstance(value, str):
        return value
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            if float in wanted:
                return float(value)
            if int in wanted and isinstance(value, int):
                return value
            if int in wanted and float(value).is_integer():
                return int(float(value))
        except (ValueError, OverflowError):
            pass
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
    expected = " or ".join(words.get(w, "a list of strings") for w in wanted)
    raise ValueError(f"{key}: expected {expected}, got {shown(value)}")


def _check_ranges(recipe: Recipe) -> None:
    at_least_one = [
        "r",
        "bottleneck",
        "num_virtual_tokens",
        "encoder_hidden_size",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
    ]
    not_negative = ["warmup_steps", "weight_decay", "max_grad_norm"]
    shares = ["lora_dropout", "label_smoothing_factor", "warmup_ratio", "adam_beta1", "adam_beta2"]
    positive = ["lora_alpha", "loraplus_lr_ratio", "learning_rate", "adam_epsilon"]
    paths = ["model_name_or_path", "train_file", "eval_file", "dataset_name", "output_dir"]
    patterns = ["target_modules", "exclude_modules"]
    rules = [
        *((k, lambda v: v >= 1, "at least 1") for k in at_least_one),
        *((k, lambda v: 0 <= v < float("inf"), "0 or more, and finite") for k in not_negative),
        *((k, lambda v: 0 <= v < 1, "at least 0 and below 1") for k in shares),
        *((k, lambda v: 0 < v < float("inf"), "more than 0, and finite") for k in positive),
        *((k, lambda v: not _UNUSABLE.search(v), "a path or name without control characters") for k in paths),
        *((k, _is_pattern, "a list of names or a regular expression") for k in patterns),
        ("r", lambda v: v <= 256, "at most 256"),
        ("num_train_epochs", lambda v: 0 < v <= 1e9, "more than 0, and at most 1e9"),
        ("seed", lambda v: 0 <= v < 2**31, "0 to 2147483647"),
        ("max_length", lambda v: v >= 2, "at least 2: a token is predicted from the one before"),
        ("max_steps", lambda v: v == -1 or v >= 1, "at least 1, or -1 for whole epochs"),
        ("quantize", lambda v: v == "nf4", "nf4 or null"),
        ("method", lambda v: v in METHODS, " | ".join((*METHODS, "qlora"))),
        ("optim", lambda v: v in OPTIMIZERS, " | ".join(OPTIMIZERS)),
        ("lr_scheduler_type", lambda v: v in SCHEDULES, " | ".join(SCHEDULES)),
        ("train_sampling_strategy", lambda v: v in SAMPLING, " | ".join(SAMPLING)),
        ("output_dir", lambda v: v != "", "a directory"),
        ("gradient_checkpointing", lambda v: v in (True, False, *CHECKPOINTING), "true, false, min, selective or auto"),
    ]
    for key, holds, expected in rules:
        value = getattr(recipe, key)
        if value is not None and not holds(value):
            raise ValueError(f"{key}: must be {expected}, got {shown(value)}")


def _is_pattern(value: str | list[str]) -> bool:
    try:
        return isinstance(value, list) or bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _check_together(recipe: Recipe) -> None:
    if not recipe.model_name_or_path:
        raise ValueError("model_name_or_path: missing; give a model directory or a hub name")
    if (recipe.train_file is None) == (recipe.dataset_name is None):
        raise ValueError("train_file, dataset_name: give exactly one of the two")
    if recipe.eval_file is not None and recipe.dataset_test_split is not None:
        raise ValueError("eval_file, dataset_test_split: give one of the two, or neither")
    if recipe.dataset_test_split is not None and recipe.dataset_name is None:
        raise ValueError("dataset_test_split: needs dataset_name; with files, give eval_file")
    _check_method(recipe)
    if recipe.cuda_graphs and recipe.padding_free is False:
        raise ValueError("cuda_graphs: needs padding_free, which gives rows of few shapes")
    if recipe.torch_compile and not recipe.speed_up:
        raise ValueError("torch_compile: is a part of speed_up; set that to true")
    if recipe.torch_compile and recipe.cuda_graphs:
        raise ValueError("torch_compile, cuda_graphs: give one of the two")
    if recipe.activation_offloading and not recipe.gradient_checkpointing:
        raise ValueError("activation_offloading: moves inputs of recomputed layers; set gradient_checkpointing too")
    if recipe.activation_offloading and recipe.cuda_graphs:
        raise ValueError("activation_offloading, cuda_graphs: a recorded step keeps its tensors; give one of the two")
    if recipe.keep_expanded and recipe.quantize is None:
        raise ValueError("keep_expanded: only NF4 weights are expanded; set quantize to nf4, or keep_expanded to false")
    if recipe.keep_expanded and recipe.gradient_accumulation_steps == 1:
        raise ValueError("keep_expanded: with one micro-batch a step nothing is expanded twice; set it to false")
    if recipe.keep_expanded and recipe.cuda_graphs:
        raise ValueError("keep_expanded, cuda_graphs: a recorded step expands its weights itself; give one of the two")
    if recipe.warmup_steps and recipe.warmup_ratio:
        raise ValueError("warmup_steps, warmup_ratio: give one of the two")
    if recipe.lr_scheduler_type == "constant" and (recipe.warmup_steps or recipe.warmup_ratio):
        raise ValueError("lr_scheduler_type: constant has no warm-up; use constant_with_warmup")
    evaluates = recipe.eval_file is not None or recipe.dataset_test_split is not None
    if not evaluates and (recipe.eval_steps is not None or recipe.eval_on_start):
        raise ValueError("eval_steps, eval_on_start: nothing to evaluate on; give eval_file or dataset_test_split")


def _check_method(recipe: Recipe) -> None:
    own = _OF_METHOD[recipe.method]
    for method, keys in _OF_METHOD.items():
        for key in keys:
            if key not in own and getattr(recipe, key) != _DEFAULTS[key]:
                raise ValueError(f"{key}, method: {key} means nothing with method {recipe.method}, only with {method}")
    if recipe.method == "full" and recipe.quantize:
        raise ValueError(
            "quantize, method: full trains every weight, and one in 4 bits cannot be trained; set quantize to null"
        )
    if recipe.method in ("prefix", "prompt") and recipe.padding_free:
        raise ValueError(f"padding_free, method: {recipe.method} is put before each row, so examples cannot share one")
    if recipe.method == "prefix" and recipe.gradient_checkpointing:
        raise ValueError("gradient_checkpointing, method: a layer that is recomputed drops its prefix; set it to false")
    if not recipe.prefix_projection and recipe.encoder_hidden_size != _DEFAULTS["encoder_hidden_size"]:
        raise ValueError("encoder_hidden_size: is of prefix_projection; set that to true")


def from_mapping(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from key-value pairs.

    Raises:
        ValueError: a key that does not exist (the message says what it means here, or names the nearest), or a bad
            value.
    """
    for key in values:
        if key not in _TYPES:
            meant = answer(key if isinstance(key, str) else "", _TYPES)
            raise ValueError(f"{clipped(source)}: unknown key {shown(key)}{meant}")
    return Recipe(**values)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["learning_rate=1e-3", "target_modules=[q_proj, v_proj]"]` as a mapping; values are YAML."""
    parsed = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {shown(override)}: expected key=value")
        parsed[key.strip()] = _parsed(text, f"--set {shown(override)}: the value is")
    return parsed


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; elsewhere the last one wins in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where} not valid YAML ({error.problem or reason(error)}{at})") from error
    except RecursionError as error:
        raise ValueError(f"{where} not valid YAML (nested too deeply)") from error
    except Exception as error:  # what PyYAML makes of tags and numbers raises whatever its code meets
        raise ValueError(f"{where} not valid YAML ({reason(error)})") from error


def read(path: str | Path) -> dict[str, Any]:
    """The key-value pairs of a recipe file, or of a built-in one by its bare name, unchecked.

    Raises:
        ValueError: no such file, no valid YAML, or not a table of keys.
    """
    found, name = Path(path), clipped(str(path))
    built_in = {each.stem: each for each in BUILT_IN.glob("*.yaml")}
    if str(path) in built_in and not found.is_file():
        found = built_in[str(path)]
    try:
        text = read_text(found)
    except ValueError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        names = ", ".join(sorted(built_in))
        raise ValueError(f"{name}: no such recipe file, and not a built-in recipe ({names})") from error
    values = _parsed(text, f"{name}:")
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected `key: value` lines, found {type(values).__name__}")
    return values


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the file `path`, with `--set` overrides applied on top.

    Raises:
        ValueError: as `read`, `parse_overrides` and `from_mapping` say.
    """
    return from_mapping({**read(path), **parse_overrides(overrides)}, source=str(path))


def check_resumable(saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse to continue a run with a recipe that would have given other losses.

    With a constant learning rate the number of steps affects no loss, so it may be raised.

    Raises:
        ValueError: the recipes differ; the message names each key, with both values.
    """
    free = set(FREE_ON_RESUME)
    if recipe.lr_scheduler_type.startswith("constant") and not recipe.warmup_ratio:
        free |= {"max_steps", "num_train_epochs"}
    now = dataclasses.asdict(recipe)
    changed = [k for k in now if k not in free and k in saved and saved[k] != now[k]]
    if changed:
        listed = "; ".join(f"{k} was {shown(saved[k])}, is now {shown(now[k])}" for k in changed)
        raise ValueError(f"cannot resume with a changed recipe: {listed}. Restore it, or give another output_dir.")


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """The rate of `step` (from 0): linear warm-up, then as transformers' `lr_scheduler_type`.

    transformers' warm-up wastes its first step on a rate of 0; this one starts above. From the peak on they agree.
    """
    warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total_steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    share = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}.get(recipe.lr_scheduler_type, 1.0)
    return recipe.learning_rate * share


def describe() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, in order."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    rows = []
    for spec in dataclasses.fields(Recipe):
        default = yaml.safe_dump(spec.default).removesuffix("...\n").strip()
        rows.append((spec.name, default, typing.get_args(hints[spec.name])[-1]))
    return rows
