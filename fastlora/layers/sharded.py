"""Models in wrappers, and tensors that FSDP2 has spread over processes (`fully_shard`): reading and filling them whole.

These functions are collective: every process of the group calls them, for the same tensors in the same order.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is spread over processes, even if it is gathered at present."""
    return any(map(_is_dtensor, model.parameters())) or any(map(is_unit, model.modules()))


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers and spreads this module's parameters."""
    return callable(getattr(module, "reshard", None)) and hasattr(module, "unshard")


def gathered_by(module: nn.Module) -> str:
    """What gathers this very module's parameters when it is called, and lets go of them: FSDP or ZeRO-3; "" if none."""
    if is_unit(module) or hasattr(module, "_fsdp_wrapped_module"):
        return "FSDP"
    return "ZeRO-3" if any(hasattr(p, "ds_id") for p in module.parameters()) else ""


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
        if is_unit(module):
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


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


# The child under which a wrapper around a block holds it, which becomes a part of all names inside.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's, torch.distributed's checkpoint_wrapper's


def clean(name: str) -> str:
    """A name as it is where no block of the model is wrapped."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


@contextlib.contextmanager
def clean_names(model: nn.Module) -> Iterator[None]:
    """While this is open, compiled and checkpointed blocks are in the model without their wrappers.

    So all names are those of the plain model, as files have them. A block that was replaced meanwhile is wrapped again.
    """
    taken = []
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if attribute not in _INSIDE and child is not None and _wrapped(child) is not None:
                taken.append((parent, attribute, child))
                parent._modules[attribute] = _bare(child)
    try:
        yield
    finally:
        for parent, attribute, wrapper in taken:
            block = parent._modules[attribute]
            assert block is not None
            parent._modules[attribute] = wrapper if block is _bare(wrapper) else _wrapped_again(wrapper, block)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The block inside a wrapper; None for any other module."""
    return next((found for key in _INSIDE if (found := module._modules.get(key)) is not None), None)


def _bare(module: nn.Module) -> nn.Module:
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def _wrapped_again(wrapper: Any, block: nn.Module) -> nn.Module:
    """The same wrappers around another block."""
    inner = _wrapped(wrapper)
    if inner is None:
        return block
    inside = _wrapped_again(inner, block)
    if "_orig_mod" in wrapper._modules:
        return type(wrapper)(inside, wrapper.dynamo_ctx)  # type: ignore[no-any-return]
    wrapper._checkpoint_wrapped_module = inside
    return wrapper  # type: ignore[no-any-return]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
