"""Several linears over one input, such as q, k and v, or gate and up: each operand that they share is read once.

    h  = x [A₁ ...]ᵀ                            one shrink, of the summed rank
    y  = x [W₁ + s₁ B₁ A₁ ...]ᵀ                 one product, where NF4 weights are expanded with the update merged in
    dA = [g₁ ...]ᵀ x,      g = s · dy B         one read of x
    dx = Σ dy (W + s B A)                       one product where the gradients are neighbours in memory, as those of
                                                gate and up are; else the products are added up in place

With dropout each linear has a mask of its own, and reads x itself. Where a product reads packed codes, or the weight is
dense, each linear has its own product, and dx is summed as autograd would.
On CUDA only: elsewhere the linears are computed one by one.

Source: arXiv:2106.09685, section 4.1; arXiv:2305.14314, section 3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.kernels.operands import Lora
from fastlora.ops import expanded, keeping
from fastlora.ops.autograd import refuse_second_derivative
from fastlora.ops.dequantize import fill
from fastlora.ops.nf4 import NF4Weight

_Found = tuple[Tensor, Tensor | None]


class Member(NamedTuple):
    """One of the linears, as `linear.prepared` gives it; weight and bias are frozen."""

    weight: Tensor | NF4Weight
    lora: Lora | None
    bias: Tensor | None


def group_linears(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """y of each member, [..., N]; differentiable in x and the adapters. Outputs may be slices of one tensor.

    Args:
        x: [..., K], not empty, on a device with the Triton kernels; in the dtype in which it is multiplied.
    """
    adapters = [t for member in members for t in (member.lora or (None, None))[:2]]
    if not torch.is_grad_enabled():
        return tuple(y for y, _ in _forward(x, members, [False] * len(members)))
    ys: tuple[Tensor, ...] = _apply(x, tuple(members), *adapters)
    return ys


def _forward(x: Tensor, members: Sequence[Member], saves: Sequence[bool]) -> list[_Found]:
    """(y, h or None) of each member, perhaps kept ones."""
    keeper = keeping.keeper()
    if keeper is None:
        return _computed(x, members, saves)
    made: list[list[_Found]] = []

    def compute(place: int) -> Callable[[], _Found]:
        def computed() -> _Found:
            if not made:
                made.append(_computed(x, members, saves))
            return made[0][place]

        return computed

    keys = [(x.shape, x.dtype, m.weight.shape, s, m.lora is None) for m, s in zip(members, saves, strict=True)]
    return [keeper.call(key, compute(place)) for place, key in enumerate(keys)]


def _computed(x: Tensor, members: Sequence[Member], saves: Sequence[bool]) -> list[_Found]:
    from fastlora.ops import linear_cuda as path

    if torch.is_autocast_enabled(x.device.type):  # the low-rank products keep their own dtype
        with torch.autocast(x.device.type, enabled=False):
            return _computed(x, members, saves)
    rows = x.reshape(-1, x.shape[-1])
    chosen = [path.choose("linear", rows, *member) for member in members]
    joins = _joins(chosen, members)
    wanted = [
        member.lora is not None and (save or path.needs_h(kernel, member.weight, member.lora))
        for kernel, member, save in zip(chosen, members, saves, strict=True)
    ]
    hs = _shrunk(rows, members, wanted)
    if joins:
        ys = _split(path.affine(rows, _joined(members, x.dtype), _joined_bias(members)), members)
    else:
        ys = [path.forward_by(kernel, rows, *m, False, h)[0] for kernel, m, h in zip(chosen, members, hs, strict=True)]
    shape = x.shape[:-1]
    ys = [y.view(*shape, y.shape[1]).data for y in ys]  # no views for autograd: y may be changed in place
    return [(y, h if save else None) for y, h, save in zip(ys, hs, saves, strict=True)]


def _backward(
    x: Tensor | None, members: Sequence[Member], hs: Sequence[Tensor | None], dys: Sequence[Tensor | None],
    need_x: bool, needs: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """dx [M, K], and dA and dB of each member in turn. needs: whether A and B want theirs; x is here where one does."""
    from fastlora.ops import linear_cuda as path

    dy = [None if t is None else t.reshape(-1, t.shape[-1]) for t in dys]
    chosen = [
        path.choose("linear_t", t, *member) if need_x and t is not None else path.DEQUANTIZE
        for t, member in _each(dy, members)
    ]
    gs: list[Tensor | None] = []
    found: list[Tensor | None] = []
    for t, member, h, kernel, (need_a, need_b) in zip(dy, members, hs, chosen, needs, strict=True):
        g = db = None
        if t is not None and member.lora is not None:
            needs_g = need_a or (need_x and path.needs_g(kernel, member.weight, member.lora))
            g, _, db = path.gradients(t, None, h if need_b else None, member.lora, needs_g)
        gs.append(g)
        found += [None, db]
    wanted = [g if need_a else None for g, (need_a, _) in _each(gs, needs)]
    if x is not None:
        for place, da in _update_gradients(x.reshape(-1, x.shape[-1]), members, wanted):
            found[2 * place] = da
    present = [(t, g, kernel, m) for t, g, kernel, m in _each(dy, gs, chosen, members) if t is not None]
    if not (need_x and present):
        return None, found
    if len(present) == len(members) and _joins(chosen, members):
        return _dx(dy, members), found
    dx = None
    for t, g, kernel, member in present:
        part = path.dx_by(kernel, t, g, member.weight, member.lora)
        dx = part if dx is None else dx.add_(part)
    return dx, found


def _dx(dy: Sequence[Any], members: Sequence[Member]) -> Tensor:
    """Σ dy (W + s B A) [M, K]: as one product, or added up in place."""
    weight = _joined(members, dy[0].dtype)
    if (whole := neighbours(dy)) is not None:
        return whole @ weight
    first, *rest = zip(dy, _split_rows(weight, members), strict=True)
    dx = first[0] @ first[1]
    for t, w in rest:
        dx.addmm_(t, w)
    return dx


def _joins(chosen: Sequence[Any], members: Sequence[Member]) -> bool:
    """Whether one expanded weight can have all members in it, updates merged, each at an address that kernels like."""
    return all(
        kernel.kernel == "dequantize"
        and isinstance(weight, NF4Weight) and not (weight.shape[0] | weight.shape[1]) % 8
        and (lora is None or lora.seed is None)
        for kernel, (weight, lora, _) in zip(chosen, members, strict=True)
    )  # fmt: skip


def _shrunk(rows: Tensor, members: Sequence[Member], wanted: Sequence[bool]) -> list[Tensor | None]:
    """h [M, R] in fp32 of the members that want it: those without dropout in one read of x."""
    from fastlora.ops import linear_cuda as path

    hs: list[Tensor | None] = [None] * len(members)
    together = [p for p, m in enumerate(members) if wanted[p] and m.lora is not None and m.lora.seed is None]
    if len({members[p].lora.a.dtype for p in together}) == 1 and len(together) > 1:  # type: ignore[union-attr]
        ranks = [members[p].lora.r for p in together]  # type: ignore[union-attr]
        h = path.shrink(rows, torch.cat([members[p].lora.a for p in together]))  # type: ignore[union-attr]
        if len(set(ranks)) == 1:
            parts = list(h.view(-1, len(ranks), ranks[0]).transpose(0, 1).contiguous())
        else:
            parts = [part.contiguous() for part in h.split(ranks, 1)]
        for place, part in zip(together, parts, strict=True):
            hs[place] = part
    for place, member in enumerate(members):
        if wanted[place] and hs[place] is None:
            assert member.lora is not None
            hs[place] = path.shrink(rows, member.lora.a, member.lora)
    return hs


def _update_gradients(rows: Tensor, members: Sequence[Member], gs: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """(place, dA) of each member whose g is given: those without dropout in one read of x."""
    from fastlora.ops import linear_cuda as path

    given = [
        (place, member.lora, g) for place, (member, g) in enumerate(zip(members, gs, strict=True)) if g is not None
    ]
    together = [(place, lora, g) for place, lora, g in given if lora is not None and lora.seed is None]
    found = []
    if len({lora.a.dtype for _, lora, _ in together}) == 1 and len(together) > 1:
        da = path.x_gradient(rows, torch.cat([g for *_, g in together], 1), together[0][1])
        parts = da.split([lora.r for _, lora, _ in together])
        found = [(place, part) for (place, *_), part in zip(together, parts, strict=True)]
        given = [each for each in given if each[1] is not None and each[1].seed is not None]
    return found + [(place, path.x_gradient(rows, g, lora)) for place, lora, g in given if lora is not None]


def _joined(members: Sequence[Member], dtype: torch.dtype) -> Tensor:
    """W + s B A of all members, one below another: [N₁ + N₂ ..., K], for reading only."""
    weights = [member.weight for member in members]
    loras = [member.lora for member in members]
    first: Any = weights[0]

    def expand(at_once: bool) -> Tensor:
        whole = torch.empty((sum(w.shape[0] for w in weights), first.shape[1]), dtype=dtype, device=first.device)
        for weight, lora, out in zip(weights, loras, _split_rows(whole, members), strict=True):
            a, b, scaling = (None, None, 0.0) if lora is None else lora[:3]
            fill(weight, out, a, b, scaling)  # type: ignore[arg-type]
        return whole

    frozen = tuple(t for weight in weights for t in weight.tensors()[:2])  # type: ignore[union-attr]
    adapters = tuple(t for lora in loras if lora is not None for t in lora[:2])
    key = (first.codes.data_ptr(), dtype, *((None if lora is None else lora.scaling) for lora in loras))
    return expanded.expanded(key, frozen, adapters, expand)


def _split_rows(whole: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    return whole.split([member.weight.shape[0] for member in members])


def _split(y: Tensor, members: Sequence[Member]) -> list[Tensor]:
    return list(y.split([member.weight.shape[0] for member in members], 1))


def _joined_bias(members: Sequence[Member]) -> Tensor | None:
    biases = [member.bias for member in members]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    dtype = max((bias.dtype for bias in given), key=lambda d: d.itemsize)
    parts = [
        given[0].new_zeros(member.weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
        for member, bias in zip(members, biases, strict=True)
    ]
    return torch.cat(parts)


def neighbours(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor [M, N₁ + N₂ ...] whose columns are those of the parts, [M, N₁] and so on; None where there is none."""
    first = parts[0]
    if first is None or first.stride(-1) != 1:
        return None
    place, columns = first.storage_offset(), 0
    for part in parts:
        if (
            part is None or part.stride() != first.stride() or part.storage_offset() != place + columns
            or part.untyped_storage()._cdata != first.untyped_storage()._cdata or part.dtype is not first.dtype
        ):  # fmt: skip
            return None
        columns += part.shape[-1]
    if columns > first.stride(-2) and first.shape[-2] > 1:
        return None
    return first.as_strided((*first.shape[:-1], columns), first.stride())


