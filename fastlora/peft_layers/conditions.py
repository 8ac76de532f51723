"""When one of peft's LoRA layers can be sped up, and what it holds at that moment.

Everything is read from the layer at each call: a user may disable, merge, add, switch or hot-swap adapters at any time.
A reason is a short sentence; it is empty where our forward computes the same as peft's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastlora.kernels.operands import FLOAT_DTYPES, Lora
from fastlora.layers.bases import compute_dtype, is_linear4bit, is_plain
from fastlora.layers.dense import dense_weight, is_conv1d, is_dense, parameter

try:
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError:  # an older peft; with it DoRA steps back
    DoraLinearVariant = None  # type: ignore[assignment, misc]

# Reasons that the user asked for: not worth a warning.
EXPECTED = (
    "adapters are disabled",
    "adapters are merged",
    "no adapter of this layer is active",
    "peft's DoraCaching keeps B A and the norms",
)
_PLAIN = (nn.Parameter, Tensor)
_LINEARS, _DROPOUTS, _NUMBERS = (nn.Linear, nn.Linear), (nn.Identity, nn.Dropout), (float, int)
_CPU = torch.device("cpu")
_TRANSPOSED = "fan_in_fan_out: the weight is transposed"


def linear_reason(layer: peft_layer.LoraLayer, whichever_is_active: bool = False) -> str:
    """Why a layer whose class can be sped up cannot be in its present state; empty where it can.

    whichever_is_active: only a reason that holds whichever adapters are active.
    """
    if "forward" in layer.__dict__:
        return "its forward has been replaced on the instance"
    base = layer.base_layer
    reason = base_reason(base) or _orientation_reason(layer, base)
    if reason:
        return reason
    names = list(layer.lora_A) if whichever_is_active else active_names(layer) or list(layer.lora_A)
    reasons = [adapter_reason(layer, name) for name in names]
    return reasons[0] if reasons and all(reasons) else ""


def at_a_call(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, list[str]]:
    """Why this call must go to peft's forward, empty where ours computes the same, and the adapters that take part."""
    per_sample = kwargs.get("adapter_names")
    if args or (kwargs and any(value is not None for name, value in kwargs.items() if name != "adapter_names")):
        return "called with more than the input", []
    if layer.disable_adapters:
        return EXPECTED[0], []
    if layer.merged:
        return EXPECTED[1], []
    active = active_names(layer) if per_sample is None else sampled_names(layer, per_sample)
    if per_sample is None and not active:
        return EXPECTED[2], []
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks for all modules are registered", []
    base = layer._modules["base_layer"]
    reason = base_reason(base) or _orientation_reason(layer, base)
    for name in active:
        reason = reason or adapter_reason(layer, name)
    if per_sample is not None:
        reason = reason or _mixed_reason(layer, active, x, per_sample)
    elif len(active) > 1:
        reason = reason or _together_reason(layer, active)
    if reason:
        return reason, active
    weights = layer._modules["lora_A"]._modules
    dtypes = {parameter(weights[name], "weight").dtype for name in active}
    dora = bool(active) and active[0] in layer.lora_variant
    if dora and _peft_keeps(layer.lora_magnitude_vector._modules[active[0]]):
        return EXPECTED[3], active
    return _dtype_reason(x, base, dtypes, dora, dora and _dropped(layer, active[0]) > 0), active


