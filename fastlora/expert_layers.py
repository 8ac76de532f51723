"""Stacks of experts with adapters of fastlora's own: what peft's `target_parameters` means, without peft.

transformers keeps the experts of a layer as 3-D parameters of one module. `LoRAExperts` takes that module's place,
holds it as `base_layer`, and computes as `fastlora.experts` does: sorted by expert, W + B A never formed. A and B of
all experts lie in two matrices as in peft, which wraps the module once for each adapted parameter and packs

    A [E·r, in]     expert slowest
    B [out, r·E]    expert fastest

so that they are saved under peft's keys: the last of a module's parameters outermost, those before it one `.base_layer`
further in. A stack in NF4 is packed expert by expert, each as [out, in] whichever way the model keeps it.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora import experts, sharded, trained_modules
from fastlora.layer_report import Row
from fastlora.linear import NF4Linear
from fastlora.ops.autograd import computed_in
from fastlora.ops.backend import backend
from fastlora.ops.grouped import kernels
from fastlora.ops.nf4 import FLOAT_DTYPES, NF4Weight, quantize
from fastlora.peft_files import PREFIX
from fastlora.survey import adapted_experts, has_hooks
from fastlora.targets import LoRASettings, means, nearest, within

_STARTS = (True, False, "gaussian")


class Stack(NamedTuple):
    """A parameter to be adapted: of which module, r and lora_alpha."""

    owner: str
    parameter: str
    r: int
    lora_alpha: float


class LoRAExperts(nn.Module):
    """A module of experts with trained low-rank updates on its stacked parameters.

    Args:
        base_layer: with transformers' interface of experts; used as it is, its forward is not called.
        stacks: r and lora_alpha by parameter.
        use_rslora: scaling is lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_dtype: dtype of A and B; fp32 where None.
        init_lora_weights: True, False or "gaussian".
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
        """(A [E r, K], B [N, r E], scaling) of one parameter."""
        a, b = (parts[name][self.active_adapter].weight for parts in (self.lora_A, self.lora_B))  # type: ignore[index]
        return a, b, self.scaling[name]

    def update(self, name: str) -> experts.Update:
        """A [E, r, K], B [E, N, r] and scaling of one parameter."""
        a, b, scaling = self.adapter(name)
        count = self.num_experts
        return experts.Update(
            a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1), scaling
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [T, H], experts [T, k] and their weights [T, k], as the module of experts takes them -> [T, H].

        Raises:
            ValueError: other arguments.
        """
        routing = experts.routing_of(self.base_layer, x, args, kwargs)
        if routing is None or x.ndim != 2:
            raise ValueError(
                f"{type(self.base_layer).__name__} with adapters takes tokens [T, H], their experts [T, k] and weights "
                "[T, k], and was called with other arguments"
            )
        shown = _Shown(self, computed_in(x))
        updates = {name: self.update(name) for name in self.r}
        return experts.forward(shown, self.num_experts, updates, x, *routing)

    def quantize(self, blocksize: int = 64, double_quant: bool = True) -> None:
        """Pack the stacks of both projections in NF4; the parameters are let go of."""
        for name in experts._projections(self.base_layer):
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
            a, b, scaling = self.update(name)
            wide = torch.baddbmm(wide, b.detach().float(), a.detach().float(), alpha=scaling)
        wide = wide.to(dtype or weight.dtype)
        return wide.transpose(1, 2).contiguous() if self.base_layer.is_transposed else wide

    def weight(self, name: str) -> Tensor | NF4Weight:
        """A stack as the products read it: [E, N, K], or packed [E N, K]."""
        if name in self.packed:
            return self.packed[name].weight  # type: ignore[return-value]
        return stacked(self.base_layer, name)

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module of experts, with the updates folded into its parameters; with a dtype, all of them have it."""
        base: Any = self.base_layer
        for name in experts._projections(base):
            if name in self.r or name in self.packed or dtype is not None:
                setattr(base, name, nn.Parameter(self.merged(name, dtype), requires_grad=False))
            if dtype is not None and base.has_bias:
                setattr(base, f"{name}_bias", nn.Parameter(getattr(base, f"{name}_bias").detach().to(dtype), False))
        return base

    def rows(self, name: str, blocksize: int = 0) -> Iterator[Row]:
        """The rows of the report; name: of this module. blocksize: of the NF4 that dense stacks are about to become."""
        for parameter, r in self.r.items():
            (a, b, _), weight = self.adapter(parameter), self.weight(parameter)
            shape, size = (b.shape[0], a.shape[1]), weight.blocksize if isinstance(weight, NF4Weight) else blocksize
            packed, computed = size > 0, kernels(a.device, weight.dtype, self.num_experts, *shape, size, r)
            said = f"adapters r={r} on {self.num_experts} experts" + (", weight quantized to NF4" if packed else "")
            kind, path = type(self.base_layer).__name__, backend(a.device).name
            yield Row(f"{name}.{parameter}", kind, shape, True, said, path, r, packed, kernels=computed)

    def saved(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of A and B as peft names them, without its prefix; name: of this module."""
        for parameter, place in _places(name, self.r).items():
            for part, value in zip(("lora_A", "lora_B"), self.adapter(parameter)[:2], strict=True):
                yield f"{place}.{part}.weight", value.detach()

    @torch.no_grad()
    def load(self, parameter: str, pair: Mapping[str, Tensor], lora_alpha: float, use_rslora: bool) -> None:
        """Take A and B of one parameter, which fit, and their scaling."""
        self.set_scaling(parameter, lora_alpha, use_rslora)
        for part, target in zip(("lora_A", "lora_B"), self.adapter(parameter)[:2], strict=True):
            sharded.fill(target, pair[part])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={r}, scaling={self.scaling[name]:g}" for name, r in self.r.items())


class _Shown:
    """A module of experts as `experts.forward` reads it: its stacks as [E, N, K] in the dtype of the products."""

    is_transposed = False

    def __init__(self, layer: LoRAExperts, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

    def __getattr__(self, name: str) -> Any:
        base = self.layer.base_layer
        if name in experts._projections(base):
            weight = self.layer.weight(name)
            return weight.to(self.dtype) if isinstance(weight, Tensor) else weight
        value = getattr(base, name)
        return value.to(self.dtype) if isinstance(value, Tensor) else value


def stacked(base: Any, name: str) -> Tensor:
    """[E, N, K]: a parameter of a module of experts, a view of it where it is kept as [E, K, N]."""
    weight: Tensor = getattr(base, name)
    return weight.transpose(1, 2) if base.is_transposed else weight


def find(model: nn.Module, settings: LoRASettings) -> list[Stack]:
    """The parameters that `target_parameters` means, by peft's rule: whole names or ends of names from a dot on.

    Raises:
        ValueError: an entry that matches nothing, nothing left by `exclude_modules` and `layers_to_transform`, a
            parameter that cannot be adapted, or an option that stacks of experts do not go with.
    """
    wanted = settings.target_parameters or ()
    known = {
        f"{name}.{key}".lstrip("."): (name, key, module) for name, module in model.named_modules()
        for key, parameter in module._parameters.items() if parameter is not None
    }  # fmt: skip
    for entry in wanted:
        if not any(means(entry, name) for name in known):
            names = [name for name, (_, _, module) in known.items() if not obstacle(module, name.rpartition(".")[2])]
            raise ValueError(f"target_parameters: {entry!r} matches no parameter{nearest(entry, names)}")
    found = []
    for name, (owner, key, module) in known.items():
        if not settings.means_parameter(name):
            continue
        reason = obstacle(module, key)
        if reason:
            raise ValueError(f"target_parameters: {name} cannot be adapted: {reason}")
        if any(within(owner, trained) for trained in trained_modules.find(model, settings.modules_to_save)):
            raise ValueError(f"{name} is in target_parameters and in modules_to_save: leave it out of one of them")
        found.append(Stack(owner, key, *settings.rank_and_alpha(name)))
    if wanted and not found:
        raise ValueError(
            f"target_parameters={list(wanted)!r} with exclude_modules={settings.exclude_modules!r} and "
            f"layers_to_transform={settings.layers_to_transform!r} leaves no stack of experts to adapt"
        )
    if found and settings.lora_dropout:
        raise ValueError("lora_dropout does not go with target_parameters: leave it at 0, as with peft")
    if found and settings.init_lora_weights not in _STARTS:
        raise ValueError(
            f"init_lora_weights={settings.init_lora_weights!r} does not go with target_parameters: use one of "
            f"{', '.join(map(repr, _STARTS))}"
        )
    return found


def obstacle(module: Any, name: str) -> str:
    """Why a parameter of a module cannot have adapters of ours; empty where it can."""
    if any(not hasattr(module, part) for part in experts._INTERFACE):
        return f"{type(module).__name__} does not have transformers' interface of experts"
    if name not in experts._projections(module):
        return f"{name} is none of the projections {experts._projections(module)}"
    if parametrize.is_parametrized(module):
        return "the experts are parametrized"
    if has_hooks(module):
        return "the experts have hooks or a forward of their own"
    weight = module._parameters[name]
    if type(weight) is not nn.Parameter or weight.ndim != 3 or weight.dtype not in FLOAT_DTYPES:
        return f"it is a {type(weight).__name__} {list(weight.shape)} in {weight.dtype}, not a stack of matrices"
    if getattr(module.config, "_experts_implementation", None) not in experts._IMPLEMENTATIONS:
        return f"experts_implementation={module.config._experts_implementation} is asked for"
    if weight.dtype is not torch.float32 and experts._computes_in_fp32(module):
        return f"its forward computes in fp32 on purpose, and the stack is in {weight.dtype}: load the model in fp32"
    return "experts are spread over devices" if getattr(module, "_is_expert_parallel", False) else ""


def check(model: nn.Module, stacks: Collection[Stack], packed: bool, blocksize: int, dtype: torch.dtype | None) -> None:
    """Raise ValueError where stacks cannot be packed, or A and B cannot have this dtype."""
    for stack in stacks:
        module: Any = model.get_submodule(stack.owner)
        weight = stacked(module, stack.parameter)
        name = f"{stack.owner}.{stack.parameter}"
        if dtype not in (None, torch.float32, weight.dtype):
            allowed = " or ".join(map(str, dict.fromkeys((torch.float32, weight.dtype))))
            raise ValueError(f"adapter_dtype must be {allowed} for {name}; got {dtype}")
        if packed and experts._computes_in_fp32(module):
            raise ValueError(f"{name} cannot be packed: its forward computes in fp32 on purpose: leave quantize off")
        for key in experts._projections(module) if packed else ():
            weight, name = stacked(module, key), f"{stack.owner}.{key}"
            if weight.device.type == "meta" or not weight.numel():
                raise ValueError(f"{name} is not loaded: load the weights before quantizing")
            if not torch.isfinite(weight).all():
                raise ValueError(f"{name} holds NaN or inf: repair the checkpoint, or leave quantize off")
            if weight[0].numel() % blocksize:
                raise ValueError(f"{name} cannot be packed: blocks of {blocksize} would cross from expert to expert")


def make(model: nn.Module, stacks: Collection[Stack], settings: LoRASettings, **options: Any) -> dict[str, LoRAExperts]:
    """The modules of experts with their adapters, by name, not hung in yet; options: those of `LoRAExperts`."""
    owners: dict[str, dict[str, tuple[int, float]]] = {}
    for stack in stacks:
        owners.setdefault(stack.owner, {})[stack.parameter] = stack.r, stack.lora_alpha
    init = settings.init_lora_weights
    return {
        name: LoRAExperts(model.get_submodule(name), wanted, settings.use_rslora, init_lora_weights=init, **options)
        for name, wanted in owners.items()
    }


def take(
    model: nn.Module, settings: LoRASettings, pairs: dict[str, dict[str, Tensor]], adapted: bool
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Take from a file's pairs by module those that belong to stacks: {(module, parameter): pair}.

    Args:
        adapted: whether the model has fastlora's adapters already.
    Raises:
        ValueError: a pair is missing or has another shape than the model's, or the model has no adapters there.
    """
    own = adapted_experts(model)
    ranks = {name: dict(layer.r) for name, layer in own.items()}
    if not adapted:
        for stack in find(model, settings):
            ranks.setdefault(stack.owner, {})[stack.parameter] = stack.r
    elif settings.target_parameters and not own:
        raise ValueError(f"the file has adapters on {', '.join(settings.target_parameters)}, the model has none there")
    found = {}
    for name, wanted in ranks.items():
        base: Any = own[name] if name in own else model.get_submodule(name)
        for parameter, place in _places(name, wanted).items():
            if place not in pairs:
                raise ValueError(f"{PREFIX}{place}.lora_A.weight is missing from the file")
            if name in own:
                shapes = [list(part.shape) for part in base.adapter(parameter)[:2]]
            else:
                (count, n, k), r = stacked(base, parameter).shape, wanted[parameter]
                shapes = [[count * r, k], [n, r * count]]
            for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
                given = list(pairs[place][part].shape)
                if given != shape:
                    raise ValueError(
                        f"{PREFIX}{place}.{part}.weight has shape {given} in the file, {shape} in the model"
                    )
            found[name, parameter] = pairs.pop(place)
    return found


def _places(name: str, parameters: Collection[str]) -> dict[str, str]:
    """Parameter -> the name of peft's wrapper around it, which is where its A and B are saved."""
    return {key: name + ".base_layer" * depth for depth, key in enumerate(reversed(list(parameters)))}