def _each(*lists: Sequence[Any]) -> Any:
    return zip(*lists, strict=True)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, members: tuple[Member, ...], *adapters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[2:]
        saves = [bool(need) for need in needs[1::2]]
        found = _forward(x, members, saves)
        seeds = [None if member.lora is None else member.lora.seed for member in members]
        frozen = [t for m in members for t in (m.weight.tensors() if isinstance(m.weight, NF4Weight) else (m.weight,))]
        # the frozen tensors too, so that autograd notices a change in between
        ctx.shape = x.shape
        ctx.save_for_backward(x if any(needs[::2]) else None, *(h for _, h in found), *adapters, *seeds, *frozen)
        ctx.facts = [(m.weight if isinstance(m.weight, NF4Weight) else None, m.lora and m.lora[2:4]) for m in members]
        return tuple(y for y, _ in found)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        need_x, _, *needs = ctx.needs_input_grad
        count = len(dys)
        x, *saved = ctx.saved_tensors
        hs, adapters, seeds = saved[:count], saved[count : 3 * count], saved[3 * count : 4 * count]
        members, left = [], iter(saved[4 * count :])
        for place, (packed, facts) in enumerate(ctx.facts):
            a, b = adapters[2 * place : 2 * place + 2]
            tensors = [next(left) for _ in range(1 if packed is None else 5)]
            lora = None if facts is None else Lora(a, b, *facts, seeds[place])
            members.append(Member(tensors[0] if packed is None else packed, lora, None))
        pairs = list(zip(needs[::2], needs[1::2], strict=True))
        device = next((dy.device.type for dy in dys if dy is not None), "cpu")
        with torch.autocast(device, enabled=False):
            dx, found = _backward(x, members, hs, dys, need_x, pairs)
        return (
            None if dx is None else dx.view(ctx.shape),
            None,
            *(grad if need else None for grad, need in zip(found, needs, strict=True)),
        )


_apply = super(torch.autograd.Function, _Group).apply  # without its search for torch.func's wrappers
