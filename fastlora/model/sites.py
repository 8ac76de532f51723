"""Which linear layers a model has, where it uses them, and the obstacle to replacing each, if any."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.kernels.operands import FLOAT_DTYPES
from fastlora.layers.bases import AdoptedWeight, computed_over, is_linear4bit, is_plain
from fastlora.layers.dense import is_dense
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.layers.report import LayerRow, Report
from fastlora.model.names import within
from fastlora.ops.backend import backend

# (parent, attribute) of each use of a module
Places = list[tuple[nn.Module, str]]

_HEAD_NAMES = ("lm_head", "score", "classifier")
# Where fused scans read the weight of out_proj, peft refuses adapters on it. Ours count: `LoRALinear.weight` has them.
_PEFT_REFUSES_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_OBSTACLE_BY_KIND = {
    "Linear8bitLt": "its weight is 8-bit; load the model in bf16, or with load_in_4bit and nf4",
    "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads this weight without calling the layer",
}


@dataclass
class Site:
    """A linear layer of the model, what is to become of it, and why not more.

    Args:
        module: the layer; None once its weight is quantized.
        shape: (out_features, in_features).
        obstacle: why it cannot be replaced; empty where it can.
        nf4_obstacle: why its weight stays in full precision.
        no_adapter: why it gets no adapter, where the data decided that.
        trained: it is trained in full (`modules_to_save`).
    """

    name: str
    module: Any
    shape: tuple[int, int]
    places: Places = field(default_factory=list)
    obstacle: str = ""
    shared_with: str = ""
    nf4_obstacle: str = ""
    adapt: bool = False
    r: int = 0
    lora_alpha: float = 0.0
    quantize: bool = False
    trained: bool = False
    no_adapter: str = ""

    @property
    def kind(self) -> str:
        return type(self.module).__name__


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every linear layer of the model by name, with the obstacle to replacing it and what shares its weight."""
    sharers: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                sharers.setdefault(id(parameter), []).append(f"{name}.{parameter_name}".lstrip("."))
    by_id: dict[int, Site] = {}
    for name, module in model.named_modules():
        shape = _linear_shape(module)
        if shape is None:
            continue
        site = by_id[id(module)] = Site(name, module, shape, obstacle=layer_obstacle(module))
        if not name:
            site.obstacle = "it is the model itself and has no parent: wrap it, as in nn.Sequential(linear)"
        others = [other for other in sharers.get(id(module._parameters.get("weight")), []) if other != f"{name}.weight"]
        site.shared_with = others[0] if others else ""
    for key, places in places_of(model, (site.module for site in by_id.values())).items():
        by_id[key].places = places
    return {site.name: site for site in by_id.values()}


def places_of(model: nn.Module, modules: Iterable[nn.Module]) -> dict[int, Places]:
    """Where the model uses each of these modules, by the module's id: the result keeps none of them alive."""
    found: dict[int, Places] = {id(module): [] for module in modules}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in found:
                found[id(child)].append((parent, attribute))
    return found


def put(places: Places, module: nn.Module) -> None:
    """Use this module in all these places."""
    for parent, attribute in places:
        setattr(parent, attribute, module)


def layer_obstacle(module: Any) -> str:
    """Why a linear layer cannot be replaced; empty where it can."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed by other modules"
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its inputs or weights (device_map over several devices): load the model on one device"
    if not is_plain(module):
        return "it has hooks or a forward of its own, which a LoRALinear would not run"
    if is_linear4bit(module):
        try:
            AdoptedWeight().of(module)
        except ValueError as error:
            return str(error)
        return ""
    if not is_dense(module) and type(module) is not NF4Linear:
        return _OBSTACLE_BY_KIND.get(kind, f"{kind} has a forward of its own")
    if isinstance(module, NF4Linear):
        return ""
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}; fp32, bf16 or fp16 can be replaced"
    return ""


def output_head(model: nn.Module) -> str | None:
    """Name of the output head: that of `get_output_embeddings()`, else `lm_head`, `score` or `classifier`."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        head = next((found for name in _HEAD_NAMES if (found := getattr(model, name, None)) is not None), None)
    return next((name for name, module in model.named_modules() if module is head and name), None)


