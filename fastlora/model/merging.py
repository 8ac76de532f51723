"""`merge`: adapters folded into the weights for good.

A dense weight W becomes W + scaling · B A, rounded once. An NF4 weight is quantized again, and few codes change where
the elements of the update are smaller than NF4's steps: of an update 0.007 times as large as W, 1% is left; of one 0.07
times as large, 58%. The share that is left is measured and reported in a warning.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.layers import kept_fp32, sharded
from fastlora.layers.bases import AdoptedWeight, is_linear4bit
from fastlora.layers.dense import plain_layer
from fastlora.layers.lora_experts import LoRAExperts, adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model import on_top, replace, trained_tokens
from fastlora.model.sites import Places, places_of, put
from fastlora.model.trainer_compat import forget_quantization
from fastlora.ops import nf4
from fastlora.ops.linear import nf4_dequantize
from fastlora.ops.nf4 import NF4Weight

_NOT_FINITE = "{} would not be finite after merging: its adapter or weight is broken"


class Kept(NamedTuple):
    """How much of an update a quantized weight holds, as three sums over its elements; sums of layers add up.

    `share` is the projection of the realised update on the true one: 1 where nothing is lost on average. `error` is the
    rms of their difference, in units of the true one's rms.
    """

    along: float = 0.0
    wanted: float = 0.0
    missed: float = 0.0

    @property
    def share(self) -> float:
        return self.along / self.wanted if self.wanted else 1.0

    @property
    def error(self) -> float:
        return (self.missed / self.wanted) ** 0.5 if self.wanted else 0.0

    def plus(self, other: "Kept") -> "Kept":
        """The same for two layers together."""
        return Kept(self.along + other.along, self.wanted + other.wanted, self.missed + other.missed)


def merge(
    model: nn.Module, dtype: torch.dtype | None = None, *, quantize: str | None = None, safe_merge: bool = True
) -> nn.Module:
    """Fold the adapters into the weights: every fastlora layer becomes a plain `nn.Linear` (or `Conv1D`).

    W + scaling · B A is summed in fp32 and rounded once. An NF4 base becomes a full-precision weight, in the dtype it
    had before quantization, and is not quantized again: the update is mostly smaller than NF4's steps, so a second
    quantization would round much of it away and add its own error to the rest. A model in NF4 thus becomes four times
    as large. `quantize="nf4"` keeps it small and warns with the share of the update that is left.

    Args:
        model: a model from `replace_linear`; or one that carries peft's adapters, which peft merges by its own rules.
            There a `Linear4bit` is quantized again, with a warning that says what was lost, unless `dtype` is given:
            then every `Linear4bit` of the model becomes an `nn.Linear` of that dtype.
        dtype: of merged weights; default that of the base.
        quantize: "nf4" keeps a base in NF4 that is in NF4.
        safe_merge: check that all merged weights are finite before anything is changed; each is computed twice.
    Returns:
        The model, changed in place, without wrappers; for a `PeftModel`, the base model inside it.
    Raises:
        ValueError: nothing to merge, a model that FSDP2 has sharded, options that exclude one another, or with
            `safe_merge` a merged weight that is not finite. Nothing is changed.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be None or 'nf4', not {quantize!r}")
    if quantize and dtype is not None:
        raise ValueError("give either dtype, for plain weights, or quantize, for weights in NF4")
    model = sharded.unwrapped(model)
    if sharded.is_sharded(model):
        raise ValueError(
            "the model is sharded: save_adapter(model, directory), then load_adapter into the model as it was before "
            "fully_shard, and merge that"
        )
    with sharded.clean_names(model):
        if replace.carries_peft(model):
            return _merge_with_peft(model, dtype, safe_merge)
        return _merge(model, dtype, quantize, safe_merge)


