"""LoRALinear and NF4Linear: the computation, the names, and that they behave as modules do."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlora import reference
from fastlora.layers.bases import is_linear4bit
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.ops import nf4
from fastlora.ops.linear import lora_linear
from fastlora.ops.nf4 import NF4Weight
from tests.support.models import as_attributes
from tests.support.numerics import assert_as_accurate

K, N, R = 128, 80, 8


def make_base(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=bias).to(dtype)
    if kind == "dense":
        return linear
    if kind == "nf4":
        return NF4Linear.from_linear(linear)
    bnb = pytest.importorskip("bitsandbytes")
    compute_dtype = None if kind == "bnb" else torch.bfloat16
    layer = bnb.nn.Linear4bit(K, N, bias=bias, quant_type="nf4", compute_dtype=compute_dtype).to(dtype)
    layer.weight.data, layer.bias = linear.weight.data, linear.bias
    return layer.to("cpu")


def make_layer(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True, **options) -> LoRALinear:
    layer = LoRALinear(make_base(kind, dtype, bias), r=R, lora_alpha=16, **options)
    generator = torch.Generator().manual_seed(1)
    for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        matrix.data.copy_(torch.randn(matrix.shape, generator=generator) / matrix.shape[1] ** 0.5)
    return layer


def dense_weight(layer: LoRALinear, dtype: torch.dtype) -> torch.Tensor:
    base = layer.base_layer
    weight = NF4Weight.from_bnb(base.weight) if is_linear4bit(base) else base.weight
    return (weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.detach()).to(dtype)


def run(function, x, *parameters):
    """[output, gradient of x, gradients of the parameters] for a fixed output gradient."""
    leaves = [x.detach().requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("kind", ["dense", "nf4", "bnb", "bnb-bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_against_the_oracle(kind, dtype, bias):
    layer = make_layer(kind, dtype, bias)
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def ours(x, lora_a, lora_b):
        state = {"lora_A.default.weight": lora_a, "lora_B.default.weight": lora_b}
        return torch.func.functional_call(layer, state, (x,))

    def plain(dtype, cast):
        def function(x, lora_a, lora_b):
            b = layer.bias.detach().to(dtype) if bias else None
            return reference.lora_linear(x.to(dtype), dense_weight(layer, dtype), lora_a, lora_b, 2.0, b).to(cast)

        return function

    compute = torch.bfloat16 if kind == "bnb-bf16" else dtype
    found = run(ours, x, lora_a, lora_b)
    # the oracle sees x as the layer computes with it, and a weight that is not rounded
    seen = x.to(compute)
    oracle = run(plain(torch.float64, torch.float64), seen.double(), lora_a.double(), lora_b.double())
    baseline = run(plain(compute, dtype), x, lora_a, lora_b)
    assert found[0].dtype == dtype
    for name, one, base, true in zip(("y", "dx", "dA", "dB"), found, baseline, oracle, strict=True):
        assert_as_accurate(one, base, true, f"{kind} {name}")


def test_names_and_initialization_are_pefts():
    peft = pytest.importorskip("peft")
    for r, rslora, init in ((4, False, True), (9, True, True), (4, False, "gaussian"), (4, False, False)):
        torch.manual_seed(5)
        theirs = peft.inject_adapter_in_model(
            peft.LoraConfig(r=r, lora_alpha=7, use_rslora=rslora, target_modules=["0"], init_lora_weights=init),
            nn.Sequential(nn.Linear(K, N)),
        )[0]
        torch.manual_seed(5)
        ours = LoRALinear(nn.Linear(K, N), r, 7, use_rslora=rslora, init_lora_weights=init)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
        assert ours.scaling == theirs.scaling
        assert ours.r == theirs.r
        assert ours.lora_alpha == theirs.lora_alpha


@pytest.mark.parametrize(
    ("kind", "dtype", "asked", "expected"),
    [
        ("dense", torch.bfloat16, None, torch.float32),
        ("dense", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("nf4", torch.bfloat16, None, torch.float32),
        ("nf4", torch.float32, torch.float16, torch.float16),
        ("dense", torch.float32, None, torch.float32),
    ],
)
def test_adapter_dtype(kind, dtype, asked, expected):
    layer = LoRALinear(make_base(kind, dtype), adapter_dtype=asked)
    assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == expected


@pytest.mark.parametrize("kind", ["dense", "nf4", "bnb", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_multiplies_by_the_weight_gets_the_update_and_its_gradients(kind, dtype):
    """As a fused loss does it, under autocast too."""
    layer = conv1d_layer(dtype) if kind == "conv1d" else make_layer(kind, dtype)
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    lora_a, lora_b, scaling = layer.adapter()
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
    assert weight.dtype == dtype
    assert weight.shape == ((K, N) if kind == "conv1d" else (N, K))
    assert torch.equal(weight, layer.weight)

    dense = (layer.base_layer.weight.T if kind == "conv1d" else dense_weight(layer, torch.float32)).detach()
    read = weight.detach().T if kind == "conv1d" else weight.detach()

    def summed(precision):
        return dense.to(precision) + (scaling * (lora_b.to(precision) @ lora_a.to(precision))).detach()

    assert_as_accurate(read, summed(dtype), summed(torch.float64), "weight")
    y = x @ weight if kind == "conv1d" else F.linear(x, weight)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = torch.autograd.grad(y, (lora_a, lora_b), dy)

    def gradients(precision):
        leaves = [p.detach().to(precision).requires_grad_() for p in (lora_a, lora_b)]
        product = x.to(precision) @ (scaling * leaves[1] @ leaves[0]).T
        return torch.autograd.grad(product, leaves, dy.to(precision))

    for ours, baseline, true in zip(found, gradients(torch.float32), gradients(torch.float64), strict=True):
        if dtype == torch.float32:
            assert_as_accurate(ours, baseline, true, "gradient")
        else:  # the gradient of the weight is rounded to bf16 on its way
            torch.testing.assert_close(ours, baseline, rtol=0.05, atol=0.01 * true.abs().max().item())


def conv1d_layer(dtype):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    layer = LoRALinear(pytorch_utils.Conv1D(N, K).to(dtype), r=R, lora_alpha=16)
    nn.init.normal_(layer.lora_B["default"].weight, std=R**-0.5)
    return layer


def test_reading_the_weight_tells_that_dropout_does_not_apply():
    layer = make_layer("dense", lora_dropout=0.5).train()
    with pytest.warns(UserWarning, match="lora_dropout does not apply there"):
        assert layer.weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            assert not layer.weight.requires_grad
        assert torch.equal(layer.eval().weight, layer.to_linear().weight)
        layer.train().lora_dropout["default"].p = 0.0
        assert layer.weight.requires_grad


def test_the_weight_is_read_inside_a_compiled_graph():
    layer, x = make_layer("dense"), torch.randn(3, K)
    compiled = torch.compile(lambda x: F.linear(x, layer.weight), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight))


def test_torchs_own_fast_path_reads_the_update():
    """In eval mode without gradients nn.TransformerEncoderLayer gives its weights to one fused kernel."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder.linear1, encoder.linear2 = (LoRALinear(base, r=4) for base in (encoder.linear1, encoder.linear2))
    for layer in (encoder.linear1, encoder.linear2):
        nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 5, 32)
    expected = encoder.eval()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="adapter_dtype must be"):
        LoRALinear(nn.Linear(K, N), adapter_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="r must be at least 1"):
        LoRALinear(nn.Linear(K, N), r=0)
    with pytest.raises(ValueError, match="lora_dropout in"):
        LoRALinear(nn.Linear(K, N), lora_dropout=1.0)
    with pytest.raises(ValueError, match="not Conv1d"):
        LoRALinear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="init_lora_weights"):
        LoRALinear(nn.Linear(K, N), init_lora_weights="eva")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 5, K)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_may_be_changed_in_place(kind, shape, dtype):
    """As nn.ReLU(inplace=True) and `/=` on a view do it."""
    layer = make_layer(kind, dtype)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = torch.relu((layer(x) * 3).transpose(0, -1) / 2)
    expected = torch.autograd.grad(y.square().sum(), layer.adapter()[:2])
    z = layer(x).mul_(3).transpose(0, -1)
    z /= 2
    z.relu_()
    assert torch.equal(z, y)
    for found, true in zip(torch.autograd.grad(z.square().sum(), layer.adapter()[:2]), expected, strict=True):
        assert torch.equal(found, true)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_parameters_that_are_plain_attributes(kind):
    layer = make_layer(kind, bias=True)
    x = torch.randn(3, K)
    expected = layer(x)
    as_attributes(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_dropout_only_in_training_and_only_on_the_update(kind):
    layer = make_layer(kind, lora_dropout=0.5)
    x = torch.randn(16, K)
    layer.eval()
    quiet = layer(x)
    assert torch.equal(quiet, layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_B["default"].weight.data.zero_()
    base = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), base)
    # unbiased: the mean over many draws is the output without dropout
    layer = make_layer(kind, lora_dropout=0.5).train()
    mean = torch.stack([layer(x) for _ in range(100)]).mean(0)
    update = (quiet - base).square().mean().sqrt()
    assert (mean - quiet).square().mean().sqrt() < 0.15 * update


