"""What peft, torch and optimizers do to adapters behind a fused layer's back: write, swap, copy, save."""

import pytest
import torch

import fastlora
from tests.models import bnb_llama, llama, randomize, tokens

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def plain(base=llama, **options):
    """A PeftModel with an update that can be seen."""
    model = base()
    if base is bnb_llama:
        model.is_loaded_in_4bit = True
    torch.manual_seed(3)
    return randomize(peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})))


def pair(base=llama, **options):
    """(plain peft, the same fused), in eval mode."""
    return plain(base, **options).eval(), fastlora.replace_linear(plain(base, **options)).eval()


def calls(model):
    """(fused, stepped back) over all layers of peft's."""
    found = [module.fastlora_calls for module in model.modules() if hasattr(module, "fastlora_calls")]
    return sum(c.fused for c in found), sum(c.stepped_back for c in found)


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def check_same(models, calls_so_far):
    """The fused model gives peft's logits, and has run fused so often."""
    peft_model, fused = models
    torch.testing.assert_close(logits(fused), logits(peft_model), rtol=1e-4, atol=1e-5)
    assert calls(fused) == (calls_so_far, 0)


def _write_through_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3)


def _new_data(model):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data * 2


def _step_of_bitsandbytes(model):
    bnb = pytest.importorskip("bitsandbytes")
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def _another_weight(model):
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            module.weight = torch.nn.Parameter(module.weight.data * 2, requires_grad=False)


def _another_dtype(model):
    for name, module in model.named_modules():
        if name.endswith(("lora_A", "lora_B")):
            module.to(torch.bfloat16)
            module.float()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "write", [_write_through_data, _new_data, _step_of_bitsandbytes, _another_weight, _another_dtype]
)
def test_writes_that_leave_no_trace_are_seen(write, use_dora):
    models = pair(use_dora=use_dora)
    check_same(models, 6)
    before = logits(models[1])
    for model in models:
        write(model)
    expected = 18 if write is not _step_of_bitsandbytes else 24
    check_same(models, expected)
    assert not torch.equal(logits(models[1]), before)


@pytest.mark.filterwarnings("ignore")
def test_the_report_of_a_model_in_which_nothing_is_fused_any_more():
    _, fused = pair()
    fused.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS, lora_bias=True))
    fused.set_adapter("other")
    report = fastlora.report(fused)
    assert not report.replaced
    assert "lora_bias" in {row.reason for row in report.rows}
    assert report.summary().startswith("0 of 15 linear layers replaced")
