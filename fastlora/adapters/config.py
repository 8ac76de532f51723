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
    """The settings that a model was adapted with, or that a model inside it was; `modules_to_save` are whole names."""
    for name, module in model.named_modules():
        settings: LoRASettings | None = getattr(module, "fastlora_settings", None)
        if settings is not None and not name:
            return settings
        if settings is not None:
            names = [f"{name}.{each}" for each in settings.modules_to_save or ()]
            return dataclasses.replace(settings, modules_to_save=names or None)
    return LoRASettings()


def adapter_config(model: nn.Module, layers: dict[str, LoRALinear], adapter_name: str) -> dict[str, Any]:
    """What peft needs to put the same adapters on the same modules: the contents of `adapter_config.json`."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        # what was taken out of the base doubles the saved rank; the scaling stays the same
        widen = 2 if adapter_name in layer.taken_out else 1
        ranks[name] = layer.r[adapter_name] * widen
        alphas[name] = layer.lora_alpha[adapter_name] * (widen**0.5 if layer.use_rslora[adapter_name] else widen)
    first: Any = next(iter([*layers.values(), *adapted_experts(model).values()]))
    for name, experts in adapted_experts(model).items():
        ranks |= {f"{name}.{key}": r for key, r in experts.r.items()}
        alphas |= {f"{name}.{key}": alpha for key, alpha in experts.lora_alpha.items()}
    settings = settings_of(model)
    task = next((task for end, task in _TASKS if type(model).__name__.endswith(end)), None)
    base = settings.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    rows = {name: layer.indices.tolist() for name, layer in trained_tokens.layers(model).items()}
    return lora_config(
        ranks,
        alphas,
        task_type=settings.task_type or task,
        base_model_name_or_path=base or None,
        revision=settings.revision,
        lora_dropout=getattr(first.lora_dropout[adapter_name], "p", 0.0) if layers else 0.0,
        use_rslora=first.use_rslora[adapter_name] if layers else first.use_rslora,
        target_modules=target_names([name for name, _ in model.named_modules()], layers),
        target_parameters=_target_parameters(model),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        modules_to_save=trained_names(model, settings),
        trainable_token_indices=rows or None,
    )


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
            found[f"{name}.base_layer.weight" if base_layer is not module else f"{name}.weight"] = base_layer.weight
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
