"""What stands between the linears of a decoder, by fastlora's kernels: norms, rotary embedding, gated MLPs.

A module is recognised by what it computes, not by its name: its own forward is asked on a few random values and
compared with the formula. It then gets a class derived from its own, with the same name, the same parameters and
another `forward`. On a CPU, under `torch.compile` and in dispatch modes the module's own code runs.

    norm     x / sqrt(mean(x²) + eps) · (weight + 0 or 1), over the last dimension
    rotary   the function `apply_rotary_pos_emb` that an attention's forward calls; the rest of that forward is its own
    mlp      down_proj(act(gate_proj(x)) · up_proj(x)), or with gate and up in one linear
    group    the linears of an attention or MLP that share their input, computed together as `grouping` says; each
             module opens a call around its forward, whatever else it is
    loss     of a causal model, as `causal_loss` says; everywhere
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastlora.kernels.operands import FLOAT_DTYPES
from fastlora.layers import causal_loss
from fastlora.layers.grouping import Call
from fastlora.ops import gated, rms_norm, rotary
from fastlora.ops.autograd import seen_by_others
from fastlora.ops.backend import backend

PARTS = ("norm", "rotary", "mlp", "loss", "group")
_GROUPS = (  # names of linears that are called with one x
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "kv_a_proj_with_mqa"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
_EPS = ("variance_epsilon", "eps")
_ROTATION = "apply_rotary_pos_emb"
_MOST_COLUMNS = 16384  # of a norm; the kernel holds a row in registers
_SIZES = (1e-3, 0.1, 1.0, 1.0, 5.0, 40.0)
_FORWARD_REPLACED = "something has replaced this module's forward"
Facts = tuple[Any, ...]


def find_parts(module: nn.Module) -> list[str]:
    """The parts that a module looks like, "group" last. `facts_of` tells whether it is one."""
    found = [part] if (part := _find_part(module)) else []
    return [*found, "group"] if any(_is_adapted(module._modules.get(name)) for name in _members(module)) else found


def _find_part(module: nn.Module) -> str:
    if sum(1 for _ in module.parameters(recurse=False)) == 1 and not module._modules and _eps_of(module):
        return "norm"
    if _ROTATION in _names_in(type(module)):
        return "rotary"
    if _linears_of_mlp(module):
        return "mlp"
    return "loss" if causal_loss.looks_like(module) else ""


def facts_of(module: nn.Module, part: str) -> Facts | str:
    """What its faster class must know, or why there can be none."""
    if "forward" in module.__dict__:
        return _FORWARD_REPLACED
    try:
        with torch.no_grad(), _without_group(module):
            return _PROBES[part](module)
    except Exception as error:  # another signature, weights that are elsewhere
        return f"its forward could not be tried: {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"


def speed_up(module: nn.Module, part: str, facts: Facts) -> None:
    """Give a module its faster class; that of a group is around all others."""
    with _without_group(module):
        _wrap(module, part, facts)


def _wrap(module: nn.Module, part: str, facts: Facts) -> None:
    kind: Any = type(module)
    module.__class__ = _faster_class(kind, part, facts)


@contextmanager
def _without_group(module: nn.Module) -> Iterator[None]:
    """While this is open, the class of a group, which is around all others, is off."""
    outer = vars(type(module)).get("fastlora_group")
    if outer is not None:
        _peel(module)
    try:
        yield
    finally:
        if outer is not None:
            _wrap(module, "group", outer)


def can_restore(module: nn.Module) -> bool:
    """Whether no other library has derived a class from the faster one, as FSDP does for a unit of its own."""
    return "fastlora_plain" in vars(type(module))


def restore(module: nn.Module) -> None:
    """Give it back its own."""
    while parts_of(module):
        _peel(module)
    if "fastlora_compiled" in module.__dict__:
        module._compiled_call_impl = None
        del module.fastlora_compiled


def _peel(module: nn.Module) -> None:
    kind: Any = type(module)
    module.__class__ = kind.fastlora_plain
    if kind.fastlora_part == "group":
        module.__dict__.pop("fastlora_group_off", None)


def parts_of(module: nn.Module) -> list[str]:
    """The parts as which a module has faster classes, the outermost first."""
    return [part for kind in type(module).__mro__ if (part := vars(kind).get("fastlora_part"))]


def is_compiled(module: nn.Module) -> bool:
    """Whether `speed_up` has compiled it, and no copy or pickle has lost that since."""
    return "fastlora_compiled" in module.__dict__ and module._compiled_call_impl is not None


def standing_reason(module: nn.Module, part: str) -> str:
    """Why a part of a sped-up module runs the module's own code where it is now; "" if it does not."""
    if part == "compile":
        return ""
    if part == "loss":
        return causal_loss.standing_reason(module)
    if part == "group" and (reason := module.__dict__.get("fastlora_group_off")):
        return str(reason)
    device = next((p.device for p in module.parameters()), None)
    if device is None or backend(device).name == "triton":
        return ""
    return f"kernels for CUDA only: its own code runs on {device}"


