"""Runtimes by name: how each one computes what lies between the linears, which sets a run's memory more than the model.

`validated` says which measured cases a runtime was held against (`python -m bench forecast`); an empty one means that
its terms are read from its source and were never compared.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """What a library does with a layer and with the loss; names as in `layer.Layers` and `loss.KINDS`.

    Attributes:
        casts: norms, embeddings and head in fp32 (`prepare_model_for_kbit_training`).
        logits_kept: a loop that holds the model's outputs in backward.
        checkpointing: what it does where nothing else is asked for.
    """

    name: str
    what: str
    lora: str = "peft"
    norm: str = "eager"
    rotary: str = "eager"
    gate: str = "eager"
    loss: str = "hf"
    casts: bool = False
    logits_kept: bool = False
    checkpointing: str = "full"
    validated: str = ""


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "peft",
            "transformers + peft + bitsandbytes after prepare_model_for_kbit_training",
            casts=True,
            validated="A100 and T4, NF4",
        ),
        Runtime("peft-lean", "transformers + peft without fp32 casts", validated="A100, T4 and L40S"),
        Runtime(
            "fused",
            "peft with fused LoRA, norms, rotary embedding and cross-entropy, logits whole",
            lora="fused",
            norm="fused",
            rotary="fused",
            loss="fused",
            validated="A100",
        ),
        Runtime(
            "liger",
            "peft with Liger-Kernel: norms, rotary embedding, gated MLP, loss in chunks",
            norm="fused",
            rotary="fused",
            gate="fused",
            loss="chunks",
            validated="A100, with fused LoRA and an eager MLP",
        ),
        Runtime("hf-full", "transformers, every parameter trained", validated="A100, two shapes"),
        Runtime(
            "unsloth",
            "Unsloth: fused LoRA, norms, rotary, MLP and loss; layers' inputs wait in host memory",
            lora="fused",
            norm="fused",
            rotary="fused",
            gate="fused",
            loss="chunks",
            checkpointing="offload",
        ),
        Runtime("torchtune", "torchtune: LoRA and its loss in chunks", loss="chunks"),
        Runtime(
            "fastlora",
            "fastlora.speed_up",
            lora="fastlora",
            norm="fused",
            rotary="fused",
            gate="fused",
            loss="fastlora",
            validated="H100, Qwen3-0.6B; counted for Llama, Qwen3",
        ),
    )
}


def runtime(name: str) -> Runtime:
    """A runtime by its name.

    Raises:
        ValueError: an unknown one.
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, not {name!r}")
    return RUNTIMES[name]
