"""Stacks of experts that peft has wrapped, packed in NF4 by bitsandbytes' parametrization.

Wrapping comes first: once a stack is packed, peft does not find it any more. QLoRA then reads only the packed codes of
the experts that have tokens, where peft would expand the stack. A stack kept as [E, in, out] is packed as
[E, out, in], because blocks run along what a product sums over. A second parametrization turns it back, so that reading
the parameter gives the old shape.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.layers.experts import computes_in_fp32


class Transposed(nn.Module):
    """The parametrization that shows a stack packed as [E, out, in] as [E, in, out]."""

    def forward(self, stack: Tensor) -> Tensor:
        """[E, out, in] to [E, in, out], a view."""
        return stack.transpose(1, 2)


def quantize_experts(model: nn.Module, blocksize: int = 64, double_quant: bool = True) -> nn.Module:
    """Pack every stack of experts that peft has wrapped in NF4, for QLoRA over mixtures of experts.

    From then on only fastlora can compute the wrappers. peft can neither compute over a packed stack, nor merge into
    one, nor add a further adapter: add adapters first, save them, and merge into the model as it was loaded. torch
    refuses to `torch.save` the whole model, as it does for every parametrized module. In a state dict, the codes of a
    stack [E, in, out] are those of [E, out, in].

    Args:
        model: with adapters on 3-D parameters (`LoraConfig(target_parameters=...)`).
        blocksize: values that share a scale. double_quant: whether the scales are quantized too.
    Returns:
        the same model.
    Raises:
        ValueError: no such parameter, or a shape or layout that cannot be packed. Nothing is changed.
        ImportError: bitsandbytes or peft is not installed.
    """
    import bitsandbytes.nn.parametrize  # noqa: F401, for its ImportError, before anything is changed

    from fastlora.peft_layers.experts import is_wrapper, parameter_reason
    from fastlora.peft_layers.linear import speed_up_layer

    wrappers: list[Any] = [module for module in model.modules() if is_wrapper(module)]
    if not wrappers:
        raise ValueError(
            "there are no adapters on stacks of experts: wrap the model first, with "
            "peft.LoraConfig(target_parameters=[...])"
        )
    for wrapper in wrappers:
        experts, name = wrapper.get_base_layer(), wrapper.parameter_name
        reason = parameter_reason(wrapper) or _packing_reason(experts, name, blocksize)
        if wrapper.merged:
            reason = "adapters are merged into it: unmerge them first"
        if reason:
            raise ValueError(f"{name} of {type(experts).__name__} cannot be packed in NF4: {reason}")
    for wrapper in wrappers:
        _pack(wrapper.get_base_layer(), wrapper.parameter_name, blocksize, double_quant)
        speed_up_layer(wrapper)
    return model


def _packing_reason(experts: Any, name: str, blocksize: int) -> str:
    if parametrize.is_parametrized(experts, name):
        return "it is parametrized already"
    if computes_in_fp32(experts):
        return "its forward computes in fp32 on purpose"
    rows, columns = getattr(experts, name).shape[1:]
    return f"blocks of {blocksize} would cross from expert to expert" if rows * columns % blocksize else ""


def _pack(experts: Any, name: str, blocksize: int, double_quant: bool) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    if experts.is_transposed:
        turned = getattr(experts, name).data.transpose(1, 2).contiguous()
        setattr(experts, name, nn.Parameter(turned, requires_grad=False))
    replace_parameter_4bit(experts, name, double_quant, quant_type="nf4", blocksize=blocksize)
    if experts.is_transposed:
        parametrize.register_parametrization(experts, name, Transposed(), unsafe=True)