@functools.cache
def _faster_class(plain: Any, part: str, facts: Facts) -> Any:
    """A subclass under the same name, for wrapping policies go by names."""
    body = {
        **_BODIES[part](plain, *facts), "fastlora_plain": plain, "fastlora_part": part,
        "fastlora_group": facts if part == "group" else None,
        "fastlora_made": (*vars(plain).get("fastlora_made", ()), (part, facts)),
        "__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__,
        "__reduce_ex__": lambda self, protocol: (_empty, _made(type(self)), self.__dict__.copy()),
    }  # fmt: skip
    return type(plain.__name__, (plain,), body)


def _made(kind: Any) -> tuple[Any, tuple[tuple[str, Facts], ...]]:
    """(a module's own class, what has been made of it, from the inside out)."""
    faster = next(each for each in kind.__mro__ if "fastlora_made" in vars(each))
    own = next(each for each in kind.__mro__ if "fastlora_made" not in vars(each) and issubclass(faster, each))
    return own, faster.fastlora_made


def _empty(plain: Any, made: tuple[tuple[str, Facts], ...]) -> nn.Module:
    for part, facts in made:
        plain = _faster_class(plain, part, facts)
    return cast(nn.Module, plain.__new__(plain))


def _runs_kernels(x: Tensor, weight: Tensor | None = None) -> bool:
    return x.dtype in FLOAT_DTYPES and not seen_by_others(x, weight) and backend(x.device).name == "triton"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _of_all_sizes(columns: int, seed: int = 0) -> Tensor:
    """Rows of values from small to large: what is added to them, or cuts them off, shows."""
    return _random(len(_SIZES), columns, seed=seed) * torch.tensor(_SIZES)[:, None]


def _same(found: Any, expected: Tensor) -> bool:
    """Whether two results in fp32 differ by rounding only."""
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(
        found.float(), expected.float(), rtol=1e-5, atol=2e-6
    )  # fmt: skip


# Norms


def _eps_of(module: nn.Module) -> str:
    return next((name for name in _EPS if isinstance(getattr(module, name, None), float)), "")


def _probe_norm(module: Any) -> Facts | str:
    name = _eps_of(module)
    weight: Tensor = module.weight
    if weight.dim() != 1 or weight.numel() == 0 or weight.is_meta:
        return "its weight is not one row that is here"
    if weight.numel() > _MOST_COLUMNS:
        return f"its rows are longer than {_MOST_COLUMNS}"
    forward, eps = type(module).forward, getattr(module, name)
    x = _of_all_sizes(weight.numel()).to(weight.device)
    found = forward(module, x)
    offset = next((o for o in (0.0, 1.0) if _same(found, rms_norm.exact(x, weight.float(), eps, o))), None)
    if offset is None:
        return "it computes something else than RMSNorm"
    other = torch.float16 if weight.dtype is torch.bfloat16 else torch.bfloat16
    dtype = forward(module, x.to(other)).dtype
    if dtype not in (other, torch.promote_types(other, weight.dtype)):
        return f"its result is in {dtype}"
    return name, offset, dtype is not other


