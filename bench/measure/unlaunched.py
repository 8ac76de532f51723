"""The memory of a GPU that is not there: fastlora's CUDA path over fake tensors, up to every launch.

`unlaunched(arch)` makes fake CPU tensors stand for a GPU's. (Fake CUDA tensors cannot be differentiated by a torch that
is built without CUDA.) The launchers run as on a GPU and allocate what they allocate there: expanded weights, parts of
sums, what is saved for backward. Then nothing is launched. So no table repeats what the code does, except for
attention, whose kernels are torch's own: `_Flash` allocates what its flash attention allocates.

It changes this process for good.
"""

import sys
import weakref
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bench.measure.pretend import pretend
from fastlora.ops import keeping, offload

_ROWS, _COLUMNS = 128, 32  # to which flash attention's backward rounds a length and the size of a head


def unlaunched(arch: int) -> None:
    """Make this process take fake tensors for a GPU's, of an architecture such as 90."""
    from fastlora.kernels.launch import Launcher

    from fastlora.layers import causal_loss
    from fastlora.ops import linear_cuda, loss, operands

    pretend(arch)
    linear_cuda.wide_product = operands.wide_product
    fake: Any = FakeTensor
    fake.is_cuda, fake.data_ptr = property(lambda self: True), lambda self: self.untyped_storage()._cdata
    launcher: Any = Launcher
    launcher.__call__ = triton.runtime.jit.JITFunction.run = lambda *_, **__: None
    for name, module in list(sys.modules.items()):
        if name.startswith("fastlora.") and "seen_by_others" in vars(module):
            vars(module)["seen_by_others"] = lambda *_: False
    causal_loss._takes, loss._plain_weight = lambda *_: True, _plain_weight  # which ask for plain tensors
    offload._Waiting = _Waiting  # type: ignore[misc,assignment]
    torch.nn.functional.scaled_dot_product_attention = _attend  # type: ignore[assignment]


def _plain_weight(head: Any, x: Tensor) -> Tensor | None:
    return head.weight.detach() if type(head) is torch.nn.Linear and head.bias is None else None


class _Waiting:
    """As `offload._Waiting`; what is on the host has no memory."""

    def __init__(self, tensor: Tensor, previous: "_Waiting | None") -> None:
        self._facts = tensor.shape, tensor.dtype
        self._back: Tensor | None = None
        self._previous = None if previous is None else weakref.ref(previous)

    def fetch(self) -> None:
        if self._back is None:
            self._back = torch.empty(self._facts[0], dtype=self._facts[1])

    def take(self) -> Tensor:
        self.fetch()
        back, self._back = self._back, None
        if self._previous is not None and (previous := self._previous()) is not None:
            previous.fetch()
        assert back is not None
        return back


def _attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Flash.apply(q, k, v)
    return out


class _Flash(torch.autograd.Function):
    """Flash attention's tensors: q, k and v [B, H, S, D], and the result saved, with one fp32 number a row.

    Source: `mha_fwd` and `mha_bwd` in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape

        def compute() -> tuple[Tensor, Tensor]:
            out = q.new_empty(batch, length, heads, size).transpose(1, 2)
            return out, q.new_empty(batch, heads, length, dtype=torch.float32)

        keeper = keeping.keeper()
        out, lse = compute() if keeper is None else keeper.call(("flash", q.shape), compute)
        ctx.save_for_backward(q, k, v, out, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, _, lse = ctx.saved_tensors
        batch, heads, length, size = q.shape
        rows, columns = -(length // -_ROWS) * _ROWS, -(size // -_COLUMNS) * _COLUMNS
        dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], size).transpose(1, 2) for t in (q, k, v))
        inside = [
            lse.new_empty(batch, heads, rows),  # sum(dO ∘ O)
            lse.new_empty(batch, heads, rows, columns),  # dq, added up in fp32
        ]
        if heads != k.shape[1]:  # a dk and a dv for each head of q, which are then added up
            inside += [t.new_empty(batch, t.shape[2], heads, size) for t in (k, v)]
        del inside
        return dq, dk, dv
