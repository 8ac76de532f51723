"""peft's layers sped up in place: the same numbers, the same checkpoint, and no silent step back."""

import copy
import logging

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.replace import replace_linear
from fastlora.ops.nf4 import NF4Weight
from tests.support.models import Own, as_attributes, bnb_llama, gpt2, llama, qwen2, randomize, snapshot, tokens
from tests.support.numerics import assert_as_accurate
from tests.support.peft_models import add_another, counts, lora_layers, reasons, run, wrapped

peft = pytest.importorskip("peft")
linear = pytest.importorskip("fastlora.peft_layers.linear")
swap = pytest.importorskip("fastlora.peft_layers.swap")


@pytest.mark.parametrize("base", [llama, qwen2, bnb_llama])
def test_numbers_are_pefts(base):
    model = wrapped(base).train()
    expected = run(model)
    names = list(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    assert replace_linear(model) is model
    assert list(model.state_dict()) == names
    assert [id(parameter) for parameter in model.parameters()] == parameters
    found = run(model)
    assert counts(model) == (6, 0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [llama, bnb_llama])
@pytest.mark.parametrize("autocast", [False, True])
def test_numbers_are_as_exact_as_pefts_in_bf16(adapters, base, autocast):
    """Against the same layer in fp64; peft itself is the baseline."""
    layer = wrapped(lambda: base().to(torch.bfloat16)).base_model.model.model.layers[0].mlp.down_proj
    layer.lora_B["default"].weight.data /= 4  # an update somewhat smaller than the base's output, as in training
    layer.lora_A.to(adapters)
    layer.lora_B.to(adapters)
    if base is llama:
        exact = copy.deepcopy(layer).double()
    else:
        exact = wrapped().base_model.model.model.layers[0].mlp.down_proj.double()
        weight = NF4Weight.from_bnb(layer.base_layer.weight).dequantize(torch.float32)
        exact.base_layer.weight.data = weight.double()
        for mine, true in ((layer.lora_A, exact.lora_A), (layer.lora_B, exact.lora_B)):
            true["default"].weight.data = mine["default"].weight.data.double()
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    dy = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(6))

    def step(layer, dtype, autocast):
        given = x.to(dtype).requires_grad_()
        matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(given)
        return [y.detach(), *torch.autograd.grad(y, [given, *matrices], dy.to(y.dtype))]

    oracle, baseline = step(exact, torch.float64, False), step(layer, torch.bfloat16, autocast)
    holder = nn.Sequential(layer)
    swap.speed_up(holder)
    found = step(layer, torch.bfloat16, autocast)
    assert counts(holder) == (1, 0)
    for name, one, other, true in zip(("y", "dx", "dA", "dB"), found, baseline, oracle, strict=True):
        assert one.dtype == other.dtype
        assert_as_accurate(one, other, true, name)


def test_dropout_is_drawn_in_training_only_and_is_unbiased():
    model = wrapped(lora_dropout=0.5)
    replace_linear(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(16, 128)
    quiet = layer.eval()(x)
    update = quiet - layer.base_layer(x)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(100)])
    assert layer.fastlora_calls.stepped_back == 0
    assert (draws[0] - quiet).abs().max() > 0
    error = (draws.mean(0) - quiet).square().mean().sqrt()
    assert error < 0.15 * update.square().mean().sqrt()


def test_it_can_be_called_twice():
    model = wrapped().train()
    replace_linear(model)
    run(model)
    before = snapshot(model)
    replace_linear(model)
    assert snapshot(model) == before
    assert counts(model) == (6, 0), "the counts go on"


def in_experts():
    return pytest.importorskip("tests.support.expert_cases").stack(r=2)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        wrapped,
        lambda: wrapped(use_dora=True),
        lambda: wrapped(bnb_llama),
        lambda: wrapped(gpt2, target_modules=["c_attn", "c_proj"]),
        lambda: wrapped(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"]),
        in_experts,
    ],
    ids=["Linear", "DoRA", "Linear4bit", "Conv1D", "Embedding", "ParamWrapper"],
)
def test_it_prints_and_tells_its_state_as_pefts(make):
    """`repr`, get_layer_status and get_model_status, of the model, of a copy and of the layers that come later."""
    plain, model = make(), replace_linear(make())
    for models in ((plain, model), (copy.deepcopy(plain), copy.deepcopy(model))):
        one, other = models
        assert repr(one) == repr(other)
        for layer, sped_up in zip(lora_layers(one), lora_layers(other), strict=True):
            assert type(sped_up).__name__ == type(layer).__name__
        assert one.get_layer_status() == other.get_layer_status()
        assert one.get_model_status() == other.get_model_status()
        for each in models:
            each.add_adapter("other", copy.deepcopy(each.peft_config["default"]))
            each.set_adapter("other")
        assert repr(one) == repr(other)
        assert one.get_layer_status() == other.get_layer_status()
        with one.disable_adapter(), other.disable_adapter():
            assert one.get_model_status() == other.get_model_status()


