"""fastlora: LoRA and QLoRA fine-tuning at the cost of the bare matrix product.

    model = fastlora.replace_linear(model, r=16, lora_alpha=32, quantize="nf4")
    print(model.fastlora_report.summary())
    ...                                             # train it as before
    fastlora.save_adapter(model, "my-adapter")      # peft's format
"""

from pathlib import Path

# In a source checkout the kernels lie beside this package, at the repository's top level.
_root = Path(__file__).resolve().parent
if not (_root / "kernels").is_dir():
    __path__.append(str(_root.parent))

from fastlora.adapter import load_adapter, merge, save_adapter  # noqa: E402
from fastlora.functional import backend, lora_linear, nf4_dequantize, nf4_linear  # noqa: E402
from fastlora.linear import LoRALinear, NF4Linear  # noqa: E402
from fastlora.nf4 import NF4Weight, quantize  # noqa: E402
from fastlora.replace import replace_linear  # noqa: E402
from fastlora.report import Report  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LoRALinear",
    "NF4Linear",
    "NF4Weight",
    "Report",
    "backend",
    "load_adapter",
    "lora_linear",
    "merge",
    "nf4_dequantize",
    "nf4_linear",
    "quantize",
    "replace_linear",
    "save_adapter",
]
