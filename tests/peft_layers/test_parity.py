"""Every option of peft's LoRA, over every base and dtype: as exact as peft, or peft itself.

Each case is one of peft's layers, sped up in place, against the same layer in fp64 (the oracle) and peft's own forward
in the same dtypes (the baseline): the output and all gradients by the rule of `numerics`. Where a layer steps back to
peft, its bits must be peft's. The table of all cases is printed at the end (`pytest -s`). The mutation tests plant the
classic faults of LoRA layers that compute in one call, and expect each to be caught here.
"""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from fastlora import reference
from fastlora.layers.bases import is_linear4bit
from fastlora.ops import linear_cpu, linear_cpu_bf16, mixed, nf4
from fastlora.ops.nf4 import NF4Weight
from fastlora.ops.operands import dense
from fastlora.peft_layers import linear as classes
from fastlora.peft_layers.conditions import active_names
from tests.support.numerics import assert_as_accurate

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
M, K, N = 96, 256, 192
SEED = 2**40 + 7


class Option(NamedTuple):
    """A configuration, what else is done to the layer, and whether the layer is sped up or why not."""

    config: Mapping[str, Any] = MappingProxyType({})
    change: Callable[[Any], object] = lambda layer: None
    call: Mapping[str, Any] = MappingProxyType({})
    steps_back: str = ""
    wide_adapters_step_back: str = ""  # fp32 adapters over 16 bits
    autocast_too: bool = True  # whether they do so under autocast as well
    dense_only: bool = False
    base_bias: bool = False
    transposed: bool = False  # GPT-2's Conv1D, which always has a bias
    side_by_side: bool = False  # a mixed batch as if it had few rows
    backend: str = ""  # forced; empty for the CPU's own


def _second_adapter(layer):
    layer.update_layer("other", 4, lora_alpha=4, config=peft.LoraConfig(r=4))
    _fill(layer)
    layer.set_adapter(["default", "other"])


def _second_adapter_with_dropout(layer):
    layer.update_layer("other", 4, lora_alpha=4, lora_dropout=0.25, config=peft.LoraConfig(r=4, lora_dropout=0.25))
    _fill(layer)
    layer.set_adapter(["default", "other"])


def _second_biased_adapter(layer):
    layer.update_layer("other", 4, lora_alpha=4, config=peft.LoraConfig(r=4, lora_bias=True))
    _fill(layer)
    layer.set_adapter(["default", "other"])


def _train_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def _train_bias(layer):
    layer.base_layer.bias.requires_grad_(True)


