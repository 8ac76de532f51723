"""Adapters folded into the weights for good.

Into a dense weight W + scaling · B A is rounded once. Into NF4 it is quantized anew, and few codes change where the
elements of the update are smaller than NF4's steps: of an update 0.007 times as large as W, 1% is left; of one 0.07
times as large, 58%. What is left is measured and told.
"""

import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.layers import sharded
from fastlora.layers.bases import AdoptedWeight, is_linear4bit
from fastlora.layers.lora_experts import adapted_experts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model import replace, trained_tokens
from fastlora.model.sites import put
from fastlora.model.trainer_compat import forget_quantization
from fastlora.ops import nf4
from fastlora.ops.linear import nf4_dequantize
from fastlora.ops.nf4 import NF4Weight


class Kept(NamedTuple):
    """What a quantized weight holds of an update. Sums over layers add.

    `share` is the projection of the realised update on the true one: 1 where nothing is lost on average. `error` is the
    rms difference of the two, in units of the true one's rms.
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
        """The same of two layers together."""
        return Kept(self.along + other.along, self.wanted + other.wanted, self.missed + other.missed)


def merge(
    model: nn.Module, dtype: torch.dtype | None = None, *, quantize: str | None = None, safe_merge: bool = True
) -> nn.Module:
    """Fold the adapters into the weights: every fastlora layer becomes a plain `nn.Linear` (or `Conv1D`).

    W + scaling · B A is summed in fp32 and rounded once. An NF4 base becomes a full-precision weight, in the dtype it
    had before quantization, and is not quantized again: the update is mostly smaller than NF4's steps, so a second
    quantization would round much of it away and add its own error to the rest. A model in NF4 thus grows fourfold;
    `quantize="nf4"` keeps it small, and warns with the share of the update that is left.

    Args:
        model: a model from `replace_linear`; or one that carries peft's adapters, which peft merges by its own rules.
            There a `Linear4bit` is quantized again, with a warning that says what was lost, unless `dtype` is given:
            then all of the model's `Linear4bit` layers become plain ones of that dtype.
        dtype: dtype of merged weights; default that of the base.
        quantize: "nf4" leaves a base that is NF4 in NF4.
        safe_merge: look for merged weights that are not finite before anything is changed; each is formed twice.
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
    if replace.carries_peft(model):
        return _merge_with_peft(model, dtype, safe_merge)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, (LoRALinear, NF4Linear))]
    experts = adapted_experts(model)
    inside = tuple(f"{name}." for name in experts)
    outer: dict[str, Any] = {
        name: module for name, module in found if not name.endswith(".base_layer") and not name.startswith(inside)
    }
    if quantize and any(layer.packed for layer in experts.values()):
        raise ValueError("stacks of experts do not stay in NF4: merge(model) without quantize expands them")
    if not outer and not experts:
        raise ValueError("the model has no fastlora layers to merge")
    if safe_merge:
        for name, module in outer.items():
            if isinstance(module, LoRALinear) and not _is_finite(module.to_linear(dtype)):
                raise ValueError(f"{name} would not be finite after merging: its adapter or weight is broken")
        for name, layer in experts.items():
            if not all(torch.isfinite(layer.merged(key, dtype)).all() for key in layer.r):
                raise ValueError(f"{name} would not be finite after merging: its adapter or weight is broken")
    _replace_each(model, outer, dtype, quantize)
    for layer in experts.values():
        put(model, layer, layer.to_experts(dtype))
    trained_tokens.fold(model)
    for attribute in ("fastlora_report", "fastlora_settings"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    forget_quantization(model)
    return model


def kept(before: NF4Weight, after: NF4Weight, update: Tensor) -> Kept:
    """What a weight quantized anew holds of an update [N, K] to the weight before."""
    realised = after.dequantize(torch.float32) - before.dequantize(torch.float32)
    wanted = update.detach().float()
    along, size, missed = ((a * b).sum(dtype=torch.float64).item() for a, b in (
        (realised, wanted), (wanted, wanted), (realised - wanted, realised - wanted),
    ))  # fmt: skip
    return Kept(along, size, missed)


def _replace_each(model: nn.Module, outer: dict[str, Any], dtype: torch.dtype | None, quantize: str | None) -> None:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    left = Kept()
    for name in list(outer):
        module = outer.pop(name)
        base = getattr(module, "base_layer", module)
        in_nf4 = isinstance(base, NF4Linear) or is_linear4bit(base)
        if isinstance(base.weight, nn.Parameter) and shared[id(base.weight)] > 1 and not in_nf4:
            warnings.warn(
                f"{name} shared its weight with another module; merged, it has a weight of its own: set "
                "tie_word_embeddings=False in the model's config before saving",
                stacklevel=3,
            )
        if quantize and in_nf4:
            plain, loss = _quantized_again(module) if module is not base else (base, Kept())
            left = left.plus(loss)
        else:
            plain = module.to_linear(dtype)
        for parent, attribute in places.pop(id(module)):
            setattr(parent, attribute, plain)
    if left.wanted:
        _tell(left)


def _quantized_again(layer: LoRALinear) -> tuple[nn.Module, Kept]:
    """The base of a layer with its update quantized into it, and what is left of the update."""
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


def _tell(left: Kept) -> None:
    warnings.warn(
        f"merged into NF4, the weights hold {left.share:.0%} of the update, and an error {left.error:.1f} times as "
        "large as it: "
        "merge(model, dtype=torch.bfloat16) keeps it, in four times the memory",
        stacklevel=4,
    )


def _is_finite(module: Any) -> bool:
    return bool(torch.isfinite(module.weight).all())


def _merge_with_peft(model: Any, dtype: torch.dtype | None, safe_merge: bool) -> nn.Module:
    """peft's merge_and_unload, over dense weights where a dtype is given; over NF4 with what is left measured."""
    from peft.tuners.lora import LoraLayer

    if not hasattr(model, "merge_and_unload"):
        raise ValueError("peft merges a PeftModel; this model had adapters injected: wrap it with get_peft_model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    in_nf4 = [layer for layer in layers.values() if is_linear4bit(layer.get_base_layer())]
    if dtype is not None and any(layer.merged for layer in in_nf4):
        raise ValueError("adapters are merged into the 4-bit weights already: call model.unmerge_adapter() first")
    for name, layer in layers.items():
        _check_pefts(name, layer, dtype, safe_merge)
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
        _tell(left)
    if dtype is not None:
        _to_plain(bare, dtype)
    return bare


def _check_pefts(name: str, layer: Any, dtype: torch.dtype | None, safe_merge: bool) -> None:
    """Raise ValueError where a layer of peft's cannot be merged, or not into finite weights."""
    from fastlora.peft_layers import experts as experts_

    base, names = layer.get_base_layer(), [own for own in layer.active_adapters if own in layer.lora_A]
    names = [] if layer.merged else names
    if experts_.is_wrapper(layer) and experts_.is_packed(layer):
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
            raise ValueError(f"{name} would not be finite after merging: its adapter or weight is broken")


def _merge_into_nf4(layer: Any) -> Kept:
    """peft's merge of one layer, and what is left of the update; not measured for variants such as DoRA."""
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
    """Give a layer of peft's a plain base in fp32, merge by peft's code, and round once."""
    from peft.tuners.lora import layer as peft_layer

    base = layer.get_base_layer()
    plain = _plain(base, torch.float32)
    layer.base_layer, layer.__class__ = plain, peft_layer.Linear
    layer.merge()
    plain.to(dtype)


def _to_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Expand the 4-bit layers that no adapter was on, and take the marks of quantization off the model."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and is_linear4bit(child):
                setattr(parent, attribute, _plain(child, dtype))
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _plain(linear4bit: Any, dtype: torch.dtype) -> nn.Linear:
    weight = AdoptedWeight().of(linear4bit).dequantize(dtype)
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if linear4bit.bias is not None:
        linear.bias = nn.Parameter(linear4bit.bias.detach().to(dtype), requires_grad=False)
    return linear.train(linear4bit.training)
