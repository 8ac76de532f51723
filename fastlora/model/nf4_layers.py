"""Which weights of a model become NF4, and the quantization of one after the other."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fastlora.layers.dense import is_dense
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.names import within
from fastlora.model.settings import LayerOptions
from fastlora.model.sites import Site, output_head, put


def mark(model: nn.Module, sites: dict[str, Site], excluded: Collection[str], row_trained: Collection[str]) -> None:
    """Mark the sites whose weight is to become NF4, and note the obstacle on the others.

    Args:
        excluded: names that get neither an adapter nor NF4. row_trained: names of modules with trained tokens.
    Raises:
        ValueError: a weight that cannot be quantized: on the meta device, empty, or not finite.
    """
    head = output_head(model)
    for name, site in sites.items():
        if not is_dense(site.module) or site.obstacle:
            continue
        if site.trained:
            site.nf4_obstacle = "trained in full"
        elif name in row_trained:
            site.nf4_obstacle = "some of its rows are trained"
        elif site.shared_with:
            site.nf4_obstacle = f"its weight is shared with {site.shared_with}"
        elif name in excluded:
            site.nf4_obstacle = "excluded"
        elif within(name, head):
            site.nf4_obstacle = "the output head keeps its dtype"
        else:
            _check_quantizable(name, site.module.weight)
            site.quantize = True


def quantize(
    sites: dict[str, Site],
    layers: Mapping[str, LoRALinear],
    options: LayerOptions,
    taken_out: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Turn marked weights into NF4; each is freed before the next is quantized.

    taken_out: (A [R, K], B [N, R]) by name; from these weights W - B A is quantized, summed in fp32.
    """
    done = 0
    for name, site in sites.items():
        linear, site.module = site.module, None
        if not site.quantize:
            continue
        try:
            base = NF4Linear.from_linear(linear, options.blocksize, options.double_quant, taken_out.get(name))
        except Exception as error:
            raise RuntimeError(
                f"quantizing {name} failed after {done} layers had been replaced; load the model again"
            ) from error
        if name in layers:
            layers[name].base_layer = base
        else:
            put(site.places, base)
        done += 1


def _check_quantizable(name: str, weight: Tensor) -> None:
    if weight.device.type == "meta":
        raise ValueError(f"{name}.weight is on the meta device: load the weights before quantizing")
    if weight.numel() == 0:
        raise ValueError(f"{name}.weight is empty: exclude it or load the weights (gather them first under ZeRO-3)")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight holds NaN or inf: repair the checkpoint, or exclude the layer")