_WIDE_DORA = "DoRA with torch.float32 adapters"
_CONV = {"fan_in_fan_out": True}
MIXED = {"adapter_names": (["default", "other", "default", "__base__", "other", "unknown here"] * M)[:M]}
_RUNS = (("default", 20), ("other", 33), ("__base__", 3), ("default", 9), ("unknown here", 1), ("other", M - 66))
IN_RUNS = {"adapter_names": [name for name, count in _RUNS for _ in range(count)]}
OPTIONS = {
    "plain": Option(),
    "rslora": Option({"use_rslora": True}),
    "rank_pattern": Option({"rank_pattern": {"linear": 5}, "alpha_pattern": {"linear": 3}}),
    "r=3": Option({"r": 3}),
    "dropout": Option({"lora_dropout": 0.25}),
    "base bias": Option(base_bias=True),
    "trained bias": Option(change=_train_bias, base_bias=True),
    "trained base": Option(change=_train_base, dense_only=True),
    "two adapters": Option(change=_second_adapter),
    "two, dropout": Option({"lora_dropout": 0.25}, change=_second_adapter_with_dropout),
    "two, dropout, biased": Option({"lora_dropout": 0.25}, change=_second_biased_adapter, base_bias=True),
    "Conv1D": Option(_CONV, dense_only=True, base_bias=True, transposed=True),
    "Conv1D, dropout": Option({**_CONV, "lora_dropout": 0.25}, dense_only=True, base_bias=True, transposed=True),
    "Conv1D, all trained": Option(
        {**_CONV, "lora_bias": True},
        change=lambda layer: (_train_base(layer), _train_bias(layer)),
        dense_only=True,
        base_bias=True,
        transposed=True,
    ),
    "Conv1D, DoRA": Option(
        {**_CONV, "use_dora": True},
        dense_only=True,
        base_bias=True,
        transposed=True,
    ),
    "Conv1D, mixed batch": Option(
        _CONV, change=_second_adapter, call=MIXED, dense_only=True, base_bias=True, transposed=True
    ),
    "lora_bias": Option({"lora_bias": True}),
    "both biases": Option({"lora_bias": True}, change=_train_bias, base_bias=True),
    "lora_bias, dropout": Option({"lora_bias": True, "lora_dropout": 0.25}, base_bias=True),
    "two, one biased": Option(change=_second_biased_adapter, base_bias=True),
    "DoRA": Option({"use_dora": True}),
    "DoRA, base bias": Option({"use_dora": True}, change=_train_bias, base_bias=True),
    "DoRA, trained": Option(
        {"use_dora": True}, change=_train_base, dense_only=True, wide_adapters_step_back=_WIDE_DORA
    ),
    "DoRA, dropout": Option(
        {"use_dora": True, "lora_dropout": 0.25},
        base_bias=True,
        wide_adapters_step_back="DoRA with dropout and torch.float32 adapters",
        autocast_too=False,
    ),
    "DoRA, kernels": Option({"use_dora": True}, backend="triton"),
    "DoRA, kernels, bias": Option({"use_dora": True}, change=_train_bias, base_bias=True, backend="triton"),
    "one for all": Option(change=_second_adapter, call={"adapter_names": ["other"] * M}),
    "none for all": Option(call={"adapter_names": ["__base__"] * M}, base_bias=True),
    "mixed batch": Option(change=_second_adapter, call=MIXED),
    "mixed, few rows": Option(change=_second_adapter, call=MIXED, side_by_side=True),
    "mixed, biases": Option({"lora_bias": True}, change=_second_adapter, call=MIXED, base_bias=True),
    "mixed, few, biases": Option(
        {"use_rslora": True}, change=_second_biased_adapter, call=MIXED, base_bias=True, side_by_side=True
    ),
    "mixed, all trained": Option(
        change=lambda layer: (_second_biased_adapter(layer), _train_base(layer), _train_bias(layer)),
        call=MIXED,
        dense_only=True,
        base_bias=True,
    ),
    "mixed, kernels": Option(change=_second_adapter, call=IN_RUNS, backend="triton"),
    "mixed, kernels, dropout": Option(change=_second_adapter_with_dropout, call=IN_RUNS, backend="triton"),
    "mixed, kernels, biases": Option(
        {"lora_bias": True, "lora_dropout": 0.25},
        change=lambda layer: (_second_adapter(layer), _train_bias(layer)),
        call=IN_RUNS,
        base_bias=True,
        backend="triton",
    ),
    "mixed, kernels, all": Option(
        change=lambda layer: (_second_biased_adapter(layer), _train_base(layer), _train_bias(layer)),
        call=IN_RUNS,
        dense_only=True,
        base_bias=True,
        backend="triton",
    ),
    "disabled": Option(change=lambda layer: layer.enable_adapters(False), steps_back="adapters are disabled"),
    "merged": Option(change=lambda layer: layer.merge(), steps_back="adapters are merged", dense_only=True),
}
DTYPES = {  # x and the base, adapters, autocast
    "fp32": (torch.float32, torch.float32, None),
    "fp16": (torch.float16, torch.float16, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32, None),
    "autocast": (torch.float32, torch.float32, torch.bfloat16),
}
BASES = ("dense", "nf4")
_table: dict[tuple[str, str, str], str] = {}


@pytest.fixture(scope="module", autouse=True)
def printed():
    """The parity table, once all cases have run."""
    yield
    if not _table:
        return
    columns = [f"{base} {dtype}" for base in BASES for dtype in DTYPES]
    width = max(map(len, OPTIONS))
    print("\n" + " | ".join(["option".rjust(width), *columns]))
    for option in OPTIONS:
        cells = [_table.get((option, base, dtype), "-") for base in BASES for dtype in DTYPES]
        print(
            " | ".join(
                [option.rjust(width), *(f"{cell:>{len(title)}}" for cell, title in zip(cells, columns, strict=True))]
            )
        )


def _fill(layer):
    """Give each adapter an update 0.3 times as large as the base's output, in values that bf16 holds."""
    generator = torch.Generator().manual_seed(4)

    def draw(parameter, std):
        values = torch.randn(parameter.shape, generator=generator) * std
        parameter.data.copy_(values.to(torch.bfloat16))

    for name, rank in layer.r.items():
        draw(layer.lora_A[name].weight, K**-0.5)
        draw(layer.lora_B[name].weight, 0.3 / (layer.scaling[name] * rank**0.5))
        if layer.lora_B[name].bias is not None:
            draw(layer.lora_B[name].bias, 1.0)  # times the scaling, larger than the output
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight
            values = magnitude.data * (1 + 0.2 * torch.randn(magnitude.shape, generator=generator))
            magnitude.data.copy_(values.to(torch.bfloat16))


