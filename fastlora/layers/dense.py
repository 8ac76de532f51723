"""Linear layers with an unquantized weight: `nn.Linear`, and GPT-2's `Conv1D`.

`Conv1D` is y = x W + b with W [K, N], the transpose of what other layers store: its weight is read as a view [N, K].
Nothing is copied, and the layer keeps its parameter and its name.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' `Conv1D` itself."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and type(module) is utils.Conv1D


def is_dense(module: Any) -> bool:
    """Whether a module is a linear layer with an unquantized weight: `nn.Linear` itself or `Conv1D` itself."""
    return type(module) is nn.Linear or is_conv1d(module)


def parameter(module: nn.Module, name: str) -> Any:
    """A module's parameter, found in a tenth of the time that `module.weight` takes.

    FSDP without use_orig_params and DataParallel's replicas keep plain attributes in place of parameters.
    """
    try:
        return module._parameters[name]
    except KeyError:
        return getattr(module, name)


def dense_weight(module: Any) -> Tensor:
    """The weight [N, K] of a layer that `is_dense`; for a `Conv1D` a transposed view."""
    weight: Tensor = parameter(module, "weight")
    return weight if type(module) is nn.Linear else weight.t()


def as_linear(conv: Any) -> nn.Linear:
    """An `nn.Linear` with a copy of a `Conv1D`'s weight, [N, K] contiguous; the bias is shared."""
    k, n = conv.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = conv.bias
    return linear.train(conv.training)


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """A `Conv1D` with an `nn.Linear`'s weight, transposed, and with its bias, or zeros if it has none."""
    from transformers.pytorch_utils import Conv1D

    n, k = linear.weight.shape
    with torch.device("meta"):
        conv = Conv1D(n, k)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    conv.bias = linear.bias if linear.bias is not None else nn.Parameter(linear.weight.new_zeros(n), False)
    return conv.train(linear.training)


def plain_layer(weight: Tensor, bias: Tensor | None, training: bool, transposed: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D`, over these tensors; a bias in another dtype is cast to the weight's."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(bias, nn.Parameter) and bias.dtype == weight.dtype:
        linear.bias = bias
    elif bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    linear.train(training)
    return as_conv1d(linear) if transposed else linear