def test_a_changed_nn_dropout_is_followed():
    """Code that turns dropout off sets `p` on every nn.Dropout of a model."""
    layer = make_layer("dense", lora_dropout=0.5).train()
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(4, K)
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("kind", ["dense", "nf4", "bnb"])
def test_deepcopy_pickle_and_torch_save(kind):
    layer = make_layer(kind)
    x = torch.randn(3, K)
    layer.train()
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), torch.load(buffer, weights_only=False)]
    if kind != "bnb":  # bitsandbytes' own parameters lose their state in a bare pickle
        copies.append(pickle.loads(pickle.dumps(layer)))
    for other in copies:
        assert torch.equal(other(x), expected)
        other.lora_B["default"].weight.data.zero_()
        assert torch.equal(layer(x), expected), "the copy shares memory with the original"
    other = copy.deepcopy(layer)
    packed = other.base_layer.weight
    codes = packed.codes if isinstance(packed, NF4Weight) else packed.data
    if kind != "dense":
        codes.zero_()
        assert torch.equal(layer(x), expected), "the copied base shares memory with the original"
        assert not torch.equal(other(x), expected), "the copy still reads the original's base"


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_round_trip(kind, double_quant):
    layer = make_layer(kind)
    if kind == "nf4":
        torch.manual_seed(0)
        layer.base_layer = NF4Linear.from_linear(nn.Linear(K, N), 32, double_quant)
    other = make_layer(kind)
    torch.manual_seed(9)
    fresh = nn.Linear(K, N)
    other.base_layer = NF4Linear.from_linear(fresh) if kind == "nf4" else fresh
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(3, K)
    expected = layer(x)
    assert torch.equal(other(x), expected)
    for value in state.values():
        value.zero_()
    assert torch.equal(other(x), expected), "loading must copy"


