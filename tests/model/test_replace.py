"""replace_linear on plain and bitsandbytes models: which layers, why, and that an error changes nothing."""

import copy
import io
import json
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model import replace
from fastlora.model.replace import replace_linear
from tests.support.models import PROJECTIONS, Own, bnb_llama, llama, qwen2, randomize, snapshot, tokens


@pytest.mark.parametrize("make", [llama, qwen2])
def test_all_linear_but_the_head(make):
    model = make()
    before = model(tokens()).logits
    assert replace_linear(model, r=4) is model
    replaced = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert len(replaced) == 14
    assert {name.rsplit(".", 1)[-1] for name in replaced} == set(PROJECTIONS)
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(model(tokens()).logits, before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{part}.default.weight" for name in replaced for part in "AB"}


def test_training_changes_the_adapters_and_nothing_else():
    model = replace_linear(llama(), r=4, quantize="nf4").train()
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"}),
        ({"target_modules": r".*layers\.1\..*(q|k)_proj"}, {"1.q_proj", "1.k_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {"1.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, {"0.q_proj"}),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, {"0.q_proj", "1.q_proj"}),
        ({"target_modules": ["self_attn.q_proj"], "exclude_modules": r".*\.0\..*"}, {"1.q_proj"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
)
def test_targets_are_pefts(options, expected):
    peft = pytest.importorskip("peft")
    model = replace_linear(llama(), r=4, **options)
    found = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    short = {name.replace("model.layers.", "").replace("self_attn.", "") for name in found}
    assert short == expected
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, **options), llama())
    assert found == {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.Linear)}


def test_rank_and_alpha_patterns():
    peft = pytest.importorskip("peft")
    options = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*q_proj": 6},
        "alpha_pattern": {"self_attn.k_proj": 32},
        "use_rslora": True,
    }
    model = replace_linear(llama(), **options)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear", **options), llama())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            other = theirs.get_submodule(name)
            assert (module.r, module.lora_alpha, module.scaling) == (other.r, other.lora_alpha, other.scaling), name
    with pytest.raises(ValueError, match=r"rank_pattern: 'z_proj' fits none of the adapted layers; nearest"):
        replace_linear(llama(), rank_pattern={"z_proj": 2})


def test_the_report_covers_every_linear_layer():
    model = llama()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: None)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    replace_linear(model, r=4, quantize="nf4", target_modules=["q_proj", "k_proj"], exclude_modules=["down_proj"])
    report = model.fastlora_report
    rows = {row.name: row for row in report.rows}
    assert rows.keys() == linear
    assert len(report.replaced) + len(report.left) == len(rows)
    assert "hooks" in rows["model.layers.0.self_attn.q_proj"].reason
    adapted = rows["model.layers.1.self_attn.q_proj"]
    assert (adapted.replaced, adapted.quantized, adapted.r, adapted.path) == (True, True, 4, "linear_cpu")
    assert "quantized to NF4" in adapted.reason
    other = rows["model.layers.1.mlp.up_proj"]
    assert (other.replaced, other.quantized, other.r) == (True, True, 0)
    assert "no adapter: not a target" in other.reason
    assert not rows["model.layers.1.mlp.down_proj"].replaced
    assert rows["lm_head"].reason == "output head, left alone"
    assert report.backend_reason
    assert json.loads(report.to_json())["rows"][0]["name"] in linear


