"""Which weights of a model become NF4, and making them so, one at a time."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fastlora.layers.dense import is_dense
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.names import within
from fastlora.model.sites import Site, output_head


def decide(
    model: nn.Module, sites: dict[str, Site], excluded: Collection[str], rows_trained: Collection[str] = ()
) -> None:
    """Mark the sites whose weight shall become NF4, with the reason on those whose weight shall not.

    Raises:
        ValueError: a weight that cannot be quantized: on the meta device, empty, or not finite.
    """
    head = output_head(model)
    for name, site in sites.items():
        if not is_dense(site.module) or site.obstacle:
            continue
        if site.trained:
            site.no_quantize = "trained in full"
        elif name in rows_trained:
            site.no_quantize = "some of its rows are trained"
        elif site.shared_with:
            site.no_quantize = f"its weight is shared with {site.shared_with}"
        elif name in excluded:
            site.no_quantize = "excluded"
        elif within(name, head):
            site.no_quantize = "the output head keeps its dtype"
        else:
            _check_quantizable(name, site.module.weight)
            site.quantize = True


def quantize(
    sites: dict[str, Site],
    layers: Mapping[str, LoRALinear],
    blocksize: int,
    double_quant: bool,
    taken_out: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Turn marked weights into NF4, letting go of each before the next.

    taken_out: (A, B) by name; of these weights W - B A is quantized, summed in fp32.
    """
    done = 0
    for name, site in sites.items():
        linear, site.module = site.module, None
        if not site.quantize:
            continue
        try:
            base = NF4Linear.from_linear(linear, blocksize, double_quant, taken_out.get(name))
        except Exception as error:
            raise RuntimeError(
                f"quantizing {name} failed after {done} layers had been replaced; load the model again"
            ) from error
        if name in layers:
            layers[name].base_layer = base
        else:
            site.hang(base)
        done += 1


def _check_quantizable(name: str, weight: Tensor) -> None:
    if weight.device.type == "meta":
        raise ValueError(f"{name}.weight is on the meta device: load the weights before quantizing")
    if weight.numel() == 0:
        raise ValueError(f"{name}.weight is empty: exclude it or load the weights (gather them first under ZeRO-3)")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight holds NaN or inf: repair the checkpoint, or exclude the layer")
