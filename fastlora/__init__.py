"""fastlora: LoRA and QLoRA fine-tuning at the cost of the bare matrix product."""

from pathlib import Path

# In a source checkout the kernels lie beside this package, at the repository's top level.
_root = Path(__file__).resolve().parent
if not (_root / "kernels").is_dir():
    __path__.append(str(_root.parent))

__version__ = "0.1.0"