def test_nf4_state_dict_is_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    theirs, ours = make_base("bnb"), make_base("nf4")
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if "quant_state" not in key:
            assert torch.equal(found[key], value), key
    stats = {key.removeprefix("weight."): value for key, value in found.items() if key.startswith("weight.")}
    theirs.weight = bnb.nn.Params4bit.from_prequantized(found["weight"], stats, device="cpu", module=theirs)
    x = torch.randn(4, K)
    torch.testing.assert_close(theirs.train()(x), ours(x))
    other = NF4Linear.from_linear(nn.Linear(K, N))
    other.load_state_dict(expected)
    assert torch.equal(other.weight.dequantize(), NF4Weight.from_bnb(theirs.weight).dequantize())


def test_nf4_refuses_states_that_do_not_fit():
    ours = make_base("nf4")
    before = ours.weight.dequantize()
    state = ours.state_dict()
    with pytest.raises(RuntimeError, match=r"shape \[40, 128\] in the file, \[80, 128\] in the model"):
        ours.load_state_dict(NF4Linear.from_linear(nn.Linear(K, 40)).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        ours.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r"lacks weight\.absmax"):
        ours.load_state_dict({key: value for key, value in state.items() if key != "weight.absmax"})
    with pytest.raises(RuntimeError, match=r"no 'weight\.quant_state\.bitsandbytes__nf4'"):
        ours.load_state_dict(nn.Linear(K, N).state_dict())
    assert torch.equal(ours.weight.dequantize(), before)


def test_nf4_scales_keep_their_dtype():
    base = make_base("nf4")
    expected = base.weight.dequantize()
    base.to(torch.bfloat16)
    assert base.bias.dtype == torch.bfloat16
    assert base.absmax2.dtype == torch.float32
    assert torch.equal(base.weight.dequantize(), expected)
    base.half().to("cpu").float()
    assert torch.equal(base.weight.dequantize(), expected)
    assert base.to("meta").weight.device.type == "meta"


