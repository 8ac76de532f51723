"""A model's adapters as the contents of `adapter_config.json`."""

import dataclasses
import functools
from typing import Any

from torch import Tensor, nn

from fastlora.files.config import lora_config, target_names
from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.model import trained_modules, trained_tokens
from fastlora.model.settings import LoRASettings

_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("ForConditionalGeneration", "SEQ_2_SEQ_LM"))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's `LoRALinear` layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def settings_of(model: nn.Module) -> LoRASettings:
    """The settings that a model was adapted with, or the parts of it were; `modules_to_save` are whole names."""
    found: LoRASettings | None = None
    names: list[str] = []
    for name, module in model.named_modules():
        settings: LoRASettings | None = getattr(module, "fastlora_settings", None)
        if settings is not None:
            names += [f"{name}.{each}".lstrip(".") for each in settings.modules_to_save or ()]
            found = found or settings
    return dataclasses.replace(found or LoRASettings(), modules_to_save=names or None)


def adapter_config(model: nn.Module, layers: dict[str, LoRALinear], adapter_name: str) -> dict[str, Any]:
    """What peft needs to put the same adapters on the same modules: the contents of `adapter_config.json`."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    first: Any = next(iter([*layers.values(), *adapted_experts(model).values()]))
    use_rslora: bool = first.use_rslora[adapter_name] if layers else first.use_rslora

    def add(name: str, r: int, alpha: float, rslora: bool, widen: int = 1) -> None:
        """The scaling stays the same under the config's use_rslora, and at `widen` times the rank."""
        ranks[name] = r * widen
        alphas[name] = alpha if rslora == use_rslora else alpha * (r**0.5 if rslora else r**-0.5)
        alphas[name] *= widen**0.5 if use_rslora else widen

    for name, layer in layers.items():
        # what was taken out of the base doubles the saved rank
        widen = 2 if adapter_name in layer.taken_out else 1
        add(name, layer.r[adapter_name], layer.lora_alpha[adapter_name], layer.use_rslora[adapter_name], widen)
    for name, experts in adapted_experts(model).items():
        for key, r in experts.r.items():
            add(f"{name}.{key}", r, experts.lora_alpha[key], experts.use_rslora)
    settings = settings_of(model)
    task = next((task for end, task in _TASKS if type(model).__name__.endswith(end)), None)
    rows = {name: layer.indices.tolist() for name, layer in trained_tokens.layers(model).items()}
    return lora_config(
        ranks,
        alphas,
        task_type=settings.task_type or task,
        base_model_name_or_path=settings.base_model_name_or_path or base_name(model),
        revision=settings.revision,
        lora_dropout=getattr(first.lora_dropout[adapter_name], "p", 0.0) if layers else 0.0,
        use_rslora=use_rslora,
        target_modules=target_names([name for name, _ in model.named_modules()], layers),
        target_parameters=_target_parameters(model),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        modules_to_save=trained_names(model, settings),
        trainable_token_indices=rows or None,
    )


def base_name(model: Any) -> str | None:
    """The hub id or folder that a model came from; None where it has none, or was merged and is another model now."""
    if getattr(model, "fastlora_merged", False):
        return None
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _target_parameters(model: nn.Module) -> list[str] | None:
    """The `target_parameters` that mean these stacks and no others: their whole names."""
    return [f"{name}.{key}" for name, experts in adapted_experts(model).items() for key in experts.r] or None


def trained_names(model: nn.Module, settings: LoRASettings) -> list[str] | None:
    """`modules_to_save`: whole names, including those of modules that share a parameter."""
    names = list(trained_modules.find(model, settings.modules_to_save))
    return trained_modules.tied_names(model, names) or None


def resized_vocabulary(model: Any, base: str | None) -> dict[str, Tensor]:
    """The weights of the embedding and the output head by name, where they have other rows than the base has on disk.

    Without a copy of the base's config on this machine they are taken to be as they were.
    """
    own = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    size = getattr(own, "vocab_size", None)
    if not base or not size or not _vocabulary(base) or _vocabulary(base) == size:
        return {}
    found = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = next((name for name, each in model.named_modules() if each is module and name), None)
        base_layer = getattr(module, "base_layer", module)
        if name and isinstance(getattr(base_layer, "weight", None), Tensor):
            inside = "token_adapter." if isinstance(module, trained_tokens.TrainedTokens) else ""
            end = f"{inside}base_layer.weight" if base_layer is not module else "weight"
            found[f"{name}.{end}"] = base_layer.weight
    return found


@functools.cache
def _vocabulary(base: str) -> int | None:
    """The number of tokens of a model on this machine, by its name or path; None where it is not found."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError):
        return None
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size
