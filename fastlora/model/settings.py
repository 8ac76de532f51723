"""What a user asks for: LoRA's settings, from keywords or from a peft config, and the modules that they select.

The rules for names are peft's (`model.names`). peft ignores an entry that matches nothing. Here it is an error that
names the nearest modules, because it is nearly always a misspelling.
"""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from fastlora.kernels.operands import BLOCKSIZES
from fastlora.layers import starts
from fastlora.layers.quoted import shown
from fastlora.model import eva
from fastlora.model.names import (
    ALL_LINEAR,
    check_names,
    check_patterns,
    fits_pattern,
    matches,
    means,
    nearest,
    within,
)

# Options that do not affect the computation, whatever their value; fan_in_fan_out is read off the layers.
_INERT = ("fan_in_fan_out", "peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size")
# Options of peft's that change what is computed or trained, and that only peft's layers have.
_PEFTS = (
    "bias", "megatron_config", "corda_config", "lora_ga_config", "use_dora", "velora_config", "alora_invocation_tokens",
    "use_qalora", "monteclora_config", "layer_replication", "runtime_config", "lora_bias", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying",
)  # fmt: skip
# Values that turn an option off.
_OFF = (None, False, "none", 0)
# The heads that peft trains and saves too, by the task.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class LoRASettings:
    """LoRA's options, under peft's names. None is an empty pattern.

    Raises:
        ValueError: a value out of its range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] | None = ALL_LINEAR
    exclude_modules: str | Collection[str] | None = None
    target_parameters: Collection[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    init_lora_weights: bool | str = True
    modules_to_save: Collection[str] | None = None
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    eva_config: Any = None
    loftq_config: Any = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for option in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, option, getattr(self, option) or {})
            check_patterns(option, getattr(self, option))
        for name, r in [("r", self.r), *((f"rank_pattern[{shown(key)}]", r) for key, r in self.rank_pattern.items())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {shown(r)}")
        alphas = [("lora_alpha", self.lora_alpha)]
        alphas += [(f"alpha_pattern[{shown(key)}]", alpha) for key, alpha in self.alpha_pattern.items()]
        for name, alpha in alphas:
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ValueError(f"{name} must be a finite number, not {shown(alpha)}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, not {shown(self.lora_dropout)}")
        starts.check_known(self.init_lora_weights)
        for init, option in (("eva", "eva_config"), ("loftq", "loftq_config")):
            if getattr(self, option) is not None and self.init_lora_weights != init:
                raise ValueError(f"{option} is for init_lora_weights={init!r}, not {shown(self.init_lora_weights)}")
        eva.config_of(self.eva_config)
        starts.loftq_iterations(self.loftq_config)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        layers, patterns = self.layers_to_transform, self.layers_pattern
        if not isinstance(layers, (int, type(None))) and not (
            isinstance(layers, Collection) and all(isinstance(layer, int) for layer in layers)
        ):
            raise ValueError(f"layers_to_transform must be a number or a list of numbers, not {shown(layers)}")
        check_names("layers_pattern", patterns)
        for pattern in () if isinstance(patterns, str) else patterns or ():
            check_names("layers_pattern", pattern)
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of names: pass [{shown(getattr(self, name))}]")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            check_names(name, getattr(self, name))
        tokens = self.trainable_token_indices
        for each in tokens.values() if isinstance(tokens, Mapping) else () if tokens is None else (tokens,):
            if isinstance(each, str) or not isinstance(each, Collection):
                raise ValueError(f"trainable_token_indices must hold lists of tokens, not {shown(each)}")

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """r and lora_alpha of one module, each by the first pattern that fits its name."""
        r = next((r for key, r in self.rank_pattern.items() if fits_pattern(key, name)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if fits_pattern(key, name)), self.lora_alpha)
        return r, alpha

    def means_parameter(self, name: str) -> bool:
        """Whether a parameter of this name is one of `target_parameters`, and neither it nor its module is excluded.

        `exclude_modules` and `layers_to_transform` apply to stacks as to layers; peft adapts every stack that is named.
        """
        excluded = any(matches(self.exclude_modules, each) for each in (name, name.rpartition(".")[0]))
        entries = self.target_parameters or ()
        wanted = any(means(entry, name) for entry in entries)
        return wanted and not excluded and self.wants_layer(name, entries)

    def wants_layer(self, name: str, entries: Collection[str]) -> bool:
        """Whether `layers_to_transform` includes the layer that a module of this name belongs to.

        By peft's rule the layer's index is the first number in the name, or the one after one of `layers_pattern`. A
        module that is named whole among the entries, such as the head, is included whatever its index.
        """
        wanted, patterns = self.layers_to_transform, self.layers_pattern or ()
        wanted = [wanted] if isinstance(wanted, int) else wanted
        if not wanted or name in entries:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
        found = (re.match(rf"{start}\.(?P<index>\d+)\.", name) for start in starts)
        first = next(filter(None, found), None)
        return first is not None and int(first["index"]) in wanted

    @property
    def loftq_iter(self) -> int:
        """The number of LoftQ's iterations."""
        return starts.loftq_iterations(self.loftq_config)

    def check_patterns_fit(self, names: Collection[str]) -> None:
        """Raise ValueError if an entry of rank_pattern or alpha_pattern fits none of these layers and stacks."""
        names = list(names)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                if not any(fits_pattern(key, name) for name in names):
                    raise ValueError(f"{option}: {shown(key)} fits none of the adapted layers{nearest(key, names)}")


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """How new layers are made: the options of `replace_linear` that are not peft's, under its names.

    Raises:
        ValueError: a value out of its range.
    """

    quantize: str | None = None
    blocksize: int = 64
    double_quant: bool = True
    adapter_name: str = "default"
    adapter_dtype: torch.dtype | None = None
    eva_dataloader: Any = None

    def __post_init__(self) -> None:
        if self.quantize not in (None, "nf4"):
            raise ValueError(f"quantize must be None or 'nf4', not {shown(self.quantize)}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {self.blocksize}")
        if not isinstance(self.adapter_name, str) or not self.adapter_name or "." in self.adapter_name:
            raise ValueError(f"adapter_name must be a name without dots, not {shown(self.adapter_name)}")


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """The options of peft that a config sets and that fastlora's own layers do not have."""
    return [name for name in _PEFTS if not _is_off(config.get(name))]


