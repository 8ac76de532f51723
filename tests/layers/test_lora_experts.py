"""Stacks of experts without peft: the same as peft over the same adapters, files that both read, packed stacks."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import stacks
from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.layers.lora_experts import LoRAExperts
from fastlora.layers.lora_linear import LoRALinear
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear
from tests.support.models import llama, logits, randomize, snapshot, tokens
from tests.support.numerics import assert_as_accurate

peft = pytest.importorskip("peft")
from tests.support.expert_cases import ALONE, BOTH, MODELS, fp32_on_purpose, moe, ours, routed, stack  # noqa: E402


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, LoRAExperts))


def gradients(model):
    """By the names of peft's parameters."""
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRAExperts):
            by_address = {p.data_ptr(): p.grad for p in layer.parameters() if p.requires_grad}
            found |= {key: by_address[value.data_ptr()] for key, value in stacks.saved(layer, name)}
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_saved_here_it_is_pefts_model(name, dtype, targets, tmp_path):
    """Logits and gradients are as near to those in fp64 as peft's own, from the file saved here."""
    alphas = {"alpha_pattern": {"down_proj": 5}} if BOTH[1] in targets else {}
    model = ours(name, dtype, target_parameters=list(targets), use_rslora=True, **alphas)
    save_adapter(model, tmp_path)
    results = []
    for kind in (dtype, torch.float64):
        theirs = peft.PeftModel.from_pretrained(moe(name, dtype).to(kind), tmp_path, is_trainable=True)
        theirs.base_model.model.config._experts_implementation = "eager"
        for key, parameter in theirs.named_parameters():
            if "lora_" in key and kind == torch.float64:
                parameter.data = parameter.data.double()
        loss = theirs(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        named = {k.removeprefix("base_model.model.").replace(".default", ""): p for k, p in theirs.named_parameters()}
        results.append({"logits": logits(theirs)} | {k: p.grad for k, p in named.items() if p.grad is not None})
    baseline, oracle = results
    mine = {"logits": logits(model), **gradients(model)}
    assert mine.keys() == oracle.keys()
    assert len(mine) == 1 + 2 * len(targets)
    for key, value in mine.items():
        assert_as_accurate(value, baseline[key], oracle[key], key)


@pytest.mark.parametrize("name", MODELS)
def test_saved_by_peft_it_opens_here(name, tmp_path):
    theirs, _ = stack(name, alpha_pattern={"gate_up_proj": 9}, rank_pattern={"down_proj": 2})
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    model = load_adapter(moe(name), tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    layer = layer_of(model)
    assert layer.r == {"gate_up_proj": 3, "down_proj": 2}
    assert layer.scaling == {"gate_up_proj": 3, "down_proj": 3}
    again = replace_linear(moe(name), **ALONE | {"rank_pattern": {"down_proj": 2}})
    torch.testing.assert_close(logits(load_adapter(again, tmp_path)), expected, rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(moe(name), tmp_path / "again")
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_start_is_pefts(init, one_thread):
    torch.manual_seed(7)
    config = {"r": 3, "target_parameters": list(BOTH), "target_modules": ["q_proj"], "init_lora_weights": init}
    base = moe()
    torch.manual_seed(5)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), copy.deepcopy(base))
    torch.manual_seed(5)
    model = replace_linear(base, **config, lora_alpha=8)
    true = {name.replace(".default", ""): value for name, value in theirs.named_parameters() if "lora_" in name}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRAExperts)]
    compared = [torch.equal(value, true[key]) for name, layer in layers for key, value in stacks.saved(layer, name)]
    assert compared == [True] * 4
    if init is not False:
        assert torch.equal(logits(model), logits(moe()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_stacks(name, double_quant, tmp_path):
    """As exact as peft over the values that the packed stacks stand for; saved, loaded and merged likewise."""
    plain = ours(name)
    save_adapter(plain, tmp_path)
    model = load_adapter(moe(name), tmp_path, quantize="nf4", double_quant=double_quant)
    layer, bare = layer_of(model), moe(name)
    assert not any(isinstance(p, nn.Parameter) and p.ndim == 3 for p in layer.parameters())
    assert all(module.weight.nested is double_quant for module in layer.packed.values())
    experts = next(
        module for module in bare.modules() if hasattr(module, "down_proj") and hasattr(module, "is_transposed")
    )
    for key in ("gate_up_proj", "down_proj"):
        whole = layer.packed[key].weight.dequantize().view(layer.num_experts, -1, layer.packed[key].in_features)
        getattr(experts, key).data = (whole.mT if experts.is_transposed else whole).contiguous()
    for key, module in model.named_modules():
        if isinstance(module, fastlora.NF4Linear) and "packed" not in key:
            bare.get_submodule(key).weight.data = module.weight.dequantize()
    results = []
    for kind in (torch.float32, torch.float64):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare).to(kind), tmp_path).to(kind)
        theirs.base_model.model.config._experts_implementation = "eager"
        results.append(logits(theirs))
    found = logits(model)
    assert_as_accurate(found, *results)
    save_adapter(model, tmp_path / "packed")
    assert torch.equal(logits(load_adapter(moe(name), tmp_path / "packed")), logits(plain))
    other = replace_linear(moe(name), **ALONE, quantize="nf4", double_quant=double_quant)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), found)
    moved = copy.deepcopy(model).to("meta")
    assert {buffer.device.type for buffer in layer_of(moved).buffers()} == {"meta"}
    with pytest.raises(ValueError, match="do not stay in NF4"):
        merge(model, quantize="nf4")
    torch.testing.assert_close(logits(merge(model)), found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_merged_it_is_the_models_own_class(name):
    model = ours(name, target_modules=["q_proj"])
    expected, kinds = logits(model), [type(module) for module in moe(name).modules()]
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    merged = merge(model)
    assert [type(module) for module in merged.modules()] == kinds
    assert {n: v.shape for n, v in merged.state_dict().items()} == {
        n: v.shape for n, v in moe(name).state_dict().items()
    }
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    one = merge(ours(name, target_parameters=["experts.down_proj"]), torch.bfloat16)
    experts = next(module for key, module in one.named_modules() if key.endswith("mlp.experts"))
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.bfloat16}
    broken = ours(name)
    layer_of(broken).adapter("down_proj")[1].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="would not be finite after merging"):
        merge(broken)


