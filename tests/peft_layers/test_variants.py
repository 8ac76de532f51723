"""Kinds of LoRA that peft computes in its own way: after `replace_linear` they run exactly as before."""

import pytest
import torch

import fastlora
from fastlora.model.replace import replace_linear
from tests.support.models import llama, randomize, tokens
from tests.support.peft_models import counts, reasons, wrapped

peft = pytest.importorskip("peft")
config = pytest.importorskip("peft.tuners.lora.config")
SpedUpLinear = pytest.importorskip("fastlora.peft_layers.linear").SpedUpLinear
LAYERS = ["q_proj", "k_proj", "down_proj"]


def of(name, **options):
    """One of peft's configurations, or None if this peft is too old for it."""
    kind = getattr(config, name, None)
    return None if kind is None else kind(**options)


VARIANTS = {
    "aLoRA": {"alora_invocation_tokens": [1]},
    "VeLoRA": {"velora_config": of("VeloraConfig")},
    "BD-LoRA": {
        "use_bdlora": of("BdLoraConfig", target_modules_bd_a=LAYERS[:2], target_modules_bd_b=LAYERS[2:], nblocks=2)
    },
    "KaSA": {"kasa_config": of("KasaConfig")},
    "MonteCLoRA": {"monteclora_config": of("MontecloraConfig")},
}


def step(model):
    """Logits and gradients of a step, from one seed."""
    torch.manual_seed(7)
    model.zero_grad()
    output = model(input_ids=tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_plain", [False, True], ids=["only", "with a plain adapter"])
def test_variants_run_as_before(variant, with_plain):
    options = VARIANTS[variant]
    if None in options.values():
        pytest.skip(f"this peft has no {variant}")
    if with_plain and variant == "KaSA":
        pytest.skip("peft does not combine other adapters with KaSA")
    plain, model = (wrapped(target_modules=LAYERS, **options) for _ in range(2))
    if with_plain:
        for each in (plain, model):
            each.add_adapter("plain", peft.LoraConfig(r=2, target_modules=LAYERS))
    replace_linear(model)
    assert [type(layer) for layer in model.modules() if hasattr(layer, "fastlora_calls")] == (
        [SpedUpLinear] * 6 if with_plain else []
    )
    for one, other in zip(step(model), step(plain), strict=True):
        assert torch.equal(one, other)
    if with_plain:
        assert counts(model) == (0, 6)
        assert all(reason.startswith("the adapter is a variant, ") for reason in reasons(model))
        model.set_adapter("plain")
        model(tokens())
        assert counts(model) == (6, 6)
    else:
        assert {row.reason for row in fastlora.report(model).left if row.r} == {
            row.reason for row in model.fastlora_report.left if row.r
        }


@pytest.mark.filterwarnings("ignore")
def test_a_mixture_of_adapters_by_arrow_runs_as_before(tmp_path):
    paths = []
    for serial in range(2):
        model = wrapped(target_modules=LAYERS[:2])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1 * serial)
        model.save_pretrained(tmp_path / str(serial))
        paths.append(str(tmp_path / str(serial)))
    if not hasattr(peft, "create_arrow_model"):
        pytest.skip("this peft has no Arrow")
    routing = peft.ArrowConfig(top_k=1)
    model = peft.create_arrow_model(llama(), task_specific_adapter_paths=paths, arrow_config=routing).eval()
    expected = model(tokens()).logits
    assert torch.equal(replace_linear(model)(tokens()).logits, expected)
    assert counts(model)[0] == 0


def test_eight_bits_are_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    model = replace_linear(randomize(model), r=4, target_modules=["k_proj", "v_proj"])
    rows = {row.name: row for row in model.fastlora_report.rows}
    assert not rows["model.layers.0.self_attn.q_proj"].replaced
    assert type(model.model.layers[0].self_attn.q_proj) is bnb.nn.Linear8bitLt
    assert rows["model.layers.0.self_attn.k_proj"].replaced
