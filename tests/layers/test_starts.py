"""Starts by name, without peft: peft's numbers where peft has them, a model unchanged at first, files that fit."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear
from fastlora.ops import nf4
from tests.support.models import bnb_llama, gpt2, llama, logits, qwen2, randomize, snapshot, tokens

TARGETS = ["q_proj", "k_proj", "down_proj"]
CHANGING = ["pissa", "pissa_niter_8", "olora"]


def shaken(model):
    """Adapters that training has moved: different from their start, and not small."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 16
    return model


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", *CHANGING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_numbers_are_pefts(init, dtype, rslora):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_rslora": rslora, "init_lora_weights": init}
    theirs, ours = qwen2().to(dtype), qwen2().to(dtype)
    torch.manual_seed(7)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**options), theirs)
    torch.manual_seed(7)
    replace_linear(ours, **options)
    compared = 0
    for name, layer in ours.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        other = theirs.get_submodule(name)
        pairs = [(layer.base_layer.weight, other.base_layer.weight)]
        pairs += [
            (getattr(layer, part)["default"].weight, getattr(other, part)["default"].weight.float())
            for part in ("lora_A", "lora_B")
        ]
        if init == "pissa_niter_8" and dtype == torch.bfloat16:
            # vectors of a subspace iteration turn with the last bit; their product does not
            pairs[1:] = [(pairs[2][0] @ pairs[1][0], pairs[2][1] @ pairs[1][1])]
        for mine, true in pairs:
            close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
            torch.testing.assert_close(mine, true, **close, msg=lambda said, name=name: f"{name}: {said}")
        compared += 1
    assert compared == 6


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", *CHANGING])
@pytest.mark.parametrize("base", [llama, gpt2])
def test_the_model_computes_at_first_what_it_did(init, base):
    model = base().eval()
    expected, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    replace_linear(model, r=4, lora_alpha=6, init_lora_weights=init)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert all(p.is_contiguous() for p in model.parameters() if p.requires_grad), "as FSDP2 wants them"
    changed = [
        name for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear) and not torch.equal(layer.base_layer.weight, weights[f"{name}.weight"])
    ]  # fmt: skip
    assert len(changed) == (len([m for m in model.modules() if isinstance(m, LoRALinear)]) if init in CHANGING else 0)
    assert all(
        layer.base_layer.weight.requires_grad is False for layer in model.modules() if isinstance(layer, LoRALinear)
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_principal_part_is_what_is_trained(init):
    """PiSSA takes out the largest singular values, OLoRA an orthonormal basis of columns."""
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    replace_linear(model, r=4, lora_alpha=8, init_lora_weights=init)
    layer = model.model.layers[0].self_attn.q_proj
    a, b, scaling = layer.adapter()
    singular = torch.linalg.svdvals(weight)
    if init == "olora":
        torch.testing.assert_close(b.t() @ b, torch.eye(4), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.base_layer.weight + scaling * b @ a, weight, rtol=1e-4, atol=1e-6)
    else:
        torch.testing.assert_close(torch.linalg.svdvals(scaling * b @ a)[:4], singular[:4], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[0], singular[4], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("init", CHANGING)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_fits_the_original_base(init, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": rslora}
    model = replace_linear(llama(), r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init, **options)
    expected = logits(shaken(model))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    assert theirs.base_model.model.model.layers[0].self_attn.q_proj.r == {"default": 8}
    ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(load_adapter(model, tmp_path)), expected)  # the part that undoes the start is left out
    layer = model.model.layers[0].self_attn.q_proj
    layer.taken_out["default"] = tuple(part * 1.01 for part in layer.taken_out["default"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"changed by its start.*load it into a model without adapters"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    torch.testing.assert_close(logits(merge(copy.deepcopy(model))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", CHANGING)
def test_what_was_taken_out_goes_with_the_model(init, tmp_path):
    """A copy, and a model that loads the state, save the same adapter; a random start belongs to one model."""
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": init}
    torch.manual_seed(1)
    model = shaken(replace_linear(llama(), **options))
    model.model.layers[0].self_attn.q_proj.set_scaling(5)
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(2)
    other = llama()
    other = replace_linear(other, **options)
    other.model.layers[0].self_attn.q_proj.set_scaling(5)
    other.load_state_dict(torch.load(buffer))
    for number, each in enumerate((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other)):
        assert torch.equal(logits(each), expected)
        save_adapter(each, tmp_path / str(number))
        torch.testing.assert_close(
            logits(load_adapter(llama(), tmp_path / str(number))), expected, rtol=1e-4, atol=1e-4
        )
    plain = replace_linear(llama(), r=4, target_modules=TARGETS)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*taken_out\.default\.A"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*taken_out\.default\.A"):
        other.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_file_of_pefts_that_means_a_changed_base_changes_it_likewise(init, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init)
    theirs = shaken(peft.get_peft_model(llama(), config))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    save_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "again")), logits(theirs), rtol=1e-4, atol=1e-4)


def test_the_rest_is_quantized():
    """As in PiSSA's paper: the residual in NF4 has a smaller error than the weight would have."""
    errors = []
    exact = llama().model.layers[0].self_attn.q_proj.weight
    for init in ("pissa", True):
        model = replace_linear(llama(), r=16, lora_alpha=16, init_lora_weights=init, quantize="nf4")
        assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, NF4Linear)
        errors.append((merge(model).model.layers[0].self_attn.q_proj.weight - exact).norm().item())
    assert errors[0] < 0.9 * errors[1]


def by_hand(weight, r, iterations=1):
    """LoftQ from bitsandbytes' own quantization, as in algorithm 1 of the paper: A, B and the base.

    peft's runs on CUDA devices only.
    """
    bnb = pytest.importorskip("bitsandbytes")
    a, b = torch.zeros(r, weight.shape[1]), torch.zeros(weight.shape[0], r)
    for _ in range(iterations):
        codes, state = bnb.functional.quantize_4bit(
            (weight - b @ a).contiguous(), quant_type="nf4", compress_statistics=False, blocksize=64
        )
        base = bnb.functional.dequantize_4bit(codes, state)
        u, s, vh = torch.linalg.svd(weight - base, full_matrices=False)
        a, b = s[:r].sqrt().unsqueeze(1) * vh[:r], u[:, :r] * s[:r].sqrt()
    return a, b, base


@pytest.mark.parametrize("alpha", [8, 20])
def test_loftq(alpha):
    exact = llama()
    options = {"r": 8, "target_modules": TARGETS, "quantize": "nf4", "double_quant": False}
    model = replace_linear(llama(), **options, lora_alpha=alpha, init_lora_weights="loftq")
    plain = replace_linear(llama(), **options)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        weight = exact.get_submodule(name).weight.detach()
        a, b, scaling = layer.adapter()
        true_a, true_b, _ = by_hand(weight, 8)
        torch.testing.assert_close(scaling * b @ a, true_b @ true_a, rtol=1e-3, atol=1e-5)
        if alpha == 8:  # peft's own matrices, except for the sign of each singular vector
            torch.testing.assert_close(a.abs(), true_a.abs(), rtol=1e-2, atol=1e-4)
        assert torch.equal(layer.base_layer.codes, plain.get_submodule(name).base_layer.codes)
        left = (layer.to_linear().weight - weight).norm()
        assert left < 0.95 * (layer.base_layer.weight.dequantize() - weight).norm()


@pytest.mark.parametrize("iterations", [2, 5])
@pytest.mark.parametrize("alpha", [8, 20])
def test_loftq_with_more_iterations(iterations, alpha):
    """Each makes the base that belongs to the update before; the remaining error of the weight shrinks."""
    exact = llama()
    options = {"r": 8, "target_modules": TARGETS, "quantize": "nf4", "double_quant": False, "lora_alpha": alpha}
    options["init_lora_weights"] = "loftq"
    model = replace_linear(llama(), **options, loftq_config={"loftq_iter": iterations})
    once = replace_linear(llama(), **options)
    left = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        weight = exact.get_submodule(name).weight.detach()
        a, b, scaling = layer.adapter()
        true_a, true_b, base = by_hand(weight, 8, iterations)
        torch.testing.assert_close(scaling * b @ a, true_b @ true_a, rtol=1e-3, atol=1e-4)
        # earlier sums differ in their last bits, and so do scales; a value between two levels may take either
        mine = layer.base_layer.weight.dequantize()
        assert (~torch.isclose(mine, base, rtol=1e-5, atol=0)).float().mean() < 1e-3, name
        for which, kind in ((layer, "more"), (once.get_submodule(name), "one")):
            left.setdefault(kind, []).append((which.to_linear().weight - weight).norm().item())
    assert sum(left["more"]) < 0.97 * sum(left["one"])


def test_loftq_with_more_iterations_is_saved_for_the_original_base(tmp_path):
    """Over the weights in full precision it is what training added; with quantize, up to the quantization error."""
    peft = pytest.importorskip("peft")
    options = {"r": 8, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "loftq"}
    options |= {"loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=3), "quantize": "nf4"}
    model = replace_linear(llama(), **options)
    started = {name: layer.to_linear().weight for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    shaken(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).base_model.model
    for name, start in started.items():
        added = model.get_submodule(name).to_linear().weight - start
        torch.testing.assert_close(theirs.get_submodule(name).get_delta_weight("default"), added, rtol=1e-3, atol=1e-4)
    loaded = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-4, atol=1e-4)
    before = logits(model)
    assert torch.equal(logits(load_adapter(model, tmp_path)), before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = replace_linear(llama(), **options)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(logits(other), logits(model))


def test_a_file_of_pefts_with_more_iterations_changes_its_base_likewise(tmp_path):
    """peft saves A and B as they are: the base is made again from the same weights."""
    options = {"r": 8, "lora_alpha": 8, "target_modules": TARGETS}
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 3}}
    model = shaken(replace_linear(llama(), **options, **loftq, quantize="nf4"))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.taken_out.clear()  # so that A and B are written as peft does
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | loftq))
    again = load_adapter(llama(), tmp_path, quantize="nf4")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"load it with quantize='nf4'"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match="load it into a model without adapters"):
        load_adapter(replace_linear(llama(), **options, quantize="nf4"), tmp_path)