def build(option, base, dtype, adapter_dtype):
    """One of peft's layers with an option, in train mode."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=generator).div(K**0.5).to(dtype)
    if option.transposed:
        linear: Any = transformers.pytorch_utils.Conv1D(N, K).to(dtype)
        linear.weight.data = weight.t().contiguous()
    elif base == "dense":
        linear = nn.Linear(K, N, bias=option.base_bias, dtype=dtype)
        linear.weight.data = weight
    else:
        bnb = pytest.importorskip("bitsandbytes")
        linear = bnb.nn.Linear4bit(K, N, bias=option.base_bias, compute_dtype=dtype, quant_type="nf4")
        linear.weight = nf4.quantize(weight).to_bnb()
    if option.base_bias:
        linear.bias = nn.Parameter(torch.randn(N, generator=generator).to(dtype))
    model = nn.Module()
    model.linear = linear
    if base == "nf4":
        model.is_loaded_in_4bit = True
    config = {"r": 8, "lora_alpha": 12, "target_modules": ["linear"], **option.config}
    torch.manual_seed(0)
    layer = peft.inject_adapter_in_model(peft.LoraConfig(**config), model).linear
    layer.requires_grad_(False)
    _fill(layer)
    option.change(layer)
    for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        parts.to(adapter_dtype).requires_grad_(True)
    return layer.train()


def exact(layer):
    """The same layer in fp64, over the weight that the codes stand for."""
    base = layer.base_layer
    if is_linear4bit(base):
        plain = nn.Linear(K, N, bias=base.bias is not None, dtype=torch.float64)
        plain.weight.data = NF4Weight.from_bnb(base.weight).dequantize(torch.float32).double()
        if base.bias is not None:
            plain.bias.data = base.bias.data.double()
            plain.bias.requires_grad_(base.bias.requires_grad)
        plain.weight.requires_grad_(False)
        donor = build(Option(), "dense", torch.float64, torch.float64)
        for part in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"):
            donor._modules[part] = copy.deepcopy(layer._modules[part])
        donor.lora_variant = dict(layer.lora_variant)
        donor.base_layer, donor.scaling, donor.r = plain, dict(layer.scaling), dict(layer.r)
        donor._active_adapter = layer._active_adapter
        return donor.double().train()
    return copy.deepcopy(layer).double()


def _inputs(drawn):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(M, K, generator=generator).to(drawn), torch.randn(M, N, generator=generator).to(drawn)


def _masked(x, p=0.5, training=True, inplace=False):
    """Dropout by the mask that our forward derives from the seed; x may be some rows of the input."""
    if not (training and p):
        return x
    for drawn in (torch.float32, torch.float16, torch.bfloat16):
        same = (x.detach().double().unsqueeze(1) == _inputs(drawn)[0].double()).all(-1)  # [rows, M]
        if same.any(1).all():
            return x * reference.dropout_mask(SEED, M, K, p)[same.int().argmax(1)].to(x.dtype)
    raise AssertionError("dropout of something other than rows of the input")


def step(layer, dtype, autocast, call, drawn):
    """y, dx, and the gradients of all that is trained, by name; the inputs hold values of the dtype `drawn`."""
    x, dy = _inputs(drawn)
    x = x.to(dtype).requires_grad_()
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x, **call)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach(), **{name: g for name, g in zip(["dx", *trained], grads, strict=True) if g is not None}}


def check(option, base, dtypes):
    """Check one case of the matrix; returns its entry in the table."""
    dtype, adapter_dtype, autocast = dtypes
    wide = adapter_dtype != (autocast or dtype) and (option.autocast_too or not autocast)
    if option.wide_adapters_step_back and wide:
        option = option._replace(steps_back=option.wide_adapters_step_back)
    layer, drawn = build(option, base, dtype, adapter_dtype), autocast or dtype
    true = exact(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", _masked)
        if option.backend:
            patch.setenv("FASTLORA_BACKEND", option.backend)
        if option.side_by_side:
            patch.setitem(mixed.SIDE_BY_SIDE_UP_TO, "cpu", M)
        patch.setattr(torch, "randint", lambda *_, device, **__: torch.tensor([SEED], device=device))
        oracle = step(true, torch.float64, None, option.call, drawn) if not option.steps_back else {}
        baseline = step(layer, dtype, autocast, option.call, drawn)
        holder = nn.Module()
        holder.linear = copy.deepcopy(layer)
        classes.speed_up_layer(holder.linear)
        ours = step(holder.linear, dtype, autocast, option.call, drawn)
    calls = holder.linear.fastlora_calls
    assert ours.keys() == baseline.keys()
    if option.steps_back:
        assert calls.last_reason.startswith(option.steps_back), calls
        for name, value in ours.items():
            assert torch.equal(value, baseline[name]), f"{name} is not peft's"
        return "peft"
    assert (calls.sped_up, calls.stepped_back) == (1, 0), calls
    for name, value in ours.items():
        assert value.dtype == baseline[name].dtype, f"{name}: {value.dtype}, peft {baseline[name].dtype}"
        assert_as_accurate(value, baseline[name], oracle[name], name)
    return "sped up"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("option", OPTIONS)
def test_parity(option, base, dtypes):
    if base == "nf4" and OPTIONS[option].dense_only:
        pytest.skip("only for dense weights")
    _table[option, base, dtypes] = check(OPTIONS[option], base, DTYPES[dtypes])


def test_both_ways_to_a_mixed_batch_are_taken(monkeypatch):
    """Which way a parity case takes depends on its number of rows."""
    taken = []
    for name in ("_side_by_side", "_in_segments"):
        real = getattr(mixed, name)
        monkeypatch.setattr(mixed, name, lambda *args, real=real, name=name: taken.append(name) or real(*args))
    for option in ("mixed batch", "mixed, few rows", "one for all", "none for all"):
        check(OPTIONS[option], "dense", DTYPES["fp32"])
    assert taken == ["_in_segments", "_side_by_side"]


def _with(**changes):
    """`lora_linear` with some of its arguments overridden."""
    real = classes.lora_linear
    names = ("x", "weight", "lora_a", "lora_b", "scaling", "bias", "dropout_p", "training")

    def mutant(*args, **kwargs):
        return real(**{**dict(zip(names, args, strict=False)), **kwargs, **changes})

    return mutant


def _mutant_backward(change):
    """A path's backward with its gradients changed."""

    def of(real):
        return lambda dy, x, h, weight, lora, needs: change(real(dy, x, h, weight, lora, needs), dy, weight, lora)

    return of