def test_nf4_linear_takes_any_input_dtype():
    base = make_base("nf4", torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(3, K).to(dtype)
        found = base(x)
        assert found.dtype == dtype
        layer = LoRALinear(base, 4)
        torch.testing.assert_close(layer(x), found)


def test_linear4bit_is_read_in_place():
    layer = make_layer("bnb")
    view = layer._adopted.of(layer.base_layer)
    assert view.codes.data_ptr() == layer.base_layer.weight.data_ptr()
    assert view.absmax.data_ptr() == layer.base_layer.weight.quant_state.absmax.data_ptr()
    assert layer._adopted.of(layer.base_layer) is view, "the view is made once"
    layer.base_layer.weight = make_base("bnb").weight
    assert layer._adopted.of(layer.base_layer) is not view, "a new weight needs a new view"


def test_linear4bit_evaluation_does_not_repack():
    layer = make_layer("bnb").eval()
    x = torch.randn(3, K)
    with torch.no_grad():
        expected = layer.train()(x)
        assert torch.equal(layer.eval()(x), expected)
    assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    assert layer.base_layer.compute_type_is_set is False, "nothing of the adopted layer changes"


def test_linear4bit_that_cannot_be_adopted():
    bnb = pytest.importorskip("bitsandbytes")
    fp4 = bnb.nn.Linear4bit(K, N, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="quant_type is 'fp4'"):
        LoRALinear(fp4)
    with pytest.raises(ValueError, match="not quantized yet"):
        LoRALinear(bnb.nn.Linear4bit(K, N, quant_type="nf4"))
    layer = make_layer("bnb")
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked this weight for CPU inference"):
        layer(torch.randn(2, K))


@pytest.mark.parametrize("kind", ["dense", "nf4", "bnb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_linear_rounds_once(kind, dtype):
    layer = make_layer(kind, dtype)
    plain = layer.to_linear()
    lora_a, lora_b, scaling = layer.adapter()
    exact = dense_weight(layer, torch.float64) + scaling * lora_b.detach().double() @ lora_a.detach().double()
    assert type(plain) is nn.Linear
    assert plain.weight.dtype == dtype
    assert_as_accurate(plain.weight.detach(), exact.float().to(dtype), exact, kind)
    assert torch.equal(plain.bias, layer.bias)
    assert layer.to_linear(torch.float16).weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["dense", "nf4", "bnb"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiles_without_a_graph_break(kind, dropout):
    torch._dynamo.reset()
    layer = make_layer(kind, lora_dropout=dropout).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K, requires_grad=True)
    torch.manual_seed(4)
    found = compiled(x)
    found.square().sum().backward()
    grads = [x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    x.grad = layer.lora_A["default"].weight.grad = layer.lora_B["default"].weight.grad = None
    torch.manual_seed(4)
    expected = layer(x)
    expected.square().sum().backward()
    if dropout == 0:
        torch.testing.assert_close(found, expected)
        again = [x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        for one, other in zip(grads, again, strict=True):
            torch.testing.assert_close(one, other)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_repr_names_the_numbers():
    shown = repr(make_layer("nf4"))
    for part in ("r=8", "lora_alpha=16", "scaling=2", "in_features=128", "nf4, blocksize=64, nested scales"):
        assert part in shown


@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_a_wider_bias_is_rounded_with_the_sum(packed, dtype, rows):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 64, generator=generator) / 8, torch.randn(rows, 64, generator=generator).to(dtype)
    bias = 3 * torch.randn(96, generator=generator)
    a, b = torch.randn(4, 64, generator=generator) / 8, torch.randn(96, 4, generator=generator) / 2
    base = nf4.quantize(weight.to(dtype)) if packed else weight.to(dtype)
    exact = (base.dequantize(torch.float32) if packed else base).double()
    oracle = x.double() @ (exact + b.double() @ a.double()).t() + bias.double()
    separate = F.linear(x, exact.to(dtype)) + (x.float() @ a.t() @ b.t() + bias)
    assert_as_accurate(lora_linear(x, base, a, b, 1.0, bias), separate.to(dtype), oracle)
    if packed:
        alone = x.double() @ exact.t() + bias.double()
        layer = NF4Linear(base, bias)
        assert_as_accurate(layer(x), (F.linear(x, exact.to(dtype)) + bias).to(dtype), alone)