def _linear_shape(module: Any) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer of any kind, None for other modules."""
    if isinstance(module, (nn.Linear, NF4Linear)):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.nf, module.weight.shape[0]
    return None


def stacks_of_experts(model: nn.Module) -> list[str]:
    """Names of the weights of experts that are 3-d parameters, which are easily overlooked: no linear layers."""
    return [name for name, _, parameter in _own_parameters(model) if parameter.ndim == 3 and "expert" in name.lower()]


def expert_notes(model: nn.Module) -> list[str]:
    """A note on the model's stacks of experts, if there are any."""
    experts = stacks_of_experts(model)
    if not experts:
        return []
    return [
        f"{len(experts)} expert weights are 3-d parameters, not linear layers, and get no adapter without "
        f"target_parameters: {experts[0]}, ..."
    ]


def _routers(model: nn.Module) -> list[str]:
    """Names of the weights of routers that are no linear layers."""
    return [
        name
        for name, module, parameter in _own_parameters(model)
        if parameter.ndim == 2 and type(module).__name__.endswith("Router") and _linear_shape(module) is None
    ]


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, module, parameter) of every parameter."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{key}".lstrip("."), module, parameter


def report_on(model: nn.Module, sites: dict[str, Site], stacks: Sequence[LayerRow] = ()) -> Report:
    """What becomes of every linear layer once the marked sites are replaced; stacks: the rows of stacks of experts."""
    devices = {site.module.weight.device for site in sites.values() if site.adapt}
    devices |= {next(model.get_submodule(row.name.rpartition(".")[0]).parameters()).device for row in stacks}
    backends = {device: backend(device) for device in sorted(devices, key=str)}
    head = output_head(model)
    rows = list(stacks)
    for name, site in sites.items():
        replaced = site.adapt or site.quantize
        in_nf4 = site.quantize or (site.adapt and not is_dense(site.module))
        path, kernels = "unchanged", ""
        if replaced:
            path, kernels = computed_over(site.module, site.shape, site.r, site.quantize)
        reason = _reason(site, head)
        rows.append(LayerRow(name, site.kind, site.shape, replaced, reason, path, site.r, in_nf4, kernels=kernels))
    first = next(iter(backends.values()))
    adapted = {row.name for row in stacks}
    left_out = [name for name in [*stacks_of_experts(model), *_routers(model)] if name not in adapted]
    return Report(rows, first.name, first.reason, _peft_notes(model, sites), left_out)


def _peft_notes(model: nn.Module, sites: dict[str, Site]) -> list[str]:
    """A note on adapters that peft would not load."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    adapted = any(site.adapt and name.rpartition(".")[2] == "out_proj" for name, site in sites.items())
    if kind not in _PEFT_REFUSES_OUT_PROJ or not adapted:
        return []
    return [
        f"peft loads no adapter on out_proj of a {kind} model: load this one with fastlora.load_adapter, or pass "
        "exclude_modules=['out_proj']"
    ]


def _reason(site: Site, head: str | None) -> str:
    """What the report says about one layer."""
    if site.trained:
        return "trained in full (modules_to_save)"
    if site.obstacle:
        return site.obstacle
    if not site.adapt and not site.quantize:
        what = site.no_adapter or ("output head, left alone" if within(site.name, head) else "not a target")
        return f"{what}; not quantized: {site.nf4_obstacle}" if site.nf4_obstacle and what == "not a target" else what
    adapter = f"adapter r={site.r}" if site.adapt else f"no adapter: {site.no_adapter or 'not a target'}"
    if site.quantize:
        return f"{adapter}, weight quantized to NF4"
    if is_linear4bit(site.module):
        return f"{adapter}, bitsandbytes' NF4 weight adopted"
    if isinstance(site.module, NF4Linear):
        return f"{adapter}, weight in NF4 already"
    dtype = str(site.module.weight.dtype).removeprefix("torch.")
    return f"{adapter}, {dtype} weight" + (f", not quantized: {site.nf4_obstacle}" if site.nf4_obstacle else "")


def blocks(model: nn.Module) -> list[Any]:
    """The blocks of which a transformers model has a list, and which can be checkpointed one by one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [child for each in lists for child in each if hasattr(child, "gradient_checkpointing")]
