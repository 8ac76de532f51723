"""The contents of `adapter_config.json`: what peft needs to put the same adapters on the same modules."""

import re
from collections import Counter
from typing import Any

from torch import nn

from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.model import trained_modules, trained_tokens
from fastlora.model.settings import LoRASettings

_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("ForConditionalGeneration", "SEQ_2_SEQ_LM"))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's `LoRALinear` layers by name, without torch.compile's part in the names."""
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def adapter_config(model: nn.Module, layers: dict[str, LoRALinear], adapter_name: str) -> dict[str, Any]:
    """What peft needs to put the same adapters on the same modules: the contents of `adapter_config.json`."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        # what has been taken out of the base doubles the rank, and the scaling stays what it is
        widen = 2 if adapter_name in layer.taken_out else 1
        ranks[name] = layer.r[adapter_name] * widen
        alphas[name] = layer.lora_alpha[adapter_name] * (widen**0.5 if layer.use_rslora[adapter_name] else widen)
    first: Any = next(iter([*layers.values(), *adapted_experts(model).values()]))
    for name, experts in adapted_experts(model).items():
        ranks |= {f"{name}.{key}": r for key, r in experts.r.items()}
        alphas |= {f"{name}.{key}": alpha for key, alpha in experts.lora_alpha.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = getattr(model, "fastlora_settings", None) or LoRASettings()
    task = next((task for end, task in _TASKS if type(model).__name__.endswith(end)), None)
    base = settings.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": settings.task_type or task,
        "base_model_name_or_path": base or None,
        "revision": settings.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": getattr(first.lora_dropout[adapter_name], "p", 0.0) if layers else 0.0,
        "use_rslora": first.use_rslora[adapter_name] if layers else first.use_rslora,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": _target_names(model, layers),
        "exclude_modules": None,
        "target_parameters": _target_parameters(model),
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": trained_names(model, settings),
        "trainable_token_indices": {
            name: layer.indices.tolist() for name, layer in trained_tokens.layers(model).items()
        }
        or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
        "lora_bias": False,
    }


def _target_parameters(model: nn.Module) -> list[str] | None:
    """`target_parameters` that mean these stacks and no others: their whole names."""
    return [f"{name}.{key}" for name, experts in adapted_experts(model).items() for key in experts.r] or None


def trained_names(model: nn.Module, settings: LoRASettings) -> list[str] | None:
    """`modules_to_save`: whole names, with those of modules that share a parameter."""
    names = list(trained_modules.find(model, settings.modules_to_save))
    return trained_modules.tied_names(model, names) or None


def _target_names(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str] | str:
    """`target_modules` that by peft's rule means these layers and no others: ends of names, names, or a pattern."""
    names = [name.replace("_orig_mod.", "") for name, _ in model.named_modules()]
    # what lies inside a fastlora layer is not there when peft looks at the bare model
    outside = [name for name in names if not any(name.startswith(f"{layer}.") for layer in layers)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for targets in (ends, sorted(layers)):
        meant = {name for name in outside if any(name == end or name.endswith(f".{end}") for end in targets)}
        if meant == layers.keys():
            return targets
    return "|".join(re.escape(name) for name in layers)
