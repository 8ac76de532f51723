"""Stacks of experts with peft's `target_parameters`: as exact as peft, which forms every W + B A; ours forms none."""

import copy

import pytest
import torch

import fastlora
from tests.support.models import randomize, tokens
from tests.support.numerics import assert_as_accurate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
experts = pytest.importorskip("fastlora.peft_layers.experts")
from tests.support.expert_cases import BOTH, MODELS, MOE, assert_as_good, exact, fp32_on_purpose, results, routed, stack  # noqa: E402


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16-fp32", "bf16"],
)
def test_a_stack_is_as_exact_as_peft(name, dtype, adapters):
    assert_as_good(*stack(name, dtype, adapters), dtype)


@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:]], ids=["gate_up", "down"])
def test_one_projection_of_two(targets):
    assert_as_good(*stack(targets=targets), torch.float32)


def test_several_adapters_and_rslora():
    model, layer = stack(use_rslora=True)
    config = peft.LoraConfig(r=5, target_modules=[], target_parameters=list(BOTH))
    model.add_adapter("other", config)
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    assert_as_good(model, layer, torch.float32)


def test_trained_experts_get_their_gradient():
    model, layer = stack()
    layer.get_base_layer().gate_up_proj.requires_grad_(True)
    assert_as_good(model, layer, torch.float32)


def test_autocast():
    model, layer = stack(dtype=torch.bfloat16)
    oracle = results(exact(layer), torch.float64)
    baseline = results(layer, torch.bfloat16, autocast=torch.bfloat16)
    fastlora.replace_linear(model)
    ours = results(layer, torch.bfloat16, autocast=torch.bfloat16)
    assert layer.fastlora_calls.sped_up == 1
    for name, value in ours.items():
        assert_as_accurate(value, baseline[name], oracle[name], name)


def test_a_model_trains_as_peft_does():
    losses = {}
    for ours in (False, True):
        model, _ = stack("qwen3-moe")
        if ours:
            fastlora.replace_linear(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[ours] = []
        for _ in range(6):
            loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[ours].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=2e-5)
    assert losses[True][-1] < losses[True][0] - 0.1


def test_no_stack_is_formed(monkeypatch):
    model, layer = stack()
    fastlora.replace_linear(model)
    monkeypatch.setattr(torch, "baddbmm", None)  # with which peft forms W + B A
    monkeypatch.setattr(type(layer), "get_delta_weight", None)
    results(layer, torch.float32)
    assert (layer.fastlora_calls.sped_up, layer.fastlora_calls.stepped_back) == (1, 0)