def _norm(plain: Any, eps: str, offset: float, promotes: bool) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight
        if not _runs_kernels(x, weight):
            return plain.forward(self, x)  # type: ignore[no-any-return]
        dtype = torch.promote_types(x.dtype, weight.dtype) if promotes else x.dtype
        return rms_norm.rms_norm(x, weight, getattr(self, eps), offset, dtype)

    return forward


# Rotary embedding


def _names_in(kind: Any) -> tuple[str, ...]:
    function = inspect.unwrap(kind.forward)
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def _probe_rotary(module: Any) -> Facts | str:
    function = inspect.unwrap(type(module).forward).__globals__.get(_ROTATION)
    if function is None:
        return f"its module has no {_ROTATION}"
    q, k, turns = _random(2, 4, 3, 16), _random(2, 1, 3, 16, seed=1), _random(2, 3, 16, seed=2)
    cos, sin = turns.cos(), turns.sin()
    half = cos[..., :8], sin[..., :8]
    whole, part, shared = (
        _turns_as(function, q, k, angles, expected)
        for angles, expected in (
            ((cos, sin), (cos, sin)),
            (half, half),
            (half, (torch.cat([half[0]] * 2, -1), torch.cat([half[1]] * 2, -1))),
        )
    )
    if not (whole or shared):
        return f"its {_ROTATION} turns something else than the halves of a head"
    rebound(type(module).forward, function)
    return whole, part, shared