def two_layers():
    config = copy.deepcopy(moe().config)
    config.num_hidden_layers = 2
    return type(moe())(config)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["layers.1.mlp.experts"]},
        {"exclude_modules": r".*\.1\.mlp\.experts"},
        {"exclude_modules": [f"layers.1.{name}" for name in BOTH] + ["k_proj"]},
        {"layers_to_transform": [0]},
    ],
)
@pytest.mark.parametrize("targets", [[], ["q_proj"]])
def test_what_is_left_out_gets_no_adapter(options, targets):
    model = replace_linear(two_layers(), **ALONE | {"target_modules": targets}, **options)
    adapted = [row.name for row in model.fastlora_report.rows if row.replaced and "experts" in row.name]
    assert adapted == [f"model.layers.0.{name}" for name in BOTH]


@pytest.mark.parametrize("options", [{"exclude_modules": ["mlp.experts"]}, {"layers_to_transform": [7]}])
def test_no_stack_left_is_an_error(options):
    model = two_layers()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"target_parameters=.*leaves no stack of experts to adapt"):
        replace_linear(model, **ALONE, **options)
    assert snapshot(model) == before


def test_a_file_of_pefts_has_the_stacks_that_its_config_leaves_out(tmp_path):
    config = {"exclude_modules": ["layers.1.mlp.experts"], "layers_to_transform": [0], "target_modules": ["q_proj"]}
    base = two_layers()
    theirs = randomize(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**ALONE | config)))
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(base, tmp_path)), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_line_says_that_all_linear_leaves_experts_out(name):
    """peft's all-linear takes the stacks and the router of some of these; here target_parameters does."""
    router = "router" if name == "gpt-oss" else "gate"
    said = "(not linear layers; experts are adapted by target_parameters)"
    report = replace_linear(moe(name), r=2).fastlora_report
    found = [
        f"1 x model.layers.*.mlp.{end}" for end in ("experts.gate_up_proj", "experts.down_proj", f"{router}.weight")
    ]
    assert f"; left without adapters: {', '.join(found)} {said}, running on" in report.summary()
    assert "\n" not in report.summary()
    every = replace_linear(moe(name), r=2, target_parameters=BOTH)
    assert f"; left without adapters: {found[2]} {said}" in fastlora.report(every).summary()
    with pytest.raises(ValueError, match=r"target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\] adapts"):
        replace_linear(moe(name), target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts', which is not a linear layer; experts are"):
        replace_linear(moe(name), target_modules=["experts"])
    assert "left without" not in replace_linear(llama(), r=2).fastlora_report.summary()


def test_training_and_the_report():
    model = ours("qwen3-moe", init_lora_weights=True, target_modules=["q_proj"])
    rows = {row.name: row for row in fastlora.report(model).rows}
    row = rows["model.layers.0.mlp.experts.down_proj"]
    assert (row.kind, row.shape, row.r, row.replaced) == ("Qwen3MoeExperts", (64, 32), 3, True)
    assert (row.reason, row.kernels) == ("adapters r=3 on 8 experts", "expert by expert")
    assert rows["model.layers.0.self_attn.q_proj"].replaced
    assert fastlora.report(model).left_out == ["model.layers.0.mlp.gate.weight"]
    one = replace_linear(moe(), r=2, target_modules=[], target_parameters=["experts.down_proj"], quantize="nf4")
    assert "model.layers.0.mlp.experts.gate_up_proj" in one.fastlora_report.left_out
    assert "model.layers.0.mlp.experts.down_proj" not in fastlora.report(one).left_out
    assert one.fastlora_report.rows[0].reason.endswith("weight quantized to NF4")
    assert one.fastlora_report.rows[0] == fastlora.report(one).rows[0]
    assert one.fastlora_report.rows[0].kernels
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 6
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_autocast_and_torch_compile():
    model = ours(dtype=torch.float32)
    layer = layer_of(model)
    x, chosen, weights, _ = routed(layer)
    given = x.float(), chosen, weights.float()
    expected = layer(*given)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*given)
    assert y.dtype == torch.float32
    assert 0 < (y - expected).norm() < 0.02 * expected.norm()
    model = ours(dtype=torch.bfloat16, r=8, adapter_dtype=torch.bfloat16)
    layer, given = layer_of(model), (x.bfloat16(), chosen, weights.bfloat16())
    with torch.no_grad():
        eager = layer(*given)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
    assert (compiled - eager).norm() < 0.01 * eager.norm()
    with pytest.raises(ValueError, match="was called with other arguments"):
        layer(x.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.donw_proj"]}, "'experts.donw_proj' matches no parameter; nearest: down_proj"),
        ({"target_parameters": "experts.down_proj"}, r"must be a list of names: pass \['experts.down_proj'\]"),
        (
            {"target_parameters": ["gate.weight"]},
            "gate.weight cannot be adapted: .* does not have transformers' interface",
        ),
        ({"lora_dropout": 0.1}, "lora_dropout does not go with target_parameters"),
        ({"init_lora_weights": "pissa"}, "'pissa' does not go with target_parameters: use one of True, False, 'gauss"),
        ({"quantize": "nf4", "blocksize": 4096}, "blocks of 4096 would cross from expert to expert"),
        ({"adapter_dtype": torch.bfloat16}, r"adapter_dtype must be torch\.float32 for .*; got torch\.bfloat16"),
        ({"rank_pattern": {"up_proj": 2}}, "'up_proj' fits none of the adapted layers; nearest"),
        ({"modules_to_save": ["mlp"]}, "is in target_parameters and in modules_to_save"),
        ({"target_parameters": None}, "leaves no layer to adapt"),
    ],
)
def test_a_refusal_changes_nothing(options, message):
    model = moe("qwen3-moe")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        replace_linear(model, **ALONE | options)
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_compute_in_fp32_on_purpose(dtype):
    """They are adapted where they are kept in fp32, and never packed."""
    holder, targets = fp32_on_purpose(dtype)
    options, before = {"target_modules": [], "target_parameters": targets, "r": 2}, snapshot(holder)
    with pytest.raises(ValueError, match="its forward computes in fp32 on purpose"):
        replace_linear(holder, **options, quantize="nf4")
    if dtype is torch.bfloat16:
        with pytest.raises(ValueError, match=r"and the stack is in torch\.bfloat16: load the model in fp32"):
            replace_linear(holder, **options)
    assert snapshot(holder) == before
    if dtype is torch.float32:
        given = [t.to(dtype) if t.is_floating_point() else t for t in routed(holder.experts)[:3]]
        expected = holder.experts(*given)
        replace_linear(holder, **options)
        torch.testing.assert_close(holder.experts(*given), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_adapted_says_why(tmp_path):
    hooked, asked, dense = moe(), moe(), llama()
    hooked.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)
    asked.config._experts_implementation = "deepgemm"
    broken = moe()
    broken.model.layers[0].mlp.experts.down_proj.data[1, 2, 3] = float("inf")
    for model, options, message in (
        (hooked, {}, "hooks or a forward of their own"),
        (asked, {}, "experts_implementation=deepgemm is asked for"),
        (broken, {"quantize": "nf4"}, "down_proj holds NaN or inf"),
        (ours(), {}, "has fastlora's adapters already, in 1 layers such as 'model.layers.0.mlp.experts'"),
        (dense, {}, "matches no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_linear(model, **ALONE | options)
    save_adapter(ours(), tmp_path)
    with pytest.raises(ValueError, match="the model has none there"):
        load_adapter(replace_linear(moe(), target_modules=["q_proj"]), tmp_path)
    with pytest.raises(ValueError, match=r"experts\.lora_A\.weight has shape \[12, 128\] in the file, \[8, 128\]"):
        load_adapter(ours(r=2), tmp_path)
    with pytest.raises(ValueError, match="matches no parameter"):
        load_adapter(dense, tmp_path)
    for call in (load_adapter, save_adapter):
        with pytest.raises(ValueError, match=r"the model has no adapter 'other'; it has \['default'\]"):
            call(ours(), tmp_path, "other")
    save_adapter(replace_linear(moe(), target_modules=["q_proj"]), tmp_path / "linear")
    with pytest.raises(ValueError, match=r"experts\.lora_A\.weight is missing from the file"):
        load_adapter(ours(target_modules=["q_proj"]), tmp_path / "linear")


@pytest.mark.parametrize(("saved", "there"), [([1, 2], [5, 6]), ([1, 2], None), (None, [5, 6])])
def test_trained_tokens_of_a_file_are_those_of_the_model(saved, there, tmp_path):
    save_adapter(ours(trainable_token_indices=saved), tmp_path)
    model = replace_linear(moe(), **ALONE, trainable_token_indices=there)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"trainable_token_indices: the file trains (none|\{.*\[1, 2\]\}), the model"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_below_one_is_refused(r):
    base = next(module for module in moe().modules() if hasattr(module, "is_transposed"))
    with pytest.raises(ValueError, match="r must be at least 1"):
        LoRAExperts(base, {"down_proj": (r, 8)})