def test_options_are_refused():
    model = wrapped()
    before = snapshot(model)
    for options in ({"r": 8}, {"quantize": "nf4"}, {"config": peft.LoraConfig()}, {"target_modules": ["q_proj"]}):
        with pytest.raises(ValueError, match="already carries peft's adapters"):
            replace_linear(model, **options)
        assert snapshot(model) == before


def test_adapters_injected_without_a_peft_model():
    model = llama()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model)
    randomize(model)
    expected = model(tokens()).logits
    replace_linear(model)
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert counts(model) == (2, 0)


def test_the_report():
    model = replace_linear(wrapped())
    report = model.fastlora_report
    linear = [m for m in model.get_base_model().modules() if isinstance(m, (nn.Linear, peft.tuners.lora.Linear))]
    inside = 3 * len(report.replaced)  # base_layer, A and B of each
    assert len(report.rows) == len(linear) - inside
    assert len(report.replaced) == 6
    model(tokens())
    assert "6 calls sped up, 0 stepped back to peft" in report.summary()
    with model.disable_adapter():
        model(tokens())
    assert "6 calls sped up, 6 stepped back to peft" in report.summary()
    row = next(row for row in report.rows if row.name.endswith("layers.0.self_attn.q_proj"))
    assert str(row.calls) == "1 sped up, 1 stepped back (adapters are disabled)"
    assert {row.reason for row in report.left} == {"peft has put no adapter on it"}


def step_back(change, reason, base=llama, **options):
    return pytest.param(change, reason, base, options, id=reason.split(":")[0].replace(" ", "-"))


def _add_in_fp64(model):
    add_another(model)
    for layer in lora_layers(model):
        layer.lora_A["other"].double()
        layer.lora_B["other"].double()


def _each(change):
    def apply(model):
        for layer in lora_layers(model):
            change(layer)

    return apply


class OtherVariant(peft.tuners.lora.variants.DoraLinearVariant):
    """A variant that peft may have in future."""


def _variant(model):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True)
    model.add_adapter("other", config)
    randomize(model)
    model.set_adapter("other")
    for layer in lora_layers(model):
        layer.lora_variant["other"] = OtherVariant()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _double(module):
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "reason", "base", "options"),
    [
        step_back(lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled"),
        step_back(lambda model: model.merge_adapter(), "adapters are merged"),
        step_back(_add_in_fp64, "dtypes: input torch.float32, adapters torch.float32, torch.float64"),
        step_back(_variant, "the adapter is a variant, OtherVariant"),
        step_back(
            _each(lambda m: m.lora_A["default"].register_parameter("bias", nn.Parameter(torch.ones(4)))), "A has"
        ),
        step_back(
            _each(lambda m: m.base_layer.register_forward_hook(lambda *a: a[-1] * 2)), "the base layer has hooks"
        ),
        step_back(_each(lambda m: m.lora_A["default"].register_forward_hook(lambda *a: a[-1] * 2)), "A or B has hooks"),
        step_back(_each(lambda m: _double(m.lora_B["default"])), "A or B is parametrized"),
        step_back(_each(lambda m: _double(m.base_layer)), "the base layer is parametrized"),
        step_back(_each(lambda m: m.lora_A.to(torch.float64) and m.lora_B.double()), "dtypes: input torch.float32"),
        step_back(_each(lambda m: m.lora_dropout.update({"default": nn.AlphaDropout()})), "the dropout layer is not"),
        step_back(_each(lambda m: m.scaling.update(default=torch.tensor([0.5]))), "scaling is not a number"),
    ],
)
def test_it_steps_back_where_a_condition_does_not_hold(change, reason, base, options):
    plain = wrapped(base, **options)
    ours = replace_linear(wrapped(base, **options))
    for model in (plain, ours):
        change(model)
        model.eval()
    expected, found = plain(tokens()).logits, ours(tokens()).logits
    assert torch.equal(found, expected), "stepping back is peft's own forward"
    assert counts(ours) == (0, 6)
    assert all(said.startswith(reason) for said in reasons(ours)), reasons(ours)
    assert len(reasons(ours)) == 1


def test_global_hooks_see_every_module():
    model = replace_linear(wrapped())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(tokens())
    finally:
        handle.remove()
    assert all(layer.base_layer in seen for layer in lora_layers(model))
    assert reasons(model) == {"hooks for all modules are registered"}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_parameters_that_are_plain_attributes(options):
    model = replace_linear(wrapped(qwen2, **options)).eval()
    expected = model(tokens()).logits
    for layer in lora_layers(model):
        as_attributes(layer)
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert counts(model)[1] == 0