def test_the_report_prints_layers_together(capsys):
    console = pytest.importorskip("rich.console")
    model = replace_linear(llama(), r=4)
    out = io.StringIO()
    model.fastlora_report.print(console.Console(file=out, width=160))
    shown = out.getvalue()
    assert "14 of 15 linear layers replaced" in shown
    assert "2 x ….self_attn.q_proj" in shown
    assert "… stands for model.layers.*" in shown
    assert "output head, left alone" in shown
    out.truncate(0)
    model.fastlora_report.print(console.Console(file=out, width=160), every_layer=True)
    assert "model.layers.1.self_attn.q_proj" in out.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj' matches no module; nearest: q_proj"),
        ({"target_modules": ["q_proj", "query"]}, r"'query' matches no module; nearest: "),
        ({"target_modules": "q_proj"}, r"pass \['q_proj'\]\); nearest: q_proj"),
        ({"target_modules": "q_proj("}, "not a regular expression"),
        ({"target_modules": ["mlp"]}, r"'model.layers.0.mlp', which is not a linear layer; linear layers in it: down_"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves no layer to adapt"),
        ({"target_modules": [3]}, "must hold strings"),
        ({"target_modules": 3}, "must be a string or a list"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 7}, "leaves no layer to adapt"),
        ({"exclude_modules": ["mpl"]}, "exclude_modules=.* matches no module"),
        ({"layers_to_transform": 1}, "layers_to_transform needs target_modules as a list"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be"),
        ({"rank_pattern": [1]}, r"rank_pattern must be a mapping of patterns .*, not \[1\]"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is not a regular expression: missing"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern: '\(' is not a regular expression: missing"),
        ({"alpha_pattern": {2: 3}}, "alpha_pattern must have strings as keys; got 2"),
        ({"init_lora_weights": "loftq", "loftq_config": 5}, "loftq_config must be a mapping or a LoftQConfig, not 5"),
        ({"quantize": "fp4"}, "quantize must be None or 'nf4'"),
        ({"quantize": "nf4", "blocksize": 48}, "blocksize must be one of"),
        ({"init_lora_weights": "eva"}, "starts from data: pass eva_dataloader"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}, "loftq_bits must be 4"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter must be a whole number"),
        ({"init_lora_weights": "loftq", "loftq_config": {"iter": 2}}, "no option 'iter'"),
        ({"loftq_config": {"loftq_iter": 2}}, "loftq_config is for init_lora_weights='loftq'"),
        ({"init_lora_weights": "corda"}, "'corda' is not supported.*let peft initialize"),
        ({"init_lora_weights": "pissa_niter_"}, "is not supported"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank; model.layers.0.self_attn.q_proj has r=3"),
        ({"init_lora_weights": "loftq"}, "makes up for quantization.*quantize='nf4'"),
        ({"init_lora_weights": "olora", "r": 33}, "needs r of at most 32"),
        ({"modules_to_save": "lm_head"}, r"must be a list of names: pass \['lm_head'\]"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no module; nearest: lm_head"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]}, "is in target_modules and in modules_to_save"),
        (
            {"adapter_dtype": torch.bfloat16},
            r"adapter_dtype must be torch\.float32 with this base; got torch\.bfloat16",
        ),
        ({"adapter_name": "a.b"}, "without dots"),
    ],
)
def test_a_refusal_changes_nothing(options, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        replace_linear(model, **options)
    assert snapshot(model) == before


def test_weights_that_cannot_be_quantized_are_refused_beforehand():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or inf"):
        replace_linear(model, quantize="nf4")
    assert snapshot(model) == before
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match="meta device"):
        replace_linear(model, quantize="nf4")


def test_running_out_of_memory_is_reported(monkeypatch):
    model = llama()
    original, calls = NF4Linear.from_linear, []

    def failing(linear, *options):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no memory")
        return original(linear, *options)

    monkeypatch.setattr(replace.NF4Linear, "from_linear", failing)
    with pytest.raises(RuntimeError, match="failed after 2 layers had been replaced; load the model again"):
        replace_linear(model, quantize="nf4")


def test_a_peft_model_takes_no_options():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    before = snapshot(model)
    for option in ({"r": 8}, {"blocksize": 32}, {"config": peft.LoraConfig()}):
        with pytest.raises(ValueError, match=rf"replace_linear\(model\) without {next(iter(option))}"):
            replace_linear(model, **option)
    assert snapshot(model) == before
    replace_linear(model, r=16, rank_pattern={}, adapter_name="default")  # the defaults


def test_called_twice():
    model = replace_linear(llama(), r=4)
    before = snapshot(model)
    with pytest.raises(ValueError, match="has fastlora's adapters already, in 14 layers"):
        replace_linear(model, r=4)
    assert snapshot(model) == before


def test_quantization_frees_each_weight_before_the_next(monkeypatch):
    model = llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    original, alive = NF4Linear.from_linear, []

    def watching(*arguments):
        alive.append(sum(weight() is not None for weight in weights))
        return original(*arguments)

    monkeypatch.setattr(replace.NF4Linear, "from_linear", watching)
    replace_linear(model, quantize="nf4", r=4)
    assert alive == list(range(14, 0, -1))
    assert not any(weight() is not None for weight in weights)


def test_quantized_model_computes_with_the_dequantized_weights():
    model, plain = replace_linear(qwen2(), r=4, quantize="nf4", blocksize=32, double_quant=False), qwen2()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            assert (module.weight.blocksize, module.weight.nested) == (32, False)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = module.weight.dequantize()
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


def test_tied_weights_stay_tied():
    model = replace_linear(
        llama(tie_word_embeddings=True), r=4, quantize="nf4", target_modules=[*PROJECTIONS, "lm_head"]
    )
    assert isinstance(model.lm_head, LoRALinear)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    row = next(row for row in model.fastlora_report.rows if row.name == "lm_head")
    assert not row.quantized
    assert "not quantized: its weight is shared with model.embed_tokens.weight" in row.reason
    model = replace_linear(llama(tie_word_embeddings=True), r=4, quantize="nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_used_in_two_places_is_replaced_in_both():
    linear = nn.Linear(32, 32)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    replace_linear(model, r=2, quantize="nf4", target_modules=["0"])
    assert isinstance(model[0], LoRALinear)
    assert model[0] is model[2]


def test_layers_that_are_left_alone_and_why():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x
    dispatched = nn.Linear(8, 8)
    dispatched._hf_hook = object()
    model = nn.ModuleDict(
        {
            "own": Own(8, 8),
            "parametrized": parametrized,
            "patched": patched,
            "dispatched": dispatched,
            "doubles": nn.Linear(8, 8).double(),
            "attention": nn.MultiheadAttention(8, 2),
            "good": nn.Linear(8, 8),
            "classifier": nn.Linear(8, 3),
        }
    )
    replace_linear(model, r=2)
    why = {row.name: row.reason for row in model.fastlora_report.left}
    assert why == {
        "own": "Own has a forward of its own",
        "parametrized": "parametrized: its weight is computed by other modules",
        "patched": "it has hooks or a forward of its own, which a LoRALinear would not run",
        "dispatched": "accelerate moves its inputs or weights (device_map over several devices): load the model on one "
        "device",
        "doubles": "its weight is torch.float64; fp32, bf16 or fp16 can be replaced",
        "attention.out_proj": "nn.MultiheadAttention reads this weight without calling the layer",
        "classifier": "output head, left alone",
    }
    assert [row.name for row in model.fastlora_report.replaced] == ["good"]


def test_a_head_of_several_layers_is_left_whole():
    head = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "classifier": head})
    replace_linear(model, r=2, quantize="nf4")
    assert isinstance(model["body"].base_layer, NF4Linear)
    assert [type(layer) for layer in model["classifier"]] == [nn.Linear, nn.Tanh, nn.Linear]
    assert {row.reason for row in model.fastlora_report.left} == {"output head, left alone"}
    with pytest.raises(ValueError, match="no linear layers except its output head"):
        replace_linear(nn.ModuleDict({"classifier": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match="target_modules is None, and peft has no default for model_type=None"):
        replace_linear(nn.Sequential(nn.Linear(4, 4)), target_modules=None)


def test_when_nothing_can_be_replaced_it_says_why():
    with pytest.raises(ValueError, match="none of the 2 targeted linear layers can be replaced: 2 x Own has a forward"):
        replace_linear(nn.ModuleDict({"one": Own(8, 8), "other": Own(8, 8)}))
    with pytest.raises(ValueError, match="'own' cannot be replaced: Own has a forward of its own"):
        replace_linear(nn.ModuleDict({"own": Own(8, 8), "good": nn.Linear(8, 8)}), target_modules=["own", "good"])
    with pytest.raises(ValueError, match=r"wrap it, as in nn\.Sequential"):
        replace_linear(nn.Linear(8, 8))


def test_bitsandbytes_layers_are_adopted():
    model = bnb_llama().train()
    before, codes = model(tokens()).logits, model.model.layers[0].mlp.up_proj.weight.data_ptr()
    replace_linear(model, r=4)
    layer = model.model.layers[0].mlp.up_proj
    assert layer._adopted.of(layer.base_layer).codes.data_ptr() == codes
    assert all("adopted" in row.reason and row.quantized for row in model.fastlora_report.replaced)
    torch.testing.assert_close(model(tokens()).logits, before)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, before)


def test_fp4_layers_are_left_alone():
    with pytest.raises(ValueError, match="14 x quant_type is 'fp4': load the model with bnb_4bit_quant_type='nf4'"):
        replace_linear(bnb_llama(quant_type="fp4"))


def test_peft_config_in_place_of_keywords():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = replace_linear(llama(), config, quantize="nf4")
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.r, layer.lora_alpha, layer.lora_dropout["default"].p) == ({"default": 3}, {"default": 5}, 0.1)
    model = replace_linear(llama(), peft.LoraConfig())
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert names == {"q_proj", "v_proj"}, "peft's default for Llama"
    model = replace_linear(llama(), peft.LoraConfig(inference_mode=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def unsupported_configs():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig
    return {
        "use_dora": lora(use_dora=True),
        "lora_bias": lora(lora_bias=True),
        "bias": lora(bias="lora_only"),
        "modules_to_save": lora(modules_to_save=["no such head"]),
        "alora_invocation_tokens": lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "layer_replication": lora(layer_replication=[(0, 2)]),
        "target_parameters": lora(target_parameters=["weight"]),
        "trainable_token_indices": lora(trainable_token_indices=[64]),
        "runtime_config": lora(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
        "use_qalora": lora(use_qalora=True),
        "megatron_config": lora(megatron_config={"a": 1}),
        "ensure_weight_tying": lora(ensure_weight_tying=True),
        "eva_dataloader": lora(init_lora_weights="eva"),
        "loftq_config": {"peft_type": "LORA", "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}},
        "task_type=SEQ_CLS": lora(task_type="SEQ_CLS"),
        "peft_type LORA": peft.IA3Config(),
    }


def test_unsupported_options_are_refused_by_name():
    for name, config in unsupported_configs().items():
        model = llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=name):
            replace_linear(model, config)
        assert snapshot(model) == before, name


def test_every_option_of_peft_is_either_taken_or_refused():
    """A field that a newer peft adds is refused once it is set, not ignored."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    config.option_of_the_future = {"on": True}
    with pytest.raises(ValueError, match="option_of_the_future"):
        replace_linear(llama(), config)
    with pytest.raises(ValueError, match="either config or r, not both"):
        replace_linear(llama(), peft.LoraConfig(target_modules=["q_proj"]), r=8)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_copies_and_state_dicts_of_a_model(quantize):
    model = randomize(replace_linear(qwen2(), r=4, quantize=quantize))
    expected = model(tokens()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(tokens()).logits, expected)
        assert other.fastlora_report.summary() == model.fastlora_report.summary()
    other = replace_linear(qwen2(), r=4, quantize=quantize)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens()).logits, expected)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_model_compiles_without_a_graph_break(quantize):
    torch._dynamo.reset()
    model = randomize(replace_linear(llama(num_hidden_layers=1), r=4, quantize=quantize))
    expected = model(tokens(), use_cache=False).logits
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_gradient_checkpointing_reaches_the_adapters(reentrant, before):
    def enable(model):
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
            {"use_reentrant": reentrant}
        )

    def gradients(checkpointing):
        model = llama()
        if checkpointing and before:
            enable(model)
        randomize(replace_linear(model, r=4)).train()
        if checkpointing and not before:
            enable(model)
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_report_says_what_is_true_now():
    model = llama()
    with pytest.raises(ValueError, match=r"call fastlora\.replace_linear"):
        fastlora.report(model)
    replace_linear(model, r=4, target_modules=["q_proj", "up_proj"], quantize="nf4")
    assert fastlora.report(model).to_json() == model.fastlora_report.to_json()
    layer = model.model.layers[0]
    layer.self_attn.q_proj = nn.Linear(64, 64)
    now = {row.name: row for row in fastlora.report(model).rows}
    assert now["model.layers.0.self_attn.q_proj"].reason == "removed since"
    assert not now["model.layers.0.self_attn.q_proj"].replaced
    assert sum(row.replaced for row in now.values()) == len(model.fastlora_report.replaced) - 1
    with pytest.raises(ValueError, match="no layer of peft's"):
        fastlora.restore(model)
