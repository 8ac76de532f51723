"""Groups in models: q, k and v, and gate and up, computed together, whatever the code around them does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.layers import between, grouping
from tests.model.test_speed_up import count, family, interpreted, step
from tests.support.models import bnb_llama, randomize, tokens
from tests.support.numerics import rms

pytest.importorskip("triton")
from fastlora.ops import group

assert interpreted  # the fixture, used by all tests here


@pytest.fixture
def grouped(monkeypatch):
    """The numbers of members computed together, call by call."""
    calls = []
    real = group.group_linears
    monkeypatch.setattr(group, "group_linears", lambda x, members: [calls.append(len(members)), real(x, members)][1])
    return calls


def adapted(name="Llama", way="nf4", **options):
    model = family(name, attention_dropout=0.0)
    options = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], **options}
    if way == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        fastlora.replace_linear(model)
    else:
        fastlora.replace_linear(model, **options, quantize="nf4" if way == "nf4" else None)
    randomize(model)
    return model.train()


def close(ours, plain, limit=1e-4):
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert rms(ours[key] - value) <= limit * rms(value) + 1e-9, key


@pytest.mark.parametrize("way", ["nf4", "dense", "peft"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Gemma3"])
def test_a_family_computes_the_same_in_groups(name, way, grouped):
    model = adapted(name, way)
    plain = step(model)
    fastlora.speed_up(model)
    assert count(model)["group"] == 4
    close(step(model), plain)
    assert grouped == [3, 2, 3, 2]
    assert [row.sped_up for row in model.fastlora_report.parts if row.part == "group"] == [True] * 4
    alone = adapted(name, way)
    fastlora.speed_up(alone, group=False)
    assert "group" not in count(alone)
    assert {row.reason for row in alone.fastlora_report.parts if row.part == "group"} == {"not asked for"}
    close(step(alone), plain)
    assert len(grouped) == 4


@pytest.mark.parametrize(("targets", "sizes"), [(["q_proj", "v_proj"], [2, 2]), (["k_proj", "down_proj"], [])])
def test_members_without_adapters_are_left_out(targets, sizes, grouped):
    model = adapted(way="dense", target_modules=targets)
    plain = step(model)
    close(step(fastlora.speed_up(model)), plain)
    assert grouped == sizes
    reasons = {row.reason for row in model.fastlora_report.parts if row.part == "group" and not row.sped_up}
    assert all("fewer than two" in reason for reason in reasons)


@pytest.mark.parametrize("way", ["nf4", "peft"])
def test_dropout_has_the_masks_of_linears_one_by_one(way, grouped):
    model = adapted(way=way, lora_dropout=0.3)
    fastlora.speed_up(model, group=False)
    torch.manual_seed(3)
    plain = step(model)
    fastlora.speed_up(model)
    torch.manual_seed(3)
    close(step(model), plain)
    assert grouped == [3, 2, 3, 2]


def test_under_autocast_x_is_cast_once_and_results_have_the_dtype_that_they_had(grouped):
    for way in ("nf4", "peft"):
        model = adapted(way=way)
        exact, found = step(model), []
        for on in (False, True):
            fastlora.speed_up(model, group=on)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(step(model))
        alone, together = (sum((rms(v - exact[k]) / rms(exact[k])) ** 2 for k, v in f.items()) ** 0.5 for f in found)
        assert together <= 1.1 * alone
        assert [v.dtype for v in found[0].values()] == [v.dtype for v in found[1].values()]
    assert grouped == [3, 2, 3, 2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_over_bitsandbytes_that_computes_in_another_dtype(dtype, autocast, grouped):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    base = bnb_llama()
    base.is_loaded_in_4bit = True
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]))
    randomize(fastlora.replace_linear(model))
    for layer in model.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
    attention = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))
    x = torch.randn(2, 20, 64)

    def outputs():
        seen = []
        hooks = [getattr(attention, f"{n}_proj").register_forward_hook(lambda m, a, y: seen.append(y)) for n in "qkv"]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(inputs_embeds=x, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen

    plain = outputs()
    fastlora.speed_up(model, norm=False, rotary=False, mlp=False, loss=False)
    together = outputs()
    assert grouped[0] == 3
    assert [y.dtype for y in together] == [y.dtype for y in plain]
    for ours, theirs in zip(together, plain, strict=True):
        assert rms(ours.float() - theirs.float()) <= 0.02 * rms(theirs.float())


class Crossed(nn.Module):
    """An attention whose keys and values come from elsewhere, as in a decoder over an encoder."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 32) for _ in range(3))

    def forward(self, x, other):
        return self.q_proj(x) + self.k_proj(other) * self.v_proj(other)


