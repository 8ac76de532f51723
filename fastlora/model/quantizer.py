"""NF4 for transformers' `from_pretrained`, without bitsandbytes.

    config = fastlora.FastLoRANF4Config()
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    model = fastlora.replace_linear(model, r=16)

Every linear layer becomes an `NF4Linear` while the checkpoint is read, except the output head, what is tied to it, and
`modules_to_not_convert`. Each weight is quantized as soon as it is read, so peak memory is the quantized model and one
weight. `save_pretrained` writes bitsandbytes' tensor names and this config. A model saved so loads as it is, once
`fastlora.FastLoRANF4Config` has been accessed: that registers the format with transformers.

transformers' converters pass each weight to the operations here, which attach its NF4 form to the `nn.Linear` on the
meta device. The layer is replaced only after all weights are read, because transformers then empties the buffers that
it finds.
"""

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"FastLoRANF4Config needs transformers 5: pip install 'transformers>=5' ({error})") from error

from fastlora.kernels.operands import BLOCKSIZES
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.names import nearest
from fastlora.model.sites import expert_notes, places_of, put
from fastlora.ops.nf4 import NF4Weight, quantize

logger = logging.getLogger(__name__)
METHOD = "fastlora_nf4"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


@register_quantization_config(METHOD)
class FastLoRANF4Config(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model's linear layers to NF4.

    Args:
        blocksize: values per scale: 32, 64, ... 4096.
        double_quant: quantize the scales too.
        modules_to_not_convert: layers to leave as they are, in addition to the output head: the beginning of a name,
            its end, or a regular expression, as transformers matches them.
    Raises:
        ValueError: a blocksize that NF4 does not have, or an unknown option.
    """

    def __init__(
        self,
        blocksize: int = 64,
        double_quant: bool = True,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"FastLoRANF4Config has no option {next(iter(unknown))!r}: it takes blocksize, double_quant and "
                "modules_to_not_convert"
            )
        if quant_method != METHOD:
            raise ValueError(f"this config is for quant_method {METHOD!r}, not {quant_method!r}")
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {blocksize}")
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert must be a list of names: [{modules_to_not_convert!r}]")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(METHOD)
class FastLoRANF4Quantizer(HfQuantizer):
    """Puts `NF4Linear` in place of linear layers while transformers reads a checkpoint."""

    quantization_config: FastLoRANF4Config
    serialized_names: ClassVar = {  # type: ignore[misc]
        "weight": ["weight", *(f"weight.{part}" for part in _PARTS)]
    }

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, for transformers' device maps."""
        return 0.5

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError if the model is to be spread over several devices."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):
            _refuse_several_devices(device_map)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this parameter is a weight that is to be quantized."""
        module, name = get_module_from_name(model, param_name)
        return name == "weight" and type(module) is nn.Linear and param_name.removesuffix(".weight") in self._targets

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skipped = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        for entry in config.modules_to_not_convert or ():
            if all(should_convert_module(name, [entry]) for name in linear):
                raise ValueError(
                    f"modules_to_not_convert: {entry!r} matches no linear layer of {type(model).__name__}: give the "
                    f"beginning or the end of a name{nearest(entry, linear)}"
                )
        self._targets = {name for name in linear if should_convert_module(name, skipped)}
        for note in expert_notes(model):
            logger.warning("not quantized: %s", note)
        if not self._targets:
            kept = ", ".join(sorted(skipped))
            raise ValueError(f"{type(model).__name__} has no linear layer to quantize except {kept}")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _refuse_several_devices(getattr(model, "hf_device_map", {}))
        layers = {name: model.get_submodule(name) for name in sorted(self._targets)}
        if missing := [name for name, linear in layers.items() if not hasattr(linear, "fastlora_nf4")]:
            raise ValueError(
                f"the checkpoint has no usable weight for {len(missing)} layers to be quantized, such as "
                f"{missing[0]!r}: repair it, or name them in modules_to_not_convert"
            )
        places = places_of(model, layers.values())
        for linear in layers.values():
            put(places[id(linear)], NF4Linear(linear.fastlora_nf4, linear.bias).train(linear.training))
        conversions = getattr(model, "_weight_conversions", None) or []
        # nothing is to be converted back when the model is saved: a state dict has the names that were read
        model._weight_conversions = [each for each in conversions if not _is_ours(each)]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it can be trained."""
        return True

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes one weight of a plain checkpoint."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """What reads one weight of a checkpoint in NF4."""
        return {"deserialize": _Deserialize}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The same for transformers before 5.21, which knows no `serialized_names` and tries names in order."""
        names = self.serialized_names["weight"][::-1]  # "weight", which begins each of the others, last
        return [WeightConverter(names, "weight", [_Deserialize(self)])] if self.pre_quantized else []

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
        places = places_of(model, layers)
        for layer in layers:
            put(places[id(layer)], layer.to_linear(dtype))
        return model


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: FastLoRANF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def keep(self, name: str, weight: NF4Weight, model: Any, missing_keys: set[str] | None, **others: Any) -> None:
        """Attach a weight to its layer, and remove it from the names still to be loaded."""
        linear, _ = get_module_from_name(model, name)
        expected = (linear.out_features, linear.in_features)
        if weight.shape != expected:
            raise ValueError(f"{name} has shape {list(weight.shape)} in the checkpoint, {list(expected)} in the model")
        linear.fastlora_nf4 = weight
        if missing_keys is not None:
            missing_keys.discard(name)


class _Quantize(_Operation):
    """Turns a dense weight into NF4."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        config = self.hf_quantizer.quantization_config
        for name, value in input_dict.items():
            weight = quantize(_one(value), config.blocksize, config.double_quant)
            self.keep(name, weight, **kwargs)
        return {}


class _Deserialize(_Operation):
    """Gives a layer the tensors of its NF4 weight; any other weight passes, in the model's dtype."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        model, name = kwargs["model"], kwargs["full_layer_name"]
        parts = {part: _one(value) for part, value in input_dict.items()}
        if not self.hf_quantizer.param_needs_quantization(model, name):
            (value,) = parts.values()
            return {"weight": value.to(model.get_parameter_or_buffer(name).dtype)}
        self.keep(name, NF4Weight.from_state_dict(parts), **kwargs)
        return {}


def _one(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _refuse_several_devices(device_map: dict[str, Any]) -> None:
    devices = {str(device) for device in device_map.values()}
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"a model in fastlora's NF4 must be on one device, not on {', '.join(sorted(devices))}: give a device_map "
            'with one, such as {"": "cuda:0"}'
        )


def _is_ours(conversion: Any) -> bool:
    operations = conversion.operations if isinstance(conversion, WeightConverter) else ()
    return any(isinstance(operation, _Operation) for operation in operations)
