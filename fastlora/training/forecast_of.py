"""The forecast of a run's memory, from its recipe; and, after a run on a GPU, what was measured beside it.

`memory.json` in a run's directory holds both. `fastlora forecast --calibrate` reads such files.
"""

import json
from pathlib import Path
from typing import Any

import torch

from fastlora.files import atomic
from fastlora.memory.forecast import Setup, forecast
from fastlora.memory.shape import ModelShape, shape_of
from fastlora.memory.sizes import FP32, HALF
from fastlora.training.recipe import Recipe

NAME = "memory.json"
_CHECKPOINTING = {False: "none", True: "full", "min": "offload", "selective": "selective", "auto": "full"}
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_8bit": "adamw-8bit", "paged_adamw_8bit": "paged-adamw-8bit"}


def setup_of(recipe: Recipe, shape: ModelShape, tokens: int | None = None, **changes: Any) -> Setup:
    """What is run. `auto` checkpointing counts as full, the least that it may choose without "min".

    Args:
        tokens: of a micro-batch at most; None: samples of `max_length`.
        changes: of the setup, as devices and capability.
    """
    full, short = recipe.method == "full", recipe.bf16 is not False
    targets = recipe.target_modules
    names = {linear.name for linear in shape.linears}
    listed = tuple(name for name in targets if name in names) if isinstance(targets, list) else "all-linear"
    batch = recipe.per_device_train_batch_size
    length = recipe.max_length if tokens is None else max(1, -(-tokens // batch))
    return Setup(
        shape,
        recipe.method,
        length,
        batch,
        recipe.r,
        listed or "all-linear",
        bottleneck=recipe.bottleneck,
        virtual_tokens=recipe.num_virtual_tokens,
        quantized="nf4-nested" if recipe.quantize else "",
        width=HALF if short and not full else FP32,
        dropout=recipe.lora_dropout,
        optimizer=_OPTIMIZERS[recipe.optim],
        runtime="fastlora" if recipe.speed_up else "peft-lean",
        checkpointing=_CHECKPOINTING[recipe.gradient_checkpointing],
        autocast=short and (full or not recipe.speed_up),
        micro_batches=recipe.gradient_accumulation_steps,
        **changes,
    )


def write(directory: Path, recipe: Recipe, config: Any, device: torch.device, devices: int, tokens: int) -> None:
    """Write what was measured on a CUDA device beside the forecast; nothing for a model whose shape is not known."""
    try:
        shape = shape_of(config.to_dict())
    except ValueError:
        return
    major, minor = torch.cuda.get_device_capability(device)
    sharding = "ddp" if devices > 1 else "none"
    setup = setup_of(recipe, shape, tokens, devices=devices, sharding=sharding, capability=10 * major + minor)
    found = forecast(setup)
    facts = {
        "device": torch.cuda.get_device_name(device),
        "model_type": shape.model_type,
        "method": recipe.method,
        "quantize": recipe.quantize,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "tokens": tokens,
        "measured_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "measured_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "forecast_allocated_bytes": found.allocated,
        "forecast_terms": found.terms,
    }
    atomic.write_text(directory / NAME, json.dumps(facts, indent=1) + "\n")


def compared(directories: list[Path]) -> list[tuple[Path, dict[str, Any], float]]:
    """Each run's facts, and forecast over measured, less one.

    Raises:
        ValueError: a folder without a file of measurements, or with a damaged one.
    """
    found = []
    for directory in directories:
        path = directory / NAME
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            error = facts["forecast_allocated_bytes"] / facts["measured_allocated_bytes"] - 1
        except FileNotFoundError as missing:
            raise ValueError(f"{path}: no such file; a run on a GPU writes it when it ends") from missing
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as damage:
            raise ValueError(f"{path} is damaged ({damage})") from damage
        found.append((directory, facts, error))
    return found