def test_packing_is_pefts():
    _, layer = stack()
    update = experts.updates_of(experts.chain(layer))["down_proj"]
    formed = update.scaling * update.b @ update.a  # [E, N, K]
    torch.testing.assert_close(formed, layer.get_delta_weight("default"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_experts_that_compute_in_fp32_on_purpose(dtype):
    holder, targets = fp32_on_purpose(dtype)
    config = peft.LoraConfig(target_modules=[], target_parameters=targets, init_lora_weights=False)
    holder = peft.inject_adapter_in_model(config, holder)
    x, chosen, weights, _ = routed(holder.experts)
    given = x.to(dtype), chosen, weights.to(dtype)
    expected = holder.experts(*given)
    fastlora.replace_linear(holder)
    if dtype is torch.float32:
        torch.testing.assert_close(holder.experts(*given), expected, rtol=1e-4, atol=1e-4)
        assert holder.experts.fastlora_calls.sped_up == 1
    else:
        assert torch.equal(holder.experts(*given), expected)
        assert holder.experts.fastlora_calls.last_reason == "its forward computes in fp32 on purpose"
    with pytest.raises(ValueError, match="in fp32 on purpose"):
        fastlora.quantize_experts(holder)


STEPS_BACK = {
    "adapters are disabled": lambda model, layer: layer.enable_adapters(False),
    "adapters are merged": lambda model, layer: layer.merge(),
    "the experts have hooks": lambda model, layer: layer.get_base_layer().register_forward_hook(lambda *_: None),
    "a wrapper inside has hooks": lambda model, layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "experts are spread": lambda model, layer: setattr(layer.get_base_layer(), "_is_expert_parallel", True),
    "dtypes: computed in": lambda model, layer: layer.get_base_layer().to(torch.bfloat16),
    "experts_implementation=deepgemm": lambda model, layer: setattr(
        layer.get_base_layer().config, "_experts_implementation", "deepgemm"
    ),
}


@pytest.mark.parametrize("reason", STEPS_BACK)
def test_what_cannot_be_sped_up_is_pefts_and_says_so(reason, monkeypatch):
    model, layer = stack()
    fastlora.replace_linear(model)
    STEPS_BACK[reason](model, layer)
    called = []
    monkeypatch.setattr(experts.ParamWrapper, "forward", lambda *_, **__: called.append(1))
    x, chosen, weights, _ = routed(layer)
    layer(x.float(), chosen, weights.float())
    assert called
    assert layer.fastlora_calls.stepped_back == 1
    assert reason in layer.fastlora_calls.last_reason


def test_disabled_and_merged_give_pefts_results():
    model, _ = stack()
    given = tokens()
    with torch.no_grad(), model.disable_adapter():
        plain = model(given).logits
    adapted = model(given).logits
    fastlora.replace_linear(model)
    torch.testing.assert_close(model(given).logits, adapted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(given).logits, plain)
    model.merge_adapter()
    torch.testing.assert_close(model(given).logits, adapted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(given).logits, adapted, rtol=1e-4, atol=1e-4)


def test_report_restore_and_checkpoint(tmp_path):
    model, layer = stack()
    logits = model(tokens()).logits
    fastlora.replace_linear(model)
    rows = [row for row in fastlora.report(model).rows if row.kind.startswith("ParamWrapper")]
    assert [row.replaced for row in rows] == [True, True]
    assert "4 experts of down_proj, r=3 each" in rows[0].reason
    assert rows[0].shape == (64, 128)
    assert {row.kernels for row in rows} == {"expert by expert"}
    model.save_pretrained(tmp_path)
    fastlora.restore(model)
    assert type(layer) is experts.ParamWrapper
    torch.manual_seed(0)
    again, _ = stack()
    again = peft.PeftModel.from_pretrained(again.unload(), tmp_path)
    torch.testing.assert_close(again(tokens()).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_matrix_by_name_stays_pefts():
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4))
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    model = peft.get_peft_model(model, config)
    fastlora.replace_linear(model)
    row = next(row for row in fastlora.report(model).rows if row.kind.startswith("ParamWrapper"))
    assert not row.replaced
    assert "not a stack of experts" in row.reason


@pytest.mark.parametrize("name", MODELS)
def test_no_tokens(name):
    model, layer = stack(name)
    fastlora.replace_linear(model)
    nothing = torch.zeros(0, 2, dtype=torch.long)
    assert layer(torch.zeros(0, 64), nothing, torch.zeros(0, 2)).shape == (0, 64)


def test_adapters_come_after_the_swap():
    model, layer = stack()
    fastlora.replace_linear(model)
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=[], target_parameters=list(BOTH)))
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    fastlora.restore(model)
    assert_as_good(model, layer, torch.float32)
    model.delete_adapter("other")
    results(copy.deepcopy(layer), torch.float32)
    assert list(layer.lora_A) == ["default"]


def test_the_other_layout_of_older_peft_is_left_to_it():
    model, layer = stack()
    for wrapper in experts.chain(layer):
        wrapper._did_swap_in_out_features = False
    report = fastlora.replace_linear(model).fastlora_report
    assert not report.replaced
    assert {row.reason for row in report.left if row.r} == {
        "this peft stores A and B of a stack the other way: pip install 'peft>=0.20'"
    }


def test_torch_compile_sees_no_break():
    model, layer = stack(dtype=torch.bfloat16, adapters=torch.bfloat16, r=8)  # a rank that needs no padding
    x, chosen, weights, _ = routed(layer)
    given = x.bfloat16(), chosen, weights.bfloat16()
    with torch.no_grad():
        oracle, baseline = exact(layer)(x, chosen, weights), layer(*given)
        fastlora.replace_linear(model)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
    assert_as_accurate(compiled, baseline, oracle)


def test_a_replaced_parametrization_of_pefts_is_called(monkeypatch):
    model, layer = stack()
    fastlora.replace_linear(model)
    kind = experts.peft_layer._LoraParameterProxy
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, weight: forward(self, weight))
    x, chosen, weights, _ = routed(layer)
    layer(x.float(), chosen, weights.float())
    assert "parametrization has been replaced" in layer.fastlora_calls.last_reason