class Holder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.attention = kind()

    def forward(self, *args):
        return self.attention(*args)


def test_linears_that_do_not_share_x_are_not_computed_together_twice(grouped):
    model = fastlora.replace_linear(Holder(Crossed), r=4)
    randomize(model)
    x, other = torch.randn(30, 64), torch.randn(30, 64)
    plain = model(x, other)
    fastlora.speed_up(model)
    for _ in range(2):
        torch.testing.assert_close(model(x, other), plain)
    assert grouped == [3]
    (row,) = fastlora.report(model).parts
    assert (row.sped_up, row.reason) == (False, grouping.NOT_SHARED)
    fastlora.restore(model)
    torch.testing.assert_close(fastlora.speed_up(model)(x, x), model(x, x))
    assert fastlora.report(model).parts[0].sped_up


class Fused(Crossed):
    """Changes x between two of them."""

    def forward(self, x):
        q = self.q_proj(x)
        x.mul_(2)
        return q + self.k_proj(x) * self.v_proj(x)


def test_x_changed_between_two_members_is_seen(grouped):
    model = fastlora.replace_linear(Holder(Fused), r=4)
    randomize(model)
    x = torch.randn(30, 64)
    with torch.no_grad():
        plain = model(x.clone())
        torch.testing.assert_close(fastlora.speed_up(model)(x.clone()), plain)
    assert grouped == [3]


def test_hooks_of_members_run_and_one_that_changes_x_is_obeyed(grouped):
    model = adapted()
    layer = model.model.layers[0].self_attn
    seen = []
    layer.k_proj.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    plain = step(model)
    fastlora.speed_up(model)
    close(step(model), plain)
    assert len(seen) == 2
    assert len(grouped) == 4
    layer.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    changed = step(model)
    assert len(grouped) == 7  # this attention is computed one by one
    fastlora.restore(model)
    close(changed, step(model))


@pytest.mark.parametrize("context", [None, "keep_linears", "keep_weights"])
def test_checkpointing_in_groups(context, grouped):
    model = fastlora.speed_up(adapted("Qwen3"))
    plain = step(model)
    options = {"use_reentrant": False} | ({"context_fn": getattr(fastlora, context)} if context else {})
    model.gradient_checkpointing_enable(options)
    close(step(model), plain, 1e-6)
    assert not any("fastlora_group_off" in module.__dict__ for module in model.modules())


def test_early_stop_of_a_recomputation_leaves_the_group_on(grouped):
    model = fastlora.replace_linear(Holder(Crossed), r=4)
    randomize(model)
    fastlora.speed_up(model)
    x = torch.randn(30, 64, requires_grad=True)
    y = checkpoint(lambda x: model.attention.q_proj(x) if False else model(x, x), x, use_reentrant=False)
    y.sum().backward()
    assert "fastlora_group_off" not in model.attention.__dict__
    assert grouped == [3, 3]


def test_an_error_inside_leaves_nothing_behind():
    model = fastlora.replace_linear(Holder(Crossed), r=4)
    fastlora.speed_up(model)
    x = torch.randn(30, 64)
    with pytest.raises(ValueError, match="last dimension"):
        model(x, x[:, :3])
    assert grouping._open.call is None
    assert "fastlora_group_off" not in model.attention.__dict__


def test_few_tokens_are_for_the_decode_kernel(grouped):
    model = fastlora.speed_up(adapted()).eval()
    with torch.no_grad():
        model(input_ids=tokens()[:1, :9])
    assert grouped == []


def test_copies_pickles_parts_switched_on_later_and_adapters_switched_off(grouped):
    model = adapted("Qwen3")
    fastlora.speed_up(model, norm=False, rotary=False, mlp=False, loss=False)
    assert count(model) == {"group": 4}
    fastlora.speed_up(model)
    assert count(model) == {"norm": 9, "rotary": 2, "mlp": 2, "loss": 1, "group": 4}
    assert all(row.sped_up for row in model.fastlora_report.parts)
    wanted = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert count(other) == count(model)
        close(step(other), wanted, 1e-6)
    fastlora.restore(model)
    assert not any(map(between.parts_of, model.modules()))
    model = fastlora.speed_up(adapted(way="peft"))
    grouped.clear()
    with model.disable_adapter():
        step_logits = model(input_ids=tokens()).logits
    assert grouped == []
    assert not torch.equal(step_logits, model(input_ids=tokens()).logits)
    assert grouped == [3, 2, 3, 2]
