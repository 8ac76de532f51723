"""What a user asks for: LoRA's settings, from keywords or from a peft config, and which module names they mean.

The rules for names are peft's. "all-linear" means every linear layer but the output head; a list means modules whose
name is an entry or ends in "." + an entry; a string is a regular expression for the whole name. peft ignores an entry
that matches nothing; here it is an error that names the nearest modules, for it is nearly always a misspelling.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlora import eva
from fastlora.layers import starts

ALL_LINEAR = "all-linear"

# Options of peft's LoraConfig that LoRASettings holds under the same name.
_TAKEN = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "modules_to_save",
    "trainable_token_indices",
    "eva_config",
    "loftq_config",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
# Options that say nothing about the computation, with any value; fan_in_fan_out is seen from the layers.
_INERT = ("fan_in_fan_out", "peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size")
# Values of any other option that leave it off. A newer peft's unknown option is refused unless it is off.
_OFF = (None, False, "none", 0)
# Tasks for which peft trains and saves the head as well.
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class LoRASettings:
    """LoRA's options, under peft's names.

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
            _check_patterns(option, getattr(self, option))
        for name, r in [("r", self.r), *((f"rank_pattern[{key!r}]", r) for key, r in self.rank_pattern.items())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {r!r}")
        alphas = [("lora_alpha", self.lora_alpha)]
        alphas += [(f"alpha_pattern[{key!r}]", alpha) for key, alpha in self.alpha_pattern.items()]
        for name, alpha in alphas:
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ValueError(f"{name} must be a finite number, not {alpha!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        starts.check(self.init_lora_weights)
        for init, option in (("eva", "eva_config"), ("loftq", "loftq_config")):
            if getattr(self, option) is not None and self.init_lora_weights != init:
                raise ValueError(f"{option} is for init_lora_weights={init!r}, and that is {self.init_lora_weights!r}")
        eva.config_of(self.eva_config)
        starts.loftq_iterations(self.loftq_config)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of names: pass [{getattr(self, name)!r}]")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            _check_names(name, getattr(self, name))

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """r and lora_alpha of one module; the first pattern that fits its name, or its end from a dot on, decides."""
        r = next((r for key, r in self.rank_pattern.items() if _fits_pattern(key, name)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if _fits_pattern(key, name)), self.lora_alpha)
        return r, alpha

    def means_parameter(self, name: str) -> bool:
        """Whether a parameter of this name is one of `target_parameters`, and neither it nor its module is left out.

        What leaves out layers leaves out stacks by the same rules; peft adapts all stacks that are named.
        """
        left_out = any(_matches(self.exclude_modules, each) for each in (name, name.rpartition(".")[0]))
        wanted = any(means(entry, name) for entry in self.target_parameters or ())
        return wanted and not left_out and _layer_wanted(self, name)

    @property
    def loftq_iter(self) -> int:
        """How many iterations of LoftQ."""
        return starts.loftq_iterations(self.loftq_config)

    def check_patterns(self, names: Collection[str]) -> None:
        """Raise ValueError where an entry of rank_pattern or alpha_pattern fits none of these layers and stacks."""
        names = list(names)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                if not any(_fits_pattern(key, name) for name in names):
                    raise ValueError(f"{option}: {key!r} fits none of the adapted layers{nearest(key, names)}")


def settings_from_config(config: Any) -> LoRASettings:
    """Settings from a peft `LoraConfig`, or from the mapping in an `adapter_config.json`.

    Raises:
        ValueError: the config is not LoRA's, or sets an option that is not supported, named in the message.
    """
    options = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    method = getattr(options.get("peft_type"), "value", options.get("peft_type"))
    if method != "LORA":
        raise ValueError(f"the config is for {method or type(config).__name__!r}; only peft_type LORA is supported")
    for name, value in options.items():
        if name in _TAKEN or name in _INERT:
            continue
        if not (value in _OFF if isinstance(value, (bool, int, str, type(None))) else _is_empty(value)):
            raise ValueError(
                f"{name}={value!r} is not supported by replace_linear: leave it off, or wrap the model with peft "
                "(get_peft_model) and call replace_linear on the result, which speeds up the layers it can"
            )
    taken = {name: options[name] for name in _TAKEN if options.get(name) is not None}
    if not taken.get("loftq_config"):  # an empty mapping where peft has none
        taken.pop("loftq_config", None)
    for name in ("rank_pattern", "alpha_pattern"):
        taken[name] = taken.get(name) or {}
    taken.setdefault("target_modules", None)
    if "task_type" in taken:
        taken["task_type"] = str(getattr(taken["task_type"], "value", taken["task_type"]))
        if taken["task_type"] in _HEAD_TASKS:
            raise ValueError(
                f"task_type={taken['task_type']} makes peft train and save the head too, which replace_linear does not "
                "do: wrap the model with peft and call replace_linear on the result"
            )
    return LoRASettings(**taken)


def select(
    settings: LoRASettings, names: Collection[str], linear: Collection[str], head: str | None, strict: bool = True
) -> tuple[set[str], set[str]]:
    """The module names that the settings target, and those they exclude.

    Args:
        names: all module names.
        linear: those of linear layers.
        head: name of the output head, which "all-linear" leaves alone.
        strict: refuse a list in which any entry matches nothing.
    Raises:
        ValueError: nothing matched, or a module that is not a linear layer did.
    """
    names = [name for name in names if name]
    linear = set(linear)
    targets = settings.target_modules
    excluded = {name for name in names if _matches(settings.exclude_modules, name)}
    if settings.exclude_modules and not excluded:
        raise ValueError(f"exclude_modules={settings.exclude_modules!r} matches no module")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return {name for name in linear if name not in excluded and not within(name, head)}, excluded
    if not targets and settings.target_parameters:
        return set(), excluded
    if targets is None:
        raise ValueError("the config names no target_modules: give a list of names or 'all-linear'")
    matched = {name for name in names if _matches(targets, name)}
    if isinstance(targets, str) and not matched:
        hint = f"a string is a regular expression for the whole name; for names that end so, pass [{targets!r}]"
        raise ValueError(f"target_modules={targets!r} matches no module ({hint}){nearest(targets, linear)}")
    if not isinstance(targets, str):
        missing = [entry for entry in targets if not any(_matches([entry], name) for name in names)]
        if missing and (strict or not matched):
            raise ValueError(f"target_modules: {missing[0]!r} matches no module{nearest(missing[0], linear)}")
        matched = {name for name in matched if _layer_wanted(settings, name)}
    chosen = matched - excluded
    if not chosen:
        raise ValueError(
            f"target_modules={_shown(targets)} with exclude_modules={_shown(settings.exclude_modules)} and "
            f"layers_to_transform={_shown(settings.layers_to_transform)} leaves no layer to adapt"
        )
    wrong = sorted(chosen - linear)
    if wrong:
        inside = sorted({name.rsplit(".", 1)[-1] for name in linear if name.startswith(wrong[0] + ".")})
        hint = f"; linear layers in it: {', '.join(inside)}" if inside else ""
        raise ValueError(f"target_modules={_shown(targets)} matches {wrong[0]!r}, which is not a linear layer{hint}")
    return chosen, excluded


def means(entry: str, name: str) -> bool:
    """Whether an entry of a list is this name, or its end from a dot on."""
    return name == entry or name.endswith(f".{entry}")


def within(name: str, head: str | None) -> bool:
    """Whether a module is the output head or lies inside it."""
    return head is not None and (name == head or name.startswith(head + "."))


def nearest(wanted: str, names: Collection[str]) -> str:
    """ "; nearest: ..." with the names most like the wanted one, whole or by their last part; empty without names."""
    names = list(names)
    by_end = {name.rsplit(".", 1)[-1] for name in names}
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], sorted(by_end), n=3, cutoff=0.4)
    close += [name for name in difflib.get_close_matches(wanted, names, n=1, cutoff=0.6) if name not in close]
    found = close or sorted(by_end)[:8]
    return f"; nearest: {', '.join(found)}" if found else ""


