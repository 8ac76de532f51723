"""A frozen linear layer whose weight is NF4: 4.13 bits a weight, under bitsandbytes' names in a state dict.

    y = x Wᵀ + b

`NF4Linear` saves and loads `weight`, `weight.absmax`, ... as bitsandbytes does, so each library reads the other's
checkpoints.
Source: arXiv:2305.14314, section 3.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers import starts
from fastlora.layers.dense import as_linear, is_conv1d, plain_layer
from fastlora.layers.grouping import Operands, taken
from fastlora.ops.linear import nf4_linear
from fastlora.ops.nf4 import NF4Weight, quantize

_BUFFERS = ("codes", "absmax", "absmax2", "code2", "offset")


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is NF4.

    The packed weight is in buffers, so `.to(device)`, `deepcopy` and pickle work as for any module; `.to(dtype)` and
    `.half()` leave it as it is, because its scales are fp32 by definition. The state dict has bitsandbytes' names.

    Args:
        weight: NF4 of shape (N, K).
        bias: [N] or None; kept as it is, the same object if it is a Parameter.
        fan_in_fan_out: whether the layer was a `Conv1D`, and becomes one again when its weight is expanded.
    Source: arXiv:2305.14314, section 3.
    """

    codes: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None, fan_in_fan_out: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.fan_in_fan_out = fan_in_fan_out
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self._weight = weight
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True, taken_out: starts.Pair | None = None
    ) -> "NF4Linear":
        """Quantize a plain `nn.Linear` or `Conv1D`, which is left as it is; the bias is shared with it.

        Args:
            taken_out: (A [R, K], B [N, R]) in fp32: W - B A is quantized, summed in fp32.
        Raises:
            ValueError: the weight has a dtype or values that NF4 cannot hold.
        """
        transposed = is_conv1d(linear)
        plain = as_linear(linear) if transposed else linear
        weight = plain.weight.detach()
        if taken_out is not None:
            weight = torch.addmm(weight.float(), taken_out[1], taken_out[0], alpha=-1)
        packed = dataclasses.replace(quantize(weight, blocksize, double_quant), dtype=plain.weight.dtype)
        return cls(packed, linear.bias, transposed).train(linear.training)

    @property
    def weight(self) -> NF4Weight:
        """The weight over the module's buffers; its `dtype` and `shape` are those before quantization."""
        known = self._weight
        if known.codes is not self.codes or known.absmax is not self.absmax:
            parts = {name: getattr(self, name) for name in _BUFFERS}
            known = self._weight = NF4Weight(shape=known.shape, dtype=known.dtype, blocksize=known.blocksize, **parts)
        return known

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], dtype of x."""
        if not torch.compiler.is_compiling() and (shared := taken(self, x)) is not None:
            return shared
        return nf4_linear(x, self.weight, self.bias_for(x))

    def operands(self, x: Tensor) -> Operands:
        """What `forward` multiplies."""
        return Operands(x, self.weight, None, self.bias_for(x), 0.0, False, None)

    def bias_for(self, x: Tensor) -> Tensor | None:
        """The bias in x's dtype or fp32: an NF4 weight takes input of any dtype, so the bias must too."""
        bias = self.bias
        return bias if bias is None or bias.dtype in (x.dtype, torch.float32) else bias.to(x.dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A plain `nn.Linear`, or `Conv1D`, with the dequantized weight, in `dtype` or that before quantization."""
        return plain_layer(self.weight.dequantize(dtype), self.bias, self.training, self.fan_in_fan_out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        kept = {name: buffer for name in _BUFFERS if (buffer := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._weight = self.weight
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes.is_meta:
            raise RuntimeError(
                f"{prefix}weight is NF4 on the meta device and has nothing to save: under FSDP set "
                "cpu_ram_efficient_loading=False, because every process needs its own NF4 weights"
            )
        for name, tensor in self.weight.state_dict().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = prefix + "weight"
        mine = {key: value for key, value in state_dict.items() if key == start or key.startswith(start + ".")}
        rest = {key: value for key, value in state_dict.items() if key not in mine}
        super()._load_from_state_dict(
            rest,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,  # type: ignore[arg-type]
        )
        if not mine:
            missing_keys.append(start)
            return
        try:
            weight = NF4Weight.from_state_dict({key.removeprefix(prefix): value for key, value in mine.items()})
        except (ValueError, KeyError, AttributeError) as error:
            error_msgs.append(f"{start}: {error}")
            return
        if weight.shape != self._weight.shape:
            error_msgs.append(
                f"{start}: shape {list(weight.shape)} in the file, {list(self._weight.shape)} in the model"
            )
            return
        weight = weight.to(self.codes.device)
        for name in _BUFFERS:
            value = getattr(weight, name)
            # load_state_dict copies: a later in-place change of the given tensors must not reach the module
            self._buffers[name] = value.clone() if value is not None else None
        parts = {name: self._buffers[name] for name in _BUFFERS}
        self._weight = NF4Weight(
            shape=weight.shape,
            dtype=weight.dtype,
            blocksize=weight.blocksize,
            **parts,  # type: ignore[arg-type]
        )

    def extra_repr(self) -> str:
        scales = "nested scales" if self._weight.nested else "plain scales"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nf4, blocksize={self._weight.blocksize}, {scales}"
        )
