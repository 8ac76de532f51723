"""Public estimators of memory, held against the cases that `bench.compare.forecast` reads, where they are installed.

fitcheck    fitcheck-llm: dense models of the Llama shape on one device, of the T4's profile; what it calls overhead
            (context, allocator) is left out, as the cases are bytes allocated
"""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version

from fastlora.memory.forecast import Setup

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def installed() -> dict[str, Callable[[Setup], int]]:
    """Name and version -> bytes allocated of a setup."""
    if importlib.util.find_spec("fitcheck") is None:
        return {}
    return {f"fitcheck-llm {version('fitcheck-llm')}": fitcheck}


def fitcheck(setup: Setup) -> int:
    """fitcheck's estimate, in bytes.

    Raises:
        ValueError: a setup that it has no words for.
    """
    from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu  # type: ignore[import-not-found]

    shape = setup.shape
    if shape.experts or not shape.gated or setup.devices > 1 or setup.dora or setup.quantized in ("gptq", "int8"):
        raise ValueError("fitcheck: experts, GPT, several devices, DoRA, GPTQ")
    model = ModelConfig(
        "", shape.parameters, shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.intermediate,
        shape.vocabulary, shape.head_dim, shape.tied,
    )  # fmt: skip
    targets = _TARGETS if setup.targets == "all-linear" else setup.targets
    asked = TrainingConfig(
        precision="fp16" if setup.capability < 80 else "bf16",
        quantization="nf4" if setup.quantized else "none",
        double_quant=setup.quantized == "nf4-nested",
        batch_size=setup.batch,
        seq_len=setup.length,
        lora_rank=None if setup.method == "full" else setup.r,
        lora_targets=list(targets),
        grad_checkpoint=setup.checkpointing == "full",
        flash_attn=setup.attention != "eager",
    )
    found = estimate(model, asked, get_gpu("T4"))
    return round((found.total_mib - found.overhead_mib) * 2**20)
