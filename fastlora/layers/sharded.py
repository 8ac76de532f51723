"""Models in wrappers, and tensors that FSDP2 has spread over processes (`fully_shard`): reading and filling them whole.

These functions are collective: every process of the group calls them, for the same tensors in the same order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is spread over processes, even if it is gathered at present."""
    return any(map(_is_dtensor, model.parameters())) or any(map(_is_unit, model.modules()))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor where one is spread over processes; any other tensor as it is."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a parameter; if that is spread, each process takes its part of process 0's value."""
    if _is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(sharded.device, sharded.dtype).contiguous()
        parameter.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements))
    else:
        parameter.copy_(value)


def settle(model: nn.Module) -> None:
    """Spread again what FSDP2 has left gathered after a forward: writes into gathered copies would be lost."""
    for module in model.modules():
        if _is_unit(module):
            module.reshard()  # type: ignore[operator]


def by_first(write: Callable[[], None], together: bool) -> None:
    """Call `write` only in process 0, and let the others wait for it; if not `together`, call it in this process."""
    if not together or not distributed.is_initialized():
        write()
        return
    try:
        if distributed.get_rank() == 0:
            write()
    finally:
        distributed.barrier()


def _is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers and spreads this module's parameters."""
    return callable(getattr(module, "reshard", None)) and hasattr(module, "unshard")


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