def _turns_as(function: Any, q: Tensor, k: Tensor, angles: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether q and k, turned by a model's function, are what the formula gives for `expected`."""
    try:
        return all(map(_same, function(q, k, *angles), rotary.exact(q, k, *expected)))
    except RuntimeError:  # shapes that it does not take
        return False


def _rotary(plain: Any, whole: bool, part: bool, shared: bool) -> Callable[..., Any]:
    own = inspect.unwrap(plain.forward).__globals__[_ROTATION]

    @functools.wraps(own)
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        dim = options.get("unsqueeze_dim", 1)
        fits = not rest and options.keys() <= {"unsqueeze_dim"} and dim in (1, 2)
        if fits and _runs_kernels(q) and _fit(q, k, cos, 3 - dim):
            rotated, size = cos.shape[-1], q.shape[-1]
            if shared and 2 * rotated == size:
                return rotary.rotary(q, k, cos, sin, dim, shared=True)
            if rotated % 2 == 0 and ((whole and rotated == size) or (part and rotated < size)):
                return rotary.rotary(q, k, cos, sin, dim)
        return own(q, k, cos, sin, *rest, **options)

    ours = rebound(plain.forward, own, turn)

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        compiling = torch.compiler.is_compiling()  # it looks names up in the module where a function was written
        return plain.forward(self, *args, **options) if compiling else ours(self, *args, **options)

    return forward


def _fit(q: Tensor, k: Tensor, cos: Tensor, sequence: int) -> bool:
    if q.dim() != 4 or cos.dim() != 3 or q.dtype is not k.dtype or cos.shape[0] not in (1, q.shape[0]):
        return False
    return cos.shape[1] == q.shape[sequence] == k.shape[sequence]


def rebound(function: Any, old: Any, new: Any = None) -> Any:
    """A copy of a function in whose globals `new` is in the place of `old`; decorators around it are copied along.

    Raises:
        TypeError: a decorator does not hold what it decorates.
    """
    if (inner := getattr(function, "__wrapped__", None)) is None:
        names = {name: new or old for name, value in function.__globals__.items() if value is old}
        return _copy(function, {**function.__globals__, **names}, function.__closure__)
    cells = function.__closure__ or ()
    if not any(_holds(cell, inner) for cell in cells):
        raise TypeError(f"a decorator of {function.__qualname__} does not hold it")
    copied = rebound(inner, old, new)
    closure = tuple(CellType(copied) if _holds(cell, inner) else cell for cell in cells)
    made = _copy(function, function.__globals__, closure)
    made.__wrapped__ = copied
    return made


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


def _copy(function: FunctionType, names: dict[str, Any], closure: Any) -> Any:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    made.__annotations__, made.__doc__ = function.__annotations__, function.__doc__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made


# Gated MLPs


def _linears_of_mlp(module: nn.Module) -> tuple[str, ...]:
    """The names of the linears that gate comes from, and those up and down come from."""
    names = module._modules
    if not ({"act_fn", "activation_fn"} & names.keys()) or "down_proj" not in names:
        return ()
    if {"gate_proj", "up_proj"} <= names.keys():
        return "gate_proj", "up_proj"
    return ("gate_up_proj",) if "gate_up_proj" in names else ()


def _probe_mlp(module: Any) -> Facts | str:
    gate, up = _of_all_sizes(8), _of_all_sizes(8, seed=1).flip(0)
    linears, kind = _linears_of_mlp(module), cast(Any, type(module))
    given = (gate, up) if len(linears) == 2 else (torch.cat([gate, up], -1),)
    likeness = kind.__new__(kind)
    likeness.__dict__ = {**module.__dict__, "training": True}  # which shows dropout
    others = [child for name, child in module.named_children() if name not in (*linears, "down_proj")]
    if any(isinstance(part, _DropoutNd) and part.p > 0 for child in others for part in child.modules()):
        return "it has dropout of its own"
    stand_ins = {name: causal_loss.Gives(y) for name, y in zip(linears, given, strict=True)}
    likeness.__dict__["_modules"] = {**module._modules, **stand_ins, "down_proj": nn.Identity()}
    found = kind.forward(likeness, _random(len(_SIZES), 8, seed=2))
    for act, function in gated.ACTIVATIONS.items():
        if _same(found, function(gate) * up):
            return act, linears
    return f"it computes something else than act(gate) · up for one of {', '.join(gated.ACTIVATIONS)}"


def _mlp(plain: Any, act: str, linears: tuple[str, ...]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _runs_kernels(x):
            return plain.forward(self, x)  # type: ignore[no-any-return]
        modules: Any = self._modules
        gate, up = (modules[name](x) for name in linears) if len(linears) == 2 else modules[linears[0]](x).chunk(2, -1)
        if gate.dtype is not up.dtype:
            return plain.forward(self, x)  # type: ignore[no-any-return]
        return modules["down_proj"](gated.gated(gate, up, act))  # type: ignore[no-any-return]

    return forward


# Groups


def _members(module: nn.Module) -> tuple[str, ...]:
    """The names of linears that share their input, if it has at least two of a group."""
    modules = module._modules
    return next((names for names in _GROUPS if sum(_features(modules.get(name)) > 0 for name in names) > 1), ())


def _features(linear: Any) -> int:
    found = getattr(linear, "in_features", 0)
    return found if isinstance(found, int) else 0


def _probe_group(module: Any) -> Facts | str:
    names = _members(module)
    adapted = [name for name in names if _is_adapted(module._modules.get(name))]
    if len(adapted) < 2:
        return f"fewer than two of {', '.join(names)} have adapters or are fastlora's"
    if len({_features(module._modules[name]) for name in adapted}) > 1:
        return "its linears have inputs of different widths"
    return tuple(adapted)


def _is_adapted(layer: Any) -> bool:
    """Whether it is one of our layers, or one of peft's, which `replace_linear` may have sped up."""
    return hasattr(layer, "operands") or hasattr(layer, "lora_A")


def _group(plain: Any, *names: str) -> Callable[..., Any]:
    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain.forward(self, *args, **options)
        with Call(self, names):
            return plain.forward(self, *args, **options)

    return forward


def _only(forward: Callable[..., Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    return lambda plain, *facts: {"forward": forward(plain, *facts)}


_PROBES: dict[str, Callable[[Any], Facts | str]] = {
    "norm": _probe_norm, "rotary": _probe_rotary, "mlp": _probe_mlp, "loss": causal_loss.probe,
    "group": _probe_group,
}  # fmt: skip
_BODIES: dict[str, Callable[..., dict[str, Any]]] = {
    "norm": _only(_norm), "rotary": _only(_rotary), "mlp": _only(_mlp), "loss": causal_loss.body,
    "group": _only(_group),
}  # fmt: skip
