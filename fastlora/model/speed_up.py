"""`speed_up`: the linears, and what stands between them."""

from dataclasses import replace
from typing import Any

from torch import nn

from fastlora.layers import between
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.report import PartRow
from fastlora.layers.sharded import clean_names
from fastlora.model.replace import carries_peft, replace_linear, report
from fastlora.model.sites import blocks

_NOT_ASKED = "not asked for"
_HOW = {"loss": "from the hidden states of target tokens, in parts; logits are computed if they are read"}


def speed_up(
    model: nn.Module,
    *,
    norm: bool = True,
    rotary: bool = True,
    mlp: bool = True,
    loss: bool = True,
    group: bool = True,
    compile: bool = False,
) -> nn.Module:
    """Let fastlora compute what stands between a model's linears, and its LoRA layers where peft still does.

    Norms, rotary embedding and gated activations are computed in fp32, rounded once to the dtype that they had, and
    save little for backward. The loss of `model(..., labels=...)` is computed from the hidden states of target tokens,
    a part at a time; `logits` of the output are computed when something reads them. Parameters, names, checkpoints and
    the rest of each module's code stay as they are. `restore` takes it back.

    Args:
        model: any module, such as a causal model of transformers that `replace_linear` or peft has adapted, or a plain
            one; changed in place. A call may be repeated.
        norm: RMSNorms, those of queries and keys included, with weights or with 1 + weights.
        rotary: the rotary embedding in the model's attention.
        mlp: SwiGLU and GEGLU in its MLPs; experts that are no modules of their own keep their code.
        loss: output head and cross-entropy of a causal model, capped and scaled logits included, in training and
            evaluation; its head may be adapted, quantized or trained. On any device.
        group: linears with adapters that share their input, as q, k and v do, and gate and up: together they read it
            once, and their gradients with respect to it are summed as they are computed.
        compile: each block of a transformers model by `torch.compile`, for all lengths at once. The linears are opaque
            there, called through torch's dispatcher, and Inductor computes what stands between them in the place of
            fastlora's kernels: for models of whose parts few are recognised.
    Returns:
        The same model. `model.fastlora_report.parts`, and `fastlora.report(model)`, say of each part whether it is
        sped up, and why not.
    Raises:
        ValueError: the model has neither adapters nor parts that can be sped up, or `compile` finds no blocks. It is
            unchanged.
    """
    asked = {"norm": norm, "rotary": rotary, "mlp": mlp, "loss": loss, "group": group}
    wanted = [part for part, on in asked.items() if on]
    with clean_names(model):
        found = _look(model, wanted)
        adapted, able = carries_peft(model), any(not isinstance(facts, str) for *_, facts in found)
        if not (adapted or able or any(isinstance(module, LoRALinear) for module in model.modules())):
            reasons = sorted({facts for *_, facts in found} - {_NOT_ASKED}) or [
                "it has no norms, rotary embedding, gated MLPs or causal loss"
            ]
            raise ValueError(f"nothing in this model can be sped up: {'; '.join(reasons)}")
        if compile and not blocks(model):
            raise ValueError(f"compile: {type(model).__name__} has no blocks of transformers that can be compiled")
        if adapted:
            replace_linear(model)
        rows = [_speed_up(*each) for each in found]
        if compile:
            rows += [_compile(name, block) for name, block in model.named_modules() if block in set(blocks(model))]
        model.fastlora_parts = rows  # type: ignore[assignment]
        model.fastlora_report = report(model)  # type: ignore[assignment]
    return model


def _speed_up(name: str, module: nn.Module, part: str, facts: Any) -> PartRow:
    row = PartRow(
        name, part, type(module).__name__, not isinstance(facts, str), _HOW.get(part, "by fastlora's kernels")
    )
    if isinstance(facts, str):
        return replace(row, reason=facts)
    if facts is not None:
        between.speed_up(module, part, facts)
    return row


def _compile(name: str, block: nn.Module) -> PartRow:
    if not between.is_compiled(block):
        block.compile(dynamic=True)
        block.fastlora_compiled = True  # type: ignore[assignment]
    return PartRow(name, "compile", type(block).__name__, True, "by torch.compile")


def _look(model: nn.Module, wanted: list[str]) -> list[tuple[str, nn.Module, str, Any]]:
    """(name, module, part, what its faster class must know or why it has none; None if it has one already)."""
    found: list[tuple[str, nn.Module, str, Any]] = []
    for name, module in model.named_modules():
        done = between.parts_of(module)
        for part in dict.fromkeys([*reversed(done), *between.find_parts(module)]):
            facts: Any = None
            if part not in done:
                facts = between.facts_of(module, part) if part in wanted else _NOT_ASKED
            found.append((name, module, part, facts))
    return found