def with_head(settings: LoRASettings, modules: Collection[str]) -> LoRASettings:
    """Where the task is one for which peft trains and saves the model's head too, the same with its name added.

    Args:
        modules: the names of the model's modules.
    Raises:
        ValueError: the model has no such head.
    """
    wanted, possible = list(settings.modules_to_save or ()), _HEADS.get(settings.task_type or "", ())
    heads = [head for head in possible if any(means(head, name) for name in modules)]
    if possible and not heads and not wanted:
        raise ValueError(
            f"task_type={settings.task_type} trains the head of the task too, and the model has no "
            f"{' and no '.join(possible)}: name its head in modules_to_save, or load the model for the task"
        )
    added = [head for head in heads if head not in wanted]
    return replace(settings, modules_to_save=[*wanted, *added]) if added else settings


def settings_from_config(config: Any, strict: bool = True) -> LoRASettings:
    """Settings from a peft `LoraConfig`, or from the mapping in an `adapter_config.json`.

    Args:
        strict: an option that fastlora does not know, as of a newer peft, is an error; else it is ignored, as peft
            does, and named in a warning.
    Raises:
        ValueError: the config is not LoRA's, or it sets an option that is not supported. The message names it.
    """
    options = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    method = getattr(options.get("peft_type"), "value", options.get("peft_type"))
    if method != "LORA":
        raise ValueError(
            f"the config is for {shown(method or type(config).__name__)}; only peft_type LORA is supported"
        )
    supported = [option.name for option in fields(LoRASettings)]
    unknown = [name for name in options if name not in (*supported, *_INERT, *_PEFTS) and not _is_off(options[name])]
    for name in (*unsupported(options), *(unknown if strict else ())):
        raise ValueError(
            f"{name}={shown(options[name])} is not supported by replace_linear: leave it off, or wrap the model with "
            "peft (get_peft_model) and call replace_linear on the result, which speeds up the layers it can"
        )
    if unknown:
        warnings.warn(f"ignored, as not known here: {', '.join(unknown)} of the adapter's config", stacklevel=3)
    taken = {name: options[name] for name in supported if options.get(name) is not None}
    if not taken.get("loftq_config"):  # peft's default is an empty mapping
        taken.pop("loftq_config", None)
    taken.setdefault("target_modules", None)
    if "task_type" in taken:
        taken["task_type"] = str(getattr(taken["task_type"], "value", taken["task_type"]))
    return LoRASettings(**taken)