def only_adapter(layer: Any, x: Tensor) -> Lora | None:
    """The adapter of a call without further arguments, where one plain adapter is active and nothing is in the way.

    In a quarter of the time of `at_a_call`, which finds the same there. None: `at_a_call` is to decide.
    """
    active = layer._active_adapter
    if type(active) is not str:
        if len(active) != 1:
            return None
        active = active[0]
    modules = layer._modules
    base, lora_a = modules["base_layer"], modules["lora_A"]._modules.get(active)
    if (
        lora_a is None or layer._disable_adapters or layer.merged_adapters or active in layer.lora_variant
        or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    ):  # fmt: skip
        return None
    lora_b, dropout = modules["lora_B"]._modules[active], modules["lora_dropout"]._modules[active]
    kinds, scaling = (type(lora_a), type(lora_b)), layer.scaling[active]
    if kinds != _LINEARS or type(scaling) not in _NUMBERS or type(dropout) not in _DROPOUTS:
        return None
    if not (is_plain(base) and is_plain(lora_a) and is_plain(lora_b) and is_plain(dropout)):
        return None
    of_a, of_b, dtype = lora_a._parameters, lora_b._parameters, x.dtype
    if of_a.get("bias", 0) is not None or of_b.get("bias", 0) is not None:
        return None
    a: Any = of_a.get("weight")
    b: Any = of_b.get("weight")
    if type(a) not in _PLAIN or type(b) not in _PLAIN or a.dtype is not b.dtype:
        return None
    weight: Any = base._parameters.get("weight")
    if dtype not in FLOAT_DTYPES or base._modules:
        return None
    if torch.is_autocast_enabled(x.device.type):
        if base_reason(base) or is_conv1d(base) or _dtype_reason(x, base, {a.dtype}, False, False):
            return None
    elif type(base) is nn.Linear:
        if type(weight) not in _PLAIN or weight.dtype is not dtype:
            return None
        if a.dtype is not torch.float32 and a.dtype is not dtype:
            return None
    elif is_linear4bit(base):
        if layer.fastlora_adopted.known(weight) is None:
            return None
        if a.dtype is not torch.float32 and a.dtype is not compute_dtype(base, x):
            return None
    else:
        return None
    if not layer.cast_input_dtype_enabled or layer.__dict__.get("fan_in_fan_out"):
        return None
    p = dropout.__dict__.get("p", 0.0) if dropout.training else 0.0
    return Lora(a, b, scaling, p) if p < 1.0 - 2**-17 else None


def _peft_keeps(magnitude: Any) -> bool:
    """Whether peft fills and reads its own cache in this call of DoRA; an older peft has none."""
    return getattr(peft_dora, "ENABLE_DORA_CACHING", False) and not magnitude.training


def _dropped(layer: Any, name: str) -> float:
    """The share of its input that an adapter drops now: p of `nn.Dropout`, 0 for `nn.Identity`."""
    dropout = layer._modules["lora_dropout"]._modules[name]
    return dropout.__dict__.get("p", 0.0) if dropout.training else 0.0  # type: ignore[no-any-return]


def active_names(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    known = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in known]


def sampled_names(layer: Any, per_sample: Sequence[str]) -> list[str]:
    """The adapters of a mixed batch that this layer has, each once."""
    known = layer._modules["lora_A"]._modules
    return [name for name in dict.fromkeys(per_sample) if name in known]


def adapter(layer: Any, name: str) -> Lora:
    """One adapter in its present state."""
    modules = layer._modules
    a, lora_b = parameter(modules["lora_A"]._modules[name], "weight"), modules["lora_B"]._modules[name]
    b, bias, scaling = parameter(lora_b, "weight"), parameter(lora_b, "bias"), layer.scaling[name]
    if isinstance(scaling, Tensor):  # so peft prepares for hot-swapping under torch.compile: no number in the graph
        b, bias, scaling = b * scaling, None if bias is None else bias * scaling, 1.0
    return Lora(a, b, scaling, _dropped(layer, name), bias=bias)


def _together_reason(layer: Any, names: list[str]) -> str:
    """Why several adapters cannot run as one; empty where they can."""
    if any(name in layer.lora_variant for name in names):
        return f"{len(names)} adapters are active, one of them DoRA"
    return ""


def _mixed_reason(layer: Any, names: list[str], x: Tensor, per_sample: Sequence[str]) -> str:
    """Why a batch with several adapters cannot run as one; what peft refuses goes to peft, which raises its error."""
    if any(name in layer.lora_variant for name in names):
        return "DoRA with adapter_names"
    if x.ndim < 2 or len(per_sample) != x.shape[0]:
        return "adapter_names does not name one adapter for each sample"
    if len({parameter(layer._modules["lora_A"]._modules[name], "weight").dtype for name in names}) > 1:
        return f"the batch has {len(names)} adapters, of different dtypes"
    return ""


def base_reason(base: Any) -> str:
    """Why our forward cannot compute a base layer; empty where it can."""
    if not is_plain(base):
        return "the base layer has hooks or a forward of its own"
    if is_dense(base):
        if "parametrizations" in base._modules:
            return "the base layer is parametrized"
        weight = parameter(base, "weight")
        if type(weight) not in _PLAIN:
            return f"the base weight is a {type(weight).__name__}"
        return "" if weight.dtype in FLOAT_DTYPES else f"the base weight is {weight.dtype}"
    if "parametrizations" in base._modules:
        return "the base layer is parametrized"
    if not is_linear4bit(base):
        return f"the base layer is a {type(base).__name__}"
    state = getattr(parameter(base, "weight"), "quant_state", None)
    if state is None:
        return "bitsandbytes has not quantized the base weight yet"
    if state.quant_type != "nf4":
        return f"the base weight is {state.quant_type}"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the base weight for CPU inference"
    return ""