def _ignoring(reason):
    real = classes.at_a_call

    def ignoring(layer, *call):
        found, active = real(layer, *call)
        return ("", active_names(layer)) if found == reason else (found, active)

    return ignoring


def _names_reversed(x, weight, bias, adapters, names):
    return mixed.mixed_linear(x, weight, bias, adapters, names[::-1])


PATHS = (linear_cpu, linear_cpu_bf16)  # that a backward on the CPU may take
FAULTS = {
    "missing scale": ("plain", classes, "lora_linear", lambda: _with(scaling=1.0)),
    "dx without LoRA": (
        "plain", PATHS, "backward",
        lambda: _mutant_backward(lambda grads, dy, weight, lora: grads._replace(x=dy @ dense(weight, dy.dtype))),
    ),
    "unscaled dA": (
        "plain", PATHS, "backward",
        lambda: _mutant_backward(lambda grads, dy, weight, lora: grads._replace(lora_a=grads.lora_a / lora.scaling)),
    ),
    "first adapter only": (
        "two adapters", classes, "joined", lambda: lambda adapters: adapters[0],
    ),
    "ignored lora_bias": (
        "lora_bias", classes, "total_bias", lambda: lambda base_bias, adapter: base_bias,
    ),
    "unscaled lora_bias": (
        "both biases", classes, "total_bias", lambda: lambda base_bias, adapter: base_bias + adapter.bias,
    ),
    "another sample's adapter": ("mixed batch", classes, "mixed_linear", lambda: _names_reversed),
    "another sample's adapter, few rows": ("mixed, few rows", classes, "mixed_linear", lambda: _names_reversed),
    "another sample's adapter, kernels": ("mixed, kernels", classes, "mixed_linear", lambda: _names_reversed),
    "ignored disable": ("disabled", classes, "at_a_call", lambda: _ignoring("adapters are disabled")),
    "ignored merge": ("merged", classes, "at_a_call", lambda: _ignoring("adapters are merged")),
    "ignored dropout": ("dropout", classes, "lora_linear", lambda: _with(dropout_p=0.0)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16, fp32 adapters"])
def test_a_planted_fault_is_caught(fault, dtypes, monkeypatch):
    option, module, name, mutant = FAULTS[fault]
    check(OPTIONS[option], "dense", DTYPES[dtypes])
    for each in module if isinstance(module, tuple) else (module,):
        real = getattr(each, name)
        made = mutant()
        monkeypatch.setattr(each, name, made(real) if module is PATHS else made)
    with pytest.raises(AssertionError):
        check(OPTIONS[option], "dense", DTYPES[dtypes])