def select(
    settings: LoRASettings,
    names: Collection[str],
    linear: Collection[str],
    head: str | None,
    strict: bool = True,
    stacks: Collection[str] = (),
) -> tuple[set[str], set[str]]:
    """The module names that the settings target, and those that they exclude.

    Args:
        names: of all modules. linear: of the linear layers.
        head: name of the output head, which "all-linear" does not include.
        strict: every entry of a list must match something; else one entry is enough.
        stacks: names of stacks of experts, which an error tells how to adapt.
    Raises:
        ValueError: nothing matched, or a module matched that is not a linear layer.
    """
    names = [name for name in names if name]
    linear = set(linear)
    targets = settings.target_modules
    ends = sorted({".".join(name.split(".")[-2:]) for name in stacks})
    of_experts = f"; experts are stacks of weights, not layers: target_parameters={ends!r} adapts them" if ends else ""
    excluded = {name for name in names if matches(settings.exclude_modules, name)}
    if settings.exclude_modules and not excluded:
        raise ValueError(f"exclude_modules={shown(settings.exclude_modules)} matches no module")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return {name for name in linear if name not in excluded and not within(name, head)}, excluded
    if not targets and settings.target_parameters:
        return set(), excluded
    if targets is None:
        raise ValueError("the config names no target_modules: give a list of names or 'all-linear'")
    matched = {name for name in names if matches(targets, name)}
    if isinstance(targets, str) and not matched:
        hint = f"a string is a regular expression for the whole name; for the end of a name, pass [{shown(targets)}]"
        raise ValueError(f"target_modules={shown(targets)} matches no module ({hint}){nearest(targets, linear)}")
    if not isinstance(targets, str):
        missing = [entry for entry in targets if not any(matches([entry], name) for name in names)]
        if missing and (strict or not matched):
            raise ValueError(
                f"target_modules: {shown(missing[0])} matches no module{nearest(missing[0], linear)}{of_experts}"
            )
        matched = {name for name in matched if settings.wants_layer(name, targets)}
    chosen = matched - excluded
    if not chosen:
        raise ValueError(
            f"target_modules={shown(targets)} with exclude_modules={shown(settings.exclude_modules)} and "
            f"layers_to_transform={shown(settings.layers_to_transform)} leaves no layer to adapt"
        )
    wrong = sorted(chosen - linear)
    if wrong:
        inside = sorted({name.rsplit(".", 1)[-1] for name in linear if name.startswith(wrong[0] + ".")})
        hint = f"; linear layers in it: {', '.join(inside)}" if inside else of_experts
        raise ValueError(f"target_modules={shown(targets)} matches {wrong[0]!r}, which is not a linear layer{hint}")
    return chosen, excluded


def _is_off(value: Any) -> bool:
    return value in _OFF if isinstance(value, (bool, int, str, type(None))) else _is_empty(value)


def _is_empty(value: Any) -> bool:
    """Whether a structured option is off: an empty container, or a dataclass in which every option is off."""
    if hasattr(value, "__dataclass_fields__"):
        return not any(vars(value).values())
    return not value
