"""The contents of `adapter_config.json`: what peft needs to put the same adapters on the same modules."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any


def lora_config(ranks: Mapping[str, int], alphas: Mapping[str, float], **options: Any) -> dict[str, Any]:
    """A LoRA config with the commonest r and lora_alpha, and patterns for the layers with other values.

    Args:
        ranks, alphas: r and lora_alpha by the name of a layer or stack; at least one entry.
        options: peft's options that differ from peft's defaults.
    """
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "exclude_modules": None,
        "bias": "none",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
        "lora_bias": False,
        **options,
    }


def target_names(modules: Collection[str], layers: Collection[str]) -> list[str] | str:
    """The `target_modules` that mean these layers and no others by peft's rule: ends of names, names, or a pattern.

    Args:
        modules: names of all modules. layers: those of adapted layers; peft does not see the modules inside these.
    """
    names = [name.replace("_orig_mod.", "") for name in modules]
    outside = [name for name in names if not any(name.startswith(f"{layer}.") for layer in layers)]
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    for targets in (ends, sorted(layers)):
        meant = {name for name in outside if any(name == end or name.endswith(f".{end}") for end in targets)}
        if meant == set(layers):
            return targets
    return "|".join(re.escape(name) for name in layers)