def _merge(model: nn.Module, dtype: torch.dtype | None, quantize: str | None, safe_merge: bool) -> nn.Module:
    experts = adapted_experts(model)
    inside = tuple(f"{name}." for name in experts)
    wrapped = {id(module.base_layer) for module in model.modules() if isinstance(module, (LoRALinear, LoRAExperts))}
    outer: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (LoRALinear, NF4Linear)) and id(module) not in wrapped and not name.startswith(inside)
    }
    if quantize and any(layer.packed for layer in experts.values()):
        raise ValueError("stacks of experts do not stay in NF4: merge(model) without quantize expands them")
    if not outer and not experts:
        raise ValueError("the model has no fastlora layers to merge")
    if safe_merge:
        _check_finite(outer, experts, dtype)
        if name := kept_fp32.not_finite(model) or trained_tokens.not_finite(model):
            raise ValueError(f"{name} holds values that are not finite in the dtype of the model")
    places = places_of(model, [*outer.values(), *experts.values()])
    _replace_layers(model, outer, places, dtype, quantize)
    for layer in experts.values():
        put(places[id(layer)], layer.to_experts(dtype))
    trained_tokens.fold(model)
    kept_fp32.release(model.modules())
    on_top.allow_peft(model)
    for attribute in ("fastlora_report", "fastlora_settings"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    forget_quantization(model)
    model.fastlora_merged = True  # type: ignore[assignment]
    return model


def _check_finite(layers: Mapping[str, Any], experts: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """Raise ValueError if a merged weight would not be finite."""
    for name, module in layers.items():
        if isinstance(module, LoRALinear) and not torch.isfinite(module.to_linear(dtype).get_parameter("weight")).all():
            raise ValueError(_NOT_FINITE.format(name))
    for name, stacks in experts.items():
        if not all(torch.isfinite(stacks.merged(key, dtype)).all() for key in stacks.r):
            raise ValueError(_NOT_FINITE.format(name))


def kept(before: NF4Weight, after: NF4Weight, update: Tensor) -> Kept:
    """How much `after` holds of an update [N, K] to `before`."""
    realised = after.dequantize(torch.float32) - before.dequantize(torch.float32)
    wanted = update.detach().float()
    along, size, missed = ((a * b).sum(dtype=torch.float64).item() for a, b in (
        (realised, wanted), (wanted, wanted), (realised - wanted, realised - wanted),
    ))  # fmt: skip
    return Kept(along, size, missed)


def _replace_layers(
    model: nn.Module,
    layers: dict[str, Any],
    places: Mapping[int, Places],
    dtype: torch.dtype | None,
    quantize: str | None,
) -> None:
    """Put merged layers in the places of these, taking each out of `layers`: it is freed before the next is merged."""
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    left = Kept()
    for name in list(layers):
        module = layers.pop(name)
        base = getattr(module, "base_layer", module)
        in_nf4 = isinstance(base, NF4Linear) or is_linear4bit(base)
        if isinstance(base.weight, nn.Parameter) and shared[id(base.weight)] > 1 and not in_nf4:
            warnings.warn(
                f"{name} shared its weight with another module and has a weight of its own after merging: set "
                "tie_word_embeddings=False in the model's config before saving",
                stacklevel=3,
            )
        if quantize and in_nf4:
            merged, here = _quantized_again(module) if module is not base else (base, Kept())
            left = left.plus(here)
        else:
            merged = module.to_linear(dtype)
        put(places[id(module)], merged)
    if left.wanted:
        _warn(left)


def _quantized_again(layer: LoRALinear) -> tuple[nn.Module, Kept]:
    """A layer's base with the update quantized into it, and how much of the update it holds."""
    base: Any = layer.base_layer
    before = AdoptedWeight().of(base) if is_linear4bit(base) else base.weight
    lora_a, lora_b, scaling = layer.adapter()
    merged = nf4_dequantize(before, torch.float32, lora_a, lora_b, scaling)
    after = nf4.quantize(merged.to(before.dtype), before.blocksize, before.nested)
    left = kept(before, after, scaling * (lora_b.detach().float() @ lora_a.detach().float()))
    if is_linear4bit(base):
        base.weight = after.to_bnb()
        return base, left
    return NF4Linear(after, base.bias, base.fan_in_fan_out).train(base.training), left


def _warn(left: Kept) -> None:
    warnings.warn(
        f"merged into NF4, the weights hold {left.share:.0%} of the update, and an error {left.error:.1f} times as "
        "large as the update: merge(model, dtype=torch.bfloat16) keeps all of it, in four times the memory",
        stacklevel=4,
    )


def _merge_with_peft(model: Any, dtype: torch.dtype | None, safe_merge: bool) -> nn.Module:
    """peft's merge_and_unload: into dense weights if a dtype is given, else into NF4, measuring what is left."""
    from peft.tuners.lora import LoraLayer

    if not hasattr(model, "merge_and_unload"):
        raise ValueError("peft merges only a PeftModel; this model had adapters injected: wrap it with get_peft_model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    in_nf4 = [layer for layer in layers.values() if is_linear4bit(layer.get_base_layer())]
    if dtype is not None and any(layer.merged for layer in in_nf4):
        raise ValueError("adapters are merged into the 4-bit weights already: call model.unmerge_adapter() first")
    for name, layer in layers.items():
        _check_peft_layer(name, layer, dtype, safe_merge)
    left = Kept()
    for layer in in_nf4:
        if dtype is not None:
            _merge_into_plain(layer, dtype)
        elif not layer.merged:
            left = left.plus(_merge_into_nf4(layer))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="Already following adapters were merged")
        bare: nn.Module = model.merge_and_unload()
    if left.wanted:
        _warn(left)
    if dtype is not None:
        _expand_rest(bare, dtype)
    bare.fastlora_merged = True  # type: ignore[assignment]
    return bare


def _check_peft_layer(name: str, layer: Any, dtype: torch.dtype | None, safe_merge: bool) -> None:
    """Raise ValueError if a layer of peft's cannot be merged, or its merged weight would not be finite."""
    from fastlora.peft_layers import experts

    base, names = layer.get_base_layer(), [own for own in layer.active_adapters if own in layer.lora_A]
    names = [] if layer.merged else names
    if experts.is_wrapper(layer) and experts.is_packed(layer):
        raise ValueError(
            f"{name}: {layer.parameter_name} is packed in 4 bits and cannot take an update: save the adapter, load the "
            "model without quantization, and merge there"
        )
    if any(layer.lora_bias.get(adapter) for adapter in names) and getattr(base, "bias", None) is None:
        raise ValueError(f"{name}: lora_bias=True cannot be merged into a layer without a bias: keep the adapter")
    if not safe_merge:
        return
    for adapter in names:
        found = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        if adapter not in layer.lora_variant and isinstance(base, nn.Linear):
            weight = AdoptedWeight().of(base).dequantize() if is_linear4bit(base) else base.weight
            found = [(weight.detach() + layer.get_delta_weight(adapter).detach()).to(dtype or weight.dtype)]
        if not all(torch.isfinite(tensor).all() for tensor in found):
            raise ValueError(_NOT_FINITE.format(name))


def _merge_into_nf4(layer: Any) -> Kept:
    """Merge one layer by peft's code: how much of the update is left; not measured for variants such as DoRA."""
    base, names = layer.get_base_layer(), [name for name in layer.active_adapters if name in layer.lora_A]
    before = AdoptedWeight().of(base)
    plain = names and not any(name in layer.lora_variant for name in names)
    update = sum(layer.get_delta_weight(name) for name in names) if plain else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear")
        layer.merge()
    for name in names:
        if layer.lora_bias.get(name):  # peft adds the bias of B here as if the scaling were 1
            base.bias.data += (layer.scaling[name] - 1) * layer.lora_B[name].bias.data
    return kept(before, AdoptedWeight().of(base), update) if isinstance(update, Tensor) else Kept()


def _merge_into_plain(layer: Any, dtype: torch.dtype) -> None:
    """Give a layer of peft's an `nn.Linear` in fp32 as its base, merge by peft's code, and round once."""
    from peft.tuners.lora import layer as peft_layer

    base = layer.get_base_layer()
    plain = _expanded(base, torch.float32)
    layer.base_layer, layer.__class__ = plain, peft_layer.Linear
    layer.merge()
    plain.to(dtype)


def _expand_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Expand the 4-bit layers that had no adapter, and remove the marks of quantization from the model."""
    layers = [module for module in model.modules() if is_linear4bit(module)]
    places = places_of(model, layers)
    while layers:
        layer = layers.pop()
        put(places[id(layer)], _expanded(layer, dtype))
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _expanded(linear4bit: Any, dtype: torch.dtype) -> nn.Module:
    """An `nn.Linear` with the values of a `Linear4bit`."""
    weight = AdoptedWeight().of(linear4bit).dequantize(dtype)
    return plain_layer(weight, linear4bit.bias, linear4bit.training, transposed=False)
