"""fastlora: LoRA and QLoRA fine-tuning at the cost of the bare matrix product.

model = fastlora.replace_linear(model, r=16, lora_alpha=32, quantize="nf4")
print(model.fastlora_report.summary())
...                                             # train it as before
fastlora.save_adapter(model, "my-adapter")      # peft's format
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora import distribution

# In a source checkout the kernels are next to this package, at the repository's top level. An editable installation
# finds it by a link, which tracebacks and debuggers need not see.
_root = Path(__file__).resolve().parent
if not (_root / "kernels").is_dir():
    __path__[:] = [str(_root), str(_root.parent)]

if TYPE_CHECKING:
    from fastlora.adapters.adapter import load_adapter, save_adapter
    from fastlora.adapters.old_checkpoints import extract_adapter
    from fastlora.layers.lora_experts import LoRAExperts
    from fastlora.layers.lora_linear import LoRALinear
    from fastlora.layers.nf4_linear import NF4Linear
    from fastlora.layers.report import Report
    from fastlora.model.checkpointing import checkpoint_layers
    from fastlora.model.merging import merge
    from fastlora.model.quantizer import FastLoRANF4Config
    from fastlora.model.replace import replace_linear, report, restore
    from fastlora.model.speed_up import speed_up
    from fastlora.ops.backend import backend
    from fastlora.ops.expanded import expand_once, keep_weights
    from fastlora.ops.grouped import grouped_lora_linear
    from fastlora.ops.keeping import keep_linears
    from fastlora.ops.linear import lora_linear, nf4_dequantize, nf4_linear
    from fastlora.ops.nf4 import NF4Weight, quantize
    from fastlora.peft_layers.packing import quantize_experts
    from fastlora.training.graphed_step import GraphedStep

distribution.warn_of_rivals()

__version__ = "0.1.0"
__all__ = [
    "FastLoRANF4Config",
    "GraphedStep",
    "LoRAExperts",
    "LoRALinear",
    "NF4Linear",
    "NF4Weight",
    "Report",
    "backend",
    "checkpoint_layers",
    "expand_once",
    "extract_adapter",
    "grouped_lora_linear",
    "keep_linears",
    "keep_weights",
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
    "speed_up",
]

# Imported at first use: the command line answers without waiting for torch.
_HOMES = {
    "fastlora.adapters.adapter": ("load_adapter", "save_adapter"),
    "fastlora.adapters.old_checkpoints": ("extract_adapter",),
    "fastlora.layers.lora_experts": ("LoRAExperts",),
    "fastlora.layers.lora_linear": ("LoRALinear",),
    "fastlora.layers.nf4_linear": ("NF4Linear",),
    "fastlora.layers.report": ("Report",),
    "fastlora.model.checkpointing": ("checkpoint_layers",),
    "fastlora.model.merging": ("merge",),
    "fastlora.ops.backend": ("backend",),
    "fastlora.ops.expanded": ("expand_once", "keep_weights"),
    "fastlora.ops.grouped": ("grouped_lora_linear",),
    "fastlora.ops.keeping": ("keep_linears",),
    "fastlora.ops.linear": ("lora_linear", "nf4_dequantize", "nf4_linear"),
    "fastlora.ops.nf4": ("NF4Weight", "quantize"),
    "fastlora.peft_layers.packing": ("quantize_experts",),
    "fastlora.model.quantizer": ("FastLoRANF4Config",),
    "fastlora.training.graphed_step": ("GraphedStep",),
    "fastlora.model.replace": ("replace_linear", "report", "restore"),
    "fastlora.model.speed_up": ("speed_up",),
}
# Those that adapt models: transformers' saving and loading is made right for such models along with them.
_FOR_MODELS = ("load_adapter", "replace_linear", "save_adapter", "speed_up")


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            if name in _FOR_MODELS:
                import_module("fastlora.adapters.pretrained")
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
