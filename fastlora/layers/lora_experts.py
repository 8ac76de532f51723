"""Stacks of experts with fastlora's own adapters: what peft's `target_parameters` means, without peft.

transformers keeps the experts of a layer as 3-D parameters of one module. `LoRAExperts` replaces that module, holds it
as `base_layer`, and computes as `layers.experts` does: sorted by expert, W + B A never formed. A and B of all experts
are two matrices packed as peft packs them, so that peft's files hold them as they are:

    A [E·r, in]     expert slowest
    B [out, r·E]    expert fastest

A stack in NF4 is packed expert by expert, each as [out, in], however the model keeps it.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.kernels.operands import Lora
from fastlora.layers import experts
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.layers.on_top import check_unwrapped
from fastlora.layers.report import LayerRow
from fastlora.ops.autograd import computed_in
from fastlora.ops.grouped import computed_by
from fastlora.ops.nf4 import NF4Weight, quantize
from fastlora.ops.operands import in_dtype


class LoRAExperts(nn.Module):
    """A module of experts with trained low-rank updates on its stacked parameters.

    Args:
        base_layer: with transformers' interface of experts; used as it is, but its forward is not called.
        stacks: r and lora_alpha by parameter.
        use_rslora: scaling is lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_dtype: dtype of A and B; fp32 if None.
        init_lora_weights: True, False or "gaussian".
    Raises:
        ValueError: a rank below 1.
    Source: arXiv:2106.09685, section 4.1.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        stacks: Mapping[str, tuple[int, float]],
        use_rslora: bool = False,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
    ) -> None:
        super().__init__()
        self.base_layer, self.active_adapter, self.use_rslora = base_layer, adapter_name, use_rslora
        self.r = {name: r for name, (r, _) in stacks.items()}
        self.lora_alpha, self.scaling = {}, {}  # type: dict[str, float], dict[str, float]
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.packed = nn.ModuleDict()
        for name, (r, lora_alpha) in stacks.items():
            if r < 1:
                raise ValueError(f"r must be at least 1; got r={r} for {name}")
            weight = stacked(base_layer, name)
            self.num_experts, n, k = weight.shape
            # the same draws in the same order as peft
            lora_a = nn.Linear(k, r * self.num_experts, bias=False)
            lora_b = nn.Linear(r * self.num_experts, n, bias=False)
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(lora_a.weight, a=5**0.5)
            elif init_lora_weights == "gaussian":
                nn.init.normal_(lora_a.weight, std=1 / r)
            if init_lora_weights:
                nn.init.zeros_(lora_b.weight)
            for parts, layer in ((self.lora_A, lora_a), (self.lora_B, lora_b)):
                parts[name] = nn.ModuleDict({adapter_name: layer.to(weight.device, adapter_dtype or torch.float32)})
            self.set_scaling(name, lora_alpha, use_rslora)
        self.train(base_layer.training)

    def set_scaling(self, name: str, lora_alpha: float, use_rslora: bool = False) -> None:
        """Set the scaling of one parameter's update to lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        r, self.use_rslora = self.r[name], use_rslora
        self.lora_alpha[name], self.scaling[name] = lora_alpha, lora_alpha / (math.sqrt(r) if use_rslora else r)

    def adapter(self, name: str) -> tuple[nn.Parameter, nn.Parameter, float]:
        """(A [E r, K], B [N, r E], scaling) of one parameter.

        Raises:
            RuntimeError: another library's adapters have been put on A or on the module of experts.
        """
        lora_a, lora_b = (parts[name][self.active_adapter] for parts in (self.lora_A, self.lora_B))  # type: ignore[index]
        check_unwrapped(self.base_layer, lora_a)
        return lora_a.weight, lora_b.weight, self.scaling[name]

    def update(self, name: str) -> Lora:
        """A [E, r, K], B [E, N, r] and scaling of one parameter."""
        a, b, scaling = self.adapter(name)
        count = self.num_experts
        return Lora(a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1), scaling)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [T, H], experts [T, k] and their weights [T, k], as the module of experts takes them -> [T, H].

        Raises:
            ValueError: other arguments.
        """
        routing = experts.routing_of(self.base_layer, x, args, kwargs)
        if routing is None or x.ndim != 2:
            raise ValueError(
                f"{type(self.base_layer).__name__} with adapters takes tokens [T, H], their experts [T, k] and weights "
                "[T, k], but was called with other arguments"
            )
        shown = _Shown(self, computed_in(x))
        updates = {name: self.update(name) for name in self.r}
        return experts.forward(shown, self.num_experts, updates, x, *routing)

    def quantize(self, blocksize: int = 64, double_quant: bool = True) -> None:
        """Pack the stacks of both projections in NF4; the parameters are released."""
        for name in experts.projections(self.base_layer):
            weight = stacked(self.base_layer, name)
            n = weight.shape[1]
            packed = quantize(weight.detach().reshape(-1, weight.shape[2]), blocksize, double_quant)
            assert packed.shape[0] == self.num_experts * n
            self.packed[name] = NF4Linear(packed)
            self.base_layer.register_parameter(name, None)

    def merged(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """W + scaling · B A of every expert as the model keeps the stack, summed in fp32 and rounded once."""
        weight = self.weight(name)
        count = self.num_experts
        if isinstance(weight, NF4Weight):
            dtype, weight = dtype or weight.dtype, weight.dequantize(torch.float32).view(count, -1, weight.shape[1])
        wide = weight.detach().float()
        if name in self.r:
            a, b, scaling, *_ = self.update(name)
            wide = torch.baddbmm(wide, b.detach().float(), a.detach().float(), alpha=scaling)  # [E, N, r] @ [E, r, K]
        wide = wide.to(dtype or weight.dtype)
        return wide.transpose(1, 2).contiguous() if self.base_layer.is_transposed else wide

    def weight(self, name: str) -> Tensor | NF4Weight:
        """A stack as the products read it: [E, N, K], or packed [E N, K]."""
        if name in self.packed:
            return self.packed[name].weight  # type: ignore[return-value]
        return stacked(self.base_layer, name)

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module of experts with the updates merged into its parameters; given a dtype, all parameters have it."""
        base: Any = self.base_layer
        for name in experts.projections(base):
            if name in self.r or name in self.packed or dtype is not None:
                setattr(base, name, nn.Parameter(self.merged(name, dtype), requires_grad=False))
            if dtype is not None and base.has_bias:
                setattr(base, f"{name}_bias", nn.Parameter(getattr(base, f"{name}_bias").detach().to(dtype), False))
        return base

    def rows(self, name: str, blocksize: int = 0) -> Iterator[LayerRow]:
        """The rows of the report. name: of this module. blocksize: of the NF4 that dense stacks are about to become."""
        for parameter, r in self.r.items():
            (a, b, _), weight = self.adapter(parameter), self.weight(parameter)
            shape, size = (b.shape[0], a.shape[1]), weight.blocksize if isinstance(weight, NF4Weight) else blocksize
            path, kernels = computed_by(a.device, weight.dtype, self.num_experts, *shape, size, r)
            kind, packed = type(self.base_layer).__name__, size > 0
            said = f"adapters r={r} on {self.num_experts} experts" + (", weight quantized to NF4" if packed else "")
            yield LayerRow(f"{name}.{parameter}", kind, shape, True, said, path, r, packed, kernels=kernels)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={r}, scaling={self.scaling[name]:g}" for name, r in self.r.items())


class _Shown:
    """A module of experts as `experts.forward` reads it: its stacks as [E, N, K] in the dtype of the products."""

    is_transposed = False

    def __init__(self, layer: LoRAExperts, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

    def __getattr__(self, name: str) -> Any:
        base = self.layer.base_layer
        if name in experts.projections(base):
            return in_dtype(self.layer.weight(name), self.dtype)
        value = getattr(base, name)
        return value.to(self.dtype) if isinstance(value, Tensor) else value


def adapted_experts(model: nn.Module) -> dict[str, LoRAExperts]:
    """The model's `LoRAExperts` by name, without what torch.compile adds to the names."""
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, LoRAExperts)
    }


def stacked(base: Any, name: str) -> Tensor:
    """A parameter of a module of experts as [E, N, K]; a view where it is kept as [E, K, N]."""
    weight: Tensor = getattr(base, name)
    return weight.transpose(1, 2) if base.is_transposed else weight
