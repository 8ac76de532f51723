"""A frozen linear layer of any kind with a trained low-rank update, computed as one.

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ

The layer is thin: it holds tensors under peft's names (`base_layer.weight`, `lora_A.default.weight`,
`lora_B.default.weight`), with peft's meaning of `r`, `lora_alpha` and `scaling`, and passes them to `ops.linear`.
Source: arXiv:2106.09685, section 4.1 (LoRA); arXiv:2312.03732 (rsLoRA).
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.layers import starts
from fastlora.layers.bases import AdoptedWeight, base_weight, check_adapter_dtype, frozen, is_linear4bit
from fastlora.layers.dense import is_conv1d, parameter, plain_layer
from fastlora.layers.grouping import Operands, taken
from fastlora.layers.on_top import check_unwrapped
from fastlora.layers.sharded import whole
from fastlora.ops.linear import lora_linear, nf4_dequantize
from fastlora.ops.nf4 import NF4Weight


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update, computed as one.

    The base's forward is not called, and hooks on `base_layer`, `lora_A` or `lora_B` do not run: put hooks on this
    module. Parameter names, the dictionaries by adapter name and `scaling` are peft's.

    Args:
        base_layer: `nn.Linear`, `Conv1D`, `NF4Linear` or bitsandbytes' `Linear4bit` with NF4; used as it is.
        r: rank.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: probability with which an element of the update's input is dropped in training.
        adapter_name: key in `lora_A` and `lora_B`.
        adapter_dtype: dtype of A and B; fp32 if None. Over a full-precision base, fp32 or the base's dtype.
        init_lora_weights: a start by its name in `layers.starts`, except "loftq" and "eva"; "pissa" and "olora"
            change the weight of `base_layer` in place.
    Raises:
        ValueError: an argument is out of range, or the base is of another kind.
    Source: arXiv:2106.09685, section 4.1; arXiv:2312.03732 (rsLoRA).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
    ) -> None:
        super().__init__()
        weight = base_weight(base_layer)
        check_adapter_dtype(adapter_dtype, weight)
        if r < 1 or not 0 <= lora_dropout < 1:
            raise ValueError(f"r must be at least 1 and lora_dropout in [0, 1); got r={r}, lora_dropout={lora_dropout}")
        starts.check_known(init_lora_weights)
        starts.check_layer(init_lora_weights, "base_layer", weight, r, "", quantized=False)
        self.base_layer = base_layer
        self.out_features: int = weight.shape[0]
        self.in_features: int = weight.shape[1]
        self.active_adapter = adapter_name
        self.r = {adapter_name: r}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.set_scaling(lora_alpha, use_rslora)
        dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_dropout = nn.ModuleDict({adapter_name: dropout})
        # the same draws in the same order as peft: one seed gives both libraries the same adapters
        lora_a = nn.Linear(self.in_features, r, bias=False)
        lora_b = nn.Linear(r, self.out_features, bias=False)
        starts.fill(init_lora_weights, lora_a, lora_b, weight.dtype)
        # (A0, scaling · B0) taken out of the base, by adapter name: what is saved is the adapter minus these
        self.taken_out: dict[str, starts.Pair] = {}
        if starts.changes_base(init_lora_weights):
            assert isinstance(weight, Tensor)
            start = starts.from_weight(str(init_lora_weights), weight.detach(), r, self.scaling[adapter_name])
            starts.take_out(weight.detach(), start, self.scaling[adapter_name])
            lora_a.weight.data, lora_b.weight.data = (part.clone() for part in start)
            self.taken_out[adapter_name] = start[0].cpu(), (start[1] * self.scaling[adapter_name]).cpu()
        device, dtype = weight.device, adapter_dtype or torch.float32
        self.lora_A = nn.ModuleDict({adapter_name: lora_a.to(device, dtype)})
        self.lora_B = nn.ModuleDict({adapter_name: lora_b.to(device, dtype)})
        self._adopted = AdoptedWeight()
        self.weight_reads = 0  # each formed W + scaling · B A; the report names them
        if is_linear4bit(base_layer):
            self._adopted.of(base_layer)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """W + scaling · B A, for code that multiplies by a layer's weight itself, such as a fused loss or scan.

        [N, K], or [K, N] where the base was a `Conv1D`; in W's dtype (of NF4 that before quantization), to which A and
        B are cast; differentiable in A and B. It is formed at each read, whole if FSDP2 has spread it, and has no
        dropout. What is written into it is lost: the frozen weight is `base_layer.weight`.
        """
        if not torch.compiler.is_compiling():
            self.weight_reads += 1
        weight: Any = base_weight(self.base_layer, self._adopted)
        *pair, scaling = self.adapter()
        lora_a, lora_b = (whole(part).to(weight.dtype) for part in pair)
        if self.training and torch.is_grad_enabled() and self._dropout_p() > 0:
            warnings.warn(
                "the weight of a LoRALinear was read in training, by code that may multiply by it instead of calling "
                "the layer: lora_dropout does not apply there",
                stacklevel=2,
            )
        dense = weight.dequantize() if isinstance(weight, NF4Weight) else whole(weight)
        with torch.autocast(dense.device.type, enabled=False):
            adapted = torch.addmm(dense, lora_b, lora_a, alpha=scaling)
        return adapted.t() if self.fan_in_fan_out else adapted

    @property
    def bias(self) -> Any:
        """The base layer's bias or None; whole, as the weight."""
        bias: Any = self.base_layer.bias
        return bias if bias is None else whole(bias)

    def set_scaling(self, lora_alpha: float, use_rslora: bool = False) -> None:
        """Set scaling to lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        name, r = self.active_adapter, self.r[self.active_adapter]
        self.lora_alpha[name], self.use_rslora[name] = lora_alpha, use_rslora
        self.scaling[name] = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r

    def set_base(self, base_layer: nn.Module) -> None:
        """Put the adapters over a layer with as many inputs; rows of B are dropped from the end, or added as zeros."""
        n: int = base_weight(base_layer).shape[0]
        for linear in self.lora_B.values():
            module: Any = linear
            b = module.weight
            if n != b.shape[0]:
                fresh = b.detach().new_zeros((n, b.shape[1]))
                fresh[: min(n, b.shape[0])] = b.detach()[:n]
                module.weight, module.out_features = nn.Parameter(fresh, b.requires_grad), n
        self.base_layer, self.out_features = base_layer, n
        self._adopted.forget()

    def adapter(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        """(A [R, K], B [N, R], scaling) of the active adapter.

        Raises:
            RuntimeError: another library's adapters have been put on A or on the base.
        """
        modules: Any = self._modules  # `self.lora_A[name].weight` takes ten times as long
        name = self.active_adapter
        lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        check_unwrapped(modules["base_layer"], lora_a)
        return parameter(lora_a, "weight"), parameter(lora_b, "weight"), self.scaling[name]

    def _dropout_p(self) -> float:
        dropout: Any = self._modules["lora_dropout"]._modules[self.active_adapter]  # type: ignore[union-attr]
        return 0.0 if type(dropout) is nn.Identity else dropout.p  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N].

        Over a `Linear4bit` the result is computed in that layer's `compute_dtype` and has the dtype of x, as its own.
        """
        if not torch.compiler.is_compiling() and (shared := taken(self, x)) is not None:
            return shared
        x, weight, adapter, bias, dropout_p, training, given = self.operands(x)
        assert adapter is not None
        y = lora_linear(x, weight, *adapter, bias, dropout_p, training)
        return y if given is None or y.dtype is given else y.to(given)

    def operands(self, x: Tensor) -> Operands:
        """What `forward` multiplies."""
        adapter = self.adapter()
        x, weight, bias, given = frozen(self._modules["base_layer"], x, self._adopted)
        return Operands(x, weight, adapter, bias, self._dropout_p(), self.training, given)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the layer was a `Conv1D` when it was found."""
        return is_conv1d(self.base_layer) or getattr(self.base_layer, "fan_in_fan_out", False)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A plain `nn.Linear`, or `Conv1D`, with weight W + scaling · B A, summed in fp32, rounded once to `dtype`.

        Args:
            dtype: by default that of W, for NF4 that before quantization.
        """
        weight = base_weight(self.base_layer, self._adopted)
        lora_a, lora_b, scaling = self.adapter()
        if isinstance(weight, NF4Weight):
            merged = nf4_dequantize(weight, dtype, lora_a, lora_b, scaling)
        else:
            update = (weight.detach().float(), lora_b.detach().float(), lora_a.detach().float())
            merged = torch.addmm(*update, alpha=scaling).to(dtype or weight.dtype)
        return plain_layer(merged, self.bias, self.training, self.fan_in_fan_out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        self._adopted.forget()
        super()._apply(fn, recurse)
        if is_linear4bit(self.base_layer):
            self._adopted.of(self.base_layer)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, pair in self.taken_out.items():
            for part, tensor in zip("AB", pair, strict=True):
                destination[f"{prefix}taken_out.{name}.{part}"] = tensor

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        mine = {f"{prefix}taken_out.{name}.{part}": (name, part) for name in self.taken_out for part in "AB"}
        rest = {key: value for key, value in state_dict.items() if key not in mine}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, *more)
        missing += [key for key in mine if key not in state_dict]
        for key, (name, part) in mine.items():
            if key in state_dict:
                a, b = self.taken_out[name]
                value = state_dict[key].detach().to("cpu", torch.float32, copy=True)
                self.taken_out[name] = (value, b) if part == "A" else (a, value)

    def extra_repr(self) -> str:
        name = self.active_adapter
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r[name]}, "
            f"lora_alpha={self.lora_alpha[name]:g}, scaling={self.scaling[name]:g}"
        )
