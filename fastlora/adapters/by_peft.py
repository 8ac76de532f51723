"""Adapters that need peft's own layers, such as DoRA: put into a plain model by peft, then sped up in place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.contents import renamed
from fastlora.files.peft_files import differences, load_with_peft
from fastlora.layers.quoted import reason
from fastlora.model import replace
from fastlora.model.settings import unsupported

_PARTS = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", "lora_B.bias")


def base_of(model: Any) -> nn.Module:
    """The model whose modules a file's names are for: the one inside a `PeftModel`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def needs_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds what fastlora's own layers do not compute."""
    return bool(unsupported(config)) or any(part in key for key in tensors for part in _PARTS)


def load(
    model: nn.Module,
    directory: Path,
    tensors: dict[str, Tensor],
    adapter_name: str,
    options: Mapping[str, Any],
) -> None:
    """Let peft put its layers into a plain model and fill them, then speed them up; all is trainable.

    Raises:
        ValueError: peft is not installed, options for fastlora's own layers were given, or the file does not fit. The
            model is unchanged.
    """
    try:
        from peft import PeftConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ValueError(f"{directory} needs peft's layers, and peft is not installed: pip install peft") from error
    if options:
        raise ValueError(
            f"{directory} needs peft's layers, which do not take {next(iter(options))}: load the base in 4 bits with "
            "bitsandbytes, or leave the option out"
        )
    try:
        peft_config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:
        raise ValueError(f"{directory}: peft refuses its config ({reason(error)})") from error
    peft_config.inference_mode = False
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    children = [(module, dict(module._modules)) for module in model.modules()]
    try:
        LoraModel(model, {adapter_name: peft_config}, adapter_name)
        tensors, _ = renamed(model, tensors)
        if problems := differences(model, tensors, adapter_name):
            raise ValueError(problems[0])
        load_with_peft(model, directory, vars(peft_config), tensors, adapter_name)
        replace.replace_linear(model)
    except Exception as error:
        for module, own in children:
            module._modules = own
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        vars(model).pop("peft_config", None)
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{directory} does not fit ({reason(error)})") from error