def _orientation_reason(layer: Any, base: Any) -> str:
    """A `Conv1D` is transposed and is read so; any other layer with fan_in_fan_out is left to peft."""
    return "" if bool(getattr(layer, "fan_in_fan_out", False)) == is_conv1d(base) else _TRANSPOSED


def adapter_reason(layer: Any, name: str) -> str:
    """Why our forward cannot compute one adapter; empty where it can."""
    if name in layer.lora_variant and (reason := _variant_reason(layer, name)):
        return reason
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "A or B is parametrized or not a plain nn.Linear"
    if not (is_plain(lora_a) and is_plain(lora_b)):
        return "A or B has hooks or a forward of its own"
    if parameter(lora_a, "bias") is not None:
        return "A has a bias"
    a: Any = parameter(lora_a, "weight")
    b: Any = parameter(lora_b, "weight")
    bias: Any = parameter(lora_b, "bias")
    if type(a) not in _PLAIN or type(b) not in _PLAIN:
        return f"A is a {type(a).__name__} and B a {type(b).__name__}"
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype not in FLOAT_DTYPES):
        return f"B's bias is a {type(bias).__name__} of {bias.dtype}"
    if bias is not None and name in layer.lora_variant:
        return "lora_bias with DoRA"
    if type(dropout) not in (nn.Dropout, nn.Identity) or not is_plain(dropout):
        return "the dropout layer is not nn.Dropout or has hooks"
    if dropout.training and dropout.__dict__.get("p", 0.0) >= 1.0 - 2**-17:
        return "lora_dropout drops everything"
    if reason := _scaling_reason(layer, name, b):
        return reason
    if a.dtype != b.dtype:
        return "A and B differ in dtype"
    return "" if layer.cast_input_dtype_enabled else "casting of the input is disabled"


def _scaling_reason(layer: Any, name: str, lora_b: Tensor) -> str:
    scaling = layer.scaling[name]
    if isinstance(scaling, (int, float)):
        return ""
    if type(scaling) in _PLAIN and scaling.ndim == 0 and scaling.device in (lora_b.device, _CPU):
        return "DoRA with a tensor as scaling" if name in layer.lora_variant else ""
    return "scaling is not a number"


def _variant_reason(layer: Any, name: str) -> str:
    """Why an adapter that is a variant is left to peft; empty for DoRA where ours computes it."""
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"the adapter is a variant, {type(layer.lora_variant[name]).__name__}"
    magnitude = layer.lora_magnitude_vector._modules[name]
    if type(magnitude.weight) not in _PLAIN or not is_plain(magnitude):
        return "DoRA's magnitude has hooks, a forward of its own, or is not a plain tensor"
    return "DoRA with ephemeral_gpu_offload" if layer.ephemeral_gpu_offload else ""


def _dtype_reason(x: Tensor, base: Any, adapters: set[torch.dtype], dora: bool, drops: bool) -> str:
    """Why ours does not take these dtypes; empty where it does: x as the weight, or autocast; adapters fp32 or as x."""
    given, four_bit, autocast = x.dtype, not is_dense(base), torch.is_autocast_enabled(x.device.type)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        # over 4 bits peft adds the update, in autocast's dtype, to a result in the input's: the sum may have neither
        good = dtype in FLOAT_DTYPES and (not four_bit or given in (torch.float32, dtype))
    else:
        dtype = compute_dtype(base, x) if four_bit else dense_weight(base).dtype
        good = four_bit or given is dtype
    if good and not dora and given in FLOAT_DTYPES and adapters <= {torch.float32, dtype}:
        return ""
    names = ", ".join(sorted(map(str, adapters)))
    if not (good and given in FLOAT_DTYPES and adapters <= {torch.float32, dtype}):
        return f"dtypes: input {given}, adapters {names}, computed in {dtype}"
    if not dora or adapters <= {dtype}:
        return ""
    if drops and not autocast:
        return f"DoRA with dropout and {names} adapters over {dtype}: peft multiplies in {names}"
    trained = not four_bit and dense_weight(base).requires_grad
    return f"DoRA with {names} adapters over a trained {dtype} weight" if trained else ""