def test_it_comes_forward_again():
    model = replace_linear(wrapped()).eval()
    expected = model(tokens()).logits
    with model.disable_adapter():
        base = model(tokens()).logits
    assert not torch.allclose(base, expected)
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert counts(model) == (12, 6)


def test_a_step_back_is_logged_once(caplog):
    linear._warned.clear()
    model = replace_linear(wrapped())
    with caplog.at_level(logging.WARNING, "fastlora.peft_layers.swap"):
        with model.disable_adapter():
            model(tokens())
        assert not caplog.records, "what the user asked for is not logged"
        _add_in_fp64(model)
        model(tokens())
        model(tokens())
    assert [record.getMessage() for record in caplog.records] == [
        "a LoRA layer steps back to peft's slower forward: dtypes: input torch.float32, adapters torch.float32, "
        "torch.float64, computed in torch.float32 (said once per reason)"
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alora_invocation_tokens": [1]}, "the adapter is a variant, ALoraLinearVariant"),
        ({"target_modules": ["embed_tokens"]}, "fastlora has no faster form of peft's Embedding"),
    ],
)
def test_a_model_with_nothing_to_speed_up_runs_as_it_is(options, reason, caplog):
    model = wrapped(**options)
    before, expected = snapshot(model)[:2], model(tokens()).logits
    with caplog.at_level(logging.WARNING, "fastlora.peft_layers.swap"):
        assert replace_linear(model) is model
    assert [record.getMessage() for record in caplog.records] == [
        f"nothing in this peft model can be sped up, so it runs as it is: {reason}"
    ]
    assert snapshot(model)[:2] == before
    assert torch.equal(model(tokens()).logits, expected)
    assert not model.fastlora_report.replaced


class OwnLinear(peft.tuners.lora.Linear):
    """A user's own form of one of peft's layers."""

    def forward(self, x, *args, **kwargs):
        return -super().forward(x, *args, **kwargs)


class OwnLora(nn.Module, peft.tuners.lora.LoraLayer):
    """A user's own LoRA layer, over a module of any kind."""

    def __init__(self, base_layer, adapter_name, **kwargs):
        super().__init__()
        peft.tuners.lora.LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "base"), [(OwnLora, nn.LSTM), (OwnLora, nn.PReLU), (OwnLinear, Own)])
@pytest.mark.parametrize("others", [False, True])
def test_layers_of_the_users_own_run_as_they_are(kind, base, others, caplog):
    """As the only LoRA layer of a model, over a module of any kind, and among layers of peft's."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"own": base(8, 8)} | ({"pefts": nn.Linear(8, 8)} if others else {}))
    config = peft.LoraConfig(r=2, target_modules=list(model), init_lora_weights=False)
    config._register_custom_module({base: kind})
    peft.inject_adapter_in_model(config, model)
    x = torch.randn(3, 8)
    expected = [layer(x) for layer in model.values()]
    assert replace_linear(model) is model
    assert type(model["own"]) is kind
    for layer, wanted in zip(model.values(), expected, strict=True):
        torch.testing.assert_close(layer(x), wanted)
    assert [row.name for row in fastlora.report(model).replaced] == ["pefts"] * others
    said = f"it runs as it is: fastlora has no faster form of peft's {kind.__name__}"
    assert (said in caplog.text) == (not others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}])
def test_gpt2s_transposed_layers(options):
    plain, model = (wrapped(gpt2, target_modules=["c_attn", "c_proj", "c_fc"], **options).eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    replace_linear(model)
    for one, other in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counts(model) == (4, 0)
    report = fastlora.report(model)
    assert [row.kind for row in report.replaced] == ["Linear(Conv1D)"] * 4
    model = replace_linear(wrapped(gpt2, target_modules=["c_attn"]))
    left = {row.name.rsplit("h.0.")[-1]: row.shape for row in fastlora.report(model).left if row.kind == "Conv1D"}
    assert left == {"attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}


@pytest.mark.filterwarnings("ignore")
def test_a_transposed_flag_that_is_wrong_steps_back():
    model = replace_linear(wrapped())
    for layer in lora_layers(model):
        layer.fan_in_fan_out = True
    model(tokens())
    assert reasons(model) == {"fan_in_fan_out: the weight is transposed"}
    assert {row.reason for row in fastlora.report(model).left if row.r} == {"fan_in_fan_out: the weight is transposed"}


def test_fp4_is_left():
    model = replace_linear(wrapped(lambda: bnb_llama(quant_type="fp4")))
    assert {row.reason for row in model.fastlora_report.left if row.r} == {"the base weight is fp4"}
