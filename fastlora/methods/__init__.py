"""Methods of fine-tuning: what each trains, and how that is attached to a model, saved, loaded and merged."""

from fastlora.methods.full import Full
from fastlora.methods.houlsby import Houlsby
from fastlora.methods.lora import LoRA
from fastlora.methods.method import Method
from fastlora.methods.prefix import Prefix
from fastlora.methods.prompt import Prompt

METHODS: dict[str, type[Method]] = {"lora": LoRA, "houlsby": Houlsby, "prefix": Prefix, "prompt": Prompt, "full": Full}

__all__ = ["METHODS", "Full", "Houlsby", "LoRA", "Method", "Prefix", "Prompt"]