def _fits_pattern(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _matches(wanted: str | Collection[str] | None, name: str) -> bool:
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(means(entry, name) for entry in wanted)


def _layer_wanted(settings: LoRASettings, name: str) -> bool:
    """peft's rule: the layer index is the first number in the name, or that after one of `layers_pattern`."""
    if settings.layers_to_transform is None:
        return True
    wanted = settings.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    patterns = settings.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns]
    if not patterns:
        found = [re.match(r".*?\.[^.]*\.(\d+)\.", name)]
    index = next((int(match.group(1)) for match in found if match), None)
    return not wanted or index in wanted


def _check_names(option: str, value: str | Collection[str] | None) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{option}={value!r} is not a regular expression: {error}") from error
    elif value is not None:
        if not isinstance(value, Collection):
            raise ValueError(f"{option} must be a string or a list of strings, not {value!r}")
        odd = [entry for entry in value if not isinstance(entry, str)]
        if odd:
            raise ValueError(f"{option} must hold strings; got {odd[0]!r}")


def _check_patterns(option: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{option} must be a mapping of patterns for names to numbers, not {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{option} must have strings as keys; got {key!r}")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{option}: {key!r} is not a regular expression: {error}") from error


def _is_empty(value: Any) -> bool:
    """Whether a structured option is off: an empty container, or a group of options all of them off."""
    if hasattr(value, "__dataclass_fields__"):
        return not any(vars(value).values())
    return not value


def _shown(value: Any) -> str:
    return repr(sorted(value) if isinstance(value, (set, frozenset)) else value)
