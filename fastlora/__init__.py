"""fastlora: LoRA and QLoRA fine-tuning at the cost of the bare matrix product.

model = fastlora.replace_linear(model, r=16, lora_alpha=32, quantize="nf4")
print(model.fastlora_report.summary())
...                                             # train it as before
fastlora.save_adapter(model, "my-adapter")      # peft's format
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a source checkout the kernels lie beside this package, at the repository's top level.
_root = Path(__file__).resolve().parent
if not (_root / "kernels").is_dir():
    __path__.append(str(_root.parent))

if TYPE_CHECKING:
    from fastlora.adapter import load_adapter, save_adapter
    from fastlora.expert_layers import LoRAExperts
    from fastlora.experts import quantize_experts
    from fastlora.layer_report import Report
    from fastlora.linear import LoRALinear, NF4Linear
    from fastlora.merging import merge
    from fastlora.ops.backend import backend
    from fastlora.ops.grouped import grouped_lora_linear
    from fastlora.ops.linear import lora_linear, nf4_dequantize, nf4_linear
    from fastlora.ops.nf4 import NF4Weight, quantize
    from fastlora.quantizer import FastLoRANF4Config
    from fastlora.replace import replace_linear, report, restore

__version__ = "0.1.0"
__all__ = [
    "FastLoRANF4Config",
    "LoRAExperts",
    "LoRALinear",
    "NF4Linear",
    "NF4Weight",
    "Report",
    "backend",
    "grouped_lora_linear",
    "load_adapter",
    "lora_linear",
    "merge",
    "nf4_dequantize",
    "nf4_linear",
    "quantize",
    "quantize_experts",
    "replace_linear",
    "report",
    "restore",
    "save_adapter",
]

# Imported at first use: the command line answers without waiting for torch.
_HOMES = {
    "adapter": ("load_adapter", "save_adapter"),
    "expert_layers": ("LoRAExperts",),
    "experts": ("quantize_experts",),
    "functional": ("backend", "lora_linear", "nf4_dequantize", "nf4_linear"),
    "grouped": ("grouped_lora_linear",),
    "layer_report": ("Report",),
    "linear": ("LoRALinear", "NF4Linear"),
    "merging": ("merge",),
    "nf4": ("NF4Weight", "quantize"),
    "quantizer": ("FastLoRANF4Config",),
    "replace": ("replace_linear", "report", "restore"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"fastlora.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