def test_loftq_is_saved_as_it_is_for_a_base_in_nf4(tmp_path):
    peft = pytest.importorskip("peft")
    options = {"r": 8, "target_modules": TARGETS, "init_lora_weights": "loftq"}
    model = shaken(replace_linear(llama(), **options, quantize="nf4"))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path, quantize="nf4")), logits(model))
    base = bnb_llama(compress_statistics=True)
    base.is_loaded_in_4bit = True
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).train()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-3, atol=1e-4)
    config = {**options, "lora_alpha": 32, "peft_type": "LORA", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    other = replace_linear(llama(), config, quantize="nf4")
    fresh = replace_linear(llama(), **options, quantize="nf4")
    for (name, mine), true in zip(other.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, true), name


def test_a_weight_in_4_bits_or_shared_is_no_start():
    before = bnb_llama()
    for init in ("pissa", "olora", "loftq"):
        with pytest.raises(ValueError, match=r"starts from the weight before quantization.*pass quantize='nf4'"):
            replace_linear(before, init_lora_weights=init, quantize="nf4")
    tied = llama(tie_word_embeddings=True)
    embedding = tied.model.embed_tokens.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"would change the weight of lm_head, which is model\.embed_tokens\.weight too"
    ):
        replace_linear(tied, target_modules=["lm_head"], init_lora_weights="pissa")
    assert torch.equal(tied.model.embed_tokens.weight, embedding)
    broken = llama()
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    state = {name: value.clone() for name, value in broken.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or inf"):
        replace_linear(broken, init_lora_weights="pissa")
    assert all(torch.equal(value, state[name]) for name, value in broken.state_dict().items()), "nothing is changed"


def test_a_single_linear_layer():
    linear = nn.Linear(16, 12)
    weight = linear.weight.detach().clone()
    layer = LoRALinear(linear, r=4, lora_alpha=4, init_lora_weights="pissa")
    torch.testing.assert_close(layer.to_linear().weight, weight, rtol=1e-4, atol=1e-6)
    assert linear.weight.shape == (12, 16)
    assert nf4.quantize(linear.weight).shape == (12, 16)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gpt2(quantize, tmp_path):
    """Transposed weights: trained, saved, opened by peft, merged back into a model of the same layout."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = gpt2().eval()
    expected, plain = logits(base), copy.deepcopy(base)
    model = replace_linear(base, r=4, lora_alpha=6, quantize=quantize)
    assert len(model.fastlora_report.replaced) == 4
    if quantize is None:
        torch.testing.assert_close(logits(model), expected)
    randomize(model)
    save_adapter(model, tmp_path)
    if quantize is None:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
        assert theirs.peft_config["default"].fan_in_fan_out is True
    again = load_adapter(copy.deepcopy(plain), tmp_path, quantize=quantize)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    trained = logits(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-4)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    state = merged.state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in plain.state_dict().items()}


def test_gpt2_takes_pefts_config():
    peft = pytest.importorskip("peft")
    model = replace_linear(gpt2(), peft.LoraConfig(fan_in_fan_out=True))
    assert [row.name for row in model.fastlora_report.replaced] == ["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize(("init", "solver"), [("pissa", "svd"), ("olora", "qr")])
def test_a_start_that_fails_changes_nothing(init, solver, monkeypatch):
    model, calls, real = llama(), [], getattr(torch.linalg, solver)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise torch.linalg.LinAlgError("it did not converge")
        return real(*args, **kwargs)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    known = snapshot(model)
    monkeypatch.setattr(torch.linalg, solver, failing)
    with pytest.raises(ValueError, match=rf"'{init}' fails for .*v_proj, exclude it: it did not converge"):
        replace_linear(model, r=2, init_lora_weights=init)
    assert snapshot(model) == known
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
