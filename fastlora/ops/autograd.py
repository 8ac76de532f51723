"""What the autograd of every operator needs: who must see it pass, in which dtype it computes, what it refuses."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

_Found = TypeVar("_Found")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, type(None))


def seen_by_others(x: Tensor, lora_a: Tensor | None) -> bool:
    """Whether something must see the operator pass: a compiler, a dispatch mode (selective checkpointing, fake
    tensors), or a tensor subclass. If not, the same code runs directly: torch's dispatch to Python costs 150 us."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in _PLAIN_TENSORS
        or type(lora_a) not in _PLAIN_TENSORS
        or torch._C._functorch.maybe_current_level() is not None
    )


def refuse_func_gradients() -> None:
    """Raise where torch.func takes gradients: a registered operator has no rule for them, and forward mode would
    silently give zeros."""
    if torch._C._functorch.maybe_current_level() is None:
        return
    kinds = {interpreter.key().name for interpreter in retrieve_all_functorch_interpreters()}
    if kinds & {"Grad", "Jvp"}:
        raise RuntimeError(
            "lora_linear has no rule for torch.func.grad, vjp, jvp and functions built on them: use loss.backward() or "
            "torch.autograd.grad; torch.func.vmap over the forward works"
        )


def eager(
    forward: Callable[..., tuple[Tensor, Tensor]],
    setup_context: Callable[..., None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """An operator's autograd without the dispatcher: the same forward, the same backward. Its outputs are (y, h)."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            output = forward(*inputs)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(output[1])
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            return gradients(ctx, dy, backward) if dy is not None else (None,) * len(ctx.needs_input_grad)

    return Eager


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def refuse_second_derivative() -> None:
    """To be called in a backward pass, which is made of kernels that autograd cannot follow.

    Raises:
        RuntimeError: autograd is recording it.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastlora's operators have no second derivative: call backward or grad without create_graph=True"
        )


def constant_under_compile(function: _Function) -> _Function:
    """Mark a function whose result torch.compile takes as a constant of the graph.

    It does what torch.compiler.assume_constant_result does; calling that would load dynamo, and so triton, at import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_captured: list[Any] = []


def keep_if_captured(found: _Found, device: torch.device) -> _Found:
    """Tensors that a CUDA graph now being captured will read again: held for the life of the process."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found
