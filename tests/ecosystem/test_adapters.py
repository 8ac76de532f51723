"""What peft, torch and optimizers do to the adapters of a sped-up layer without calling it: write, swap, copy, save."""

import copy
import pickle

import pytest
import torch

import fastlora
from tests.support.models import bnb_llama, llama, tokens
from tests.support.peft_models import wrapped

peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def plain(base=llama, **options):
    return wrapped(base, **{"target_modules": TARGETS, **options})


def pair(base=llama, **options):
    """(plain peft, the same sped up), in eval mode."""
    return plain(base, **options).eval(), fastlora.replace_linear(plain(base, **options)).eval()


def calls(model):
    """(calls sped up, calls stepped back) over all of peft's layers."""
    found = [module.fastlora_calls for module in model.modules() if hasattr(module, "fastlora_calls")]
    return sum(c.sped_up for c in found), sum(c.stepped_back for c in found)


def logits(model):
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def check_same(models, calls_so_far):
    """The sped-up model gives peft's logits, and that many of its calls were sped up."""
    peft_model, sped_up = models
    torch.testing.assert_close(logits(sped_up), logits(peft_model), rtol=1e-4, atol=1e-5)
    assert calls(sped_up) == (calls_so_far, 0)


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
def test_writes_that_no_version_counter_shows_are_seen(write, use_dora):
    models = pair(use_dora=use_dora)
    check_same(models, 6)
    before = logits(models[1])
    for model in models:
        write(model)
    expected = 18 if write is not _step_of_bitsandbytes else 24
    check_same(models, expected)
    assert not torch.equal(logits(models[1]), before)


@pytest.mark.filterwarnings("ignore")
def test_the_report_of_a_model_in_which_no_layer_is_sped_up_any_more():
    _, sped_up = pair()
    sped_up.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS, alora_invocation_tokens=[1]))
    sped_up.set_adapter("other")
    report = fastlora.report(sped_up)
    assert not report.replaced
    assert "the adapter is a variant, ALoraLinearVariant" in {row.reason for row in report.rows}
    assert report.summary().startswith("0 of 15 linear layers replaced")


def saved(directory, base=llama, seed=5, **options):
    """The folder of an adapter with weights of its own."""
    model = plain(base, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4 + 0.1)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_hot_swap(tmp_path, base):
    """peft writes another adapter of another scaling into the same tensors, through `.data`."""
    folders = [saved(tmp_path / str(seed), base, seed, lora_alpha=4 * seed) for seed in (1, 2)]
    models = [each.train() for each in pair(base)]  # in eval mode bitsandbytes repacks weights, and loses precision
    seen = []
    for count, folder in enumerate([*folders, folders[0]]):
        for model in models:
            hotswap.hotswap_adapter(model, folder, adapter_name="default")
        check_same(models, 12 * count + 6)
        seen.append(logits(models[1]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_a_scaling_in_a_tensor(base):
    """As peft's hot-swap prepares it: the same numbers and gradients, sped up."""
    models = [each.train() for each in pair(base)]
    found = []
    for model in models:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scaling["default"] = torch.tensor(0.75)
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    check_same(models, 12)
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("base", "options"), [(llama, {"use_dora": True}), (bnb_llama, {"use_rslora": True})])
def test_save_pretrained_and_from_pretrained(tmp_path, base, options):
    """A sped-up model's files are peft's; a model loaded from them and sped up gives the same bits."""
    peft_model, sped_up = pair(base, **options)
    peft_model.save_pretrained(tmp_path / "peft")
    sped_up.save_pretrained(tmp_path / "sped up")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "sped up" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    model = base()
    if base is bnb_llama:
        model.is_loaded_in_4bit = True
    loaded = fastlora.replace_linear(peft.PeftModel.from_pretrained(model, tmp_path / "sped up")).eval()
    assert torch.equal(logits(loaded), logits(sped_up))
    assert calls(loaded) == (6, 0)


def test_a_copy_is_trained_separately():
    _, model = pair()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = logits(model)
    for other in copies:
        optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1.0)
        other(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        assert not torch.equal(logits(other), before)
        assert torch.equal(logits(model), before)


def test_an_unpickled_model_speeds_up_later_layers_in_a_process_that_never_called_replace_linear(monkeypatch):
    _, model = pair()
    data = pickle.dumps(model)
    inject = peft.tuners.lora.LoraModel.inject_adapter
    monkeypatch.setattr(peft.tuners.lora.LoraModel, "inject_adapter", inject.__wrapped__)
    other = pickle.loads(data)
    other.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    assert len(fastlora.report(other).replaced) == 8
