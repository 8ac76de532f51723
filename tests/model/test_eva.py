"""EVA without peft: ranks, A and scaling are those that peft finds in the same batches of the same model."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from fastlora.model import eva
from fastlora.model.replace import replace_linear
from fastlora.ops.nf4 import NF4Weight
from tests.support.eva_cases import batches, spread
from tests.support.models import bnb_llama, gpt2, llama, logits, qwen2, randomize, snapshot

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


def pefts(base, data, eva_config=None, **options):
    peft = pytest.importorskip("peft")
    eva_config = peft.EvaConfig(**(eva_config or {}))
    config = peft.LoraConfig(init_lora_weights="eva", eva_config=eva_config, **options)
    model = peft.get_peft_model(base, config)
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def assert_same_start(ours, theirs):
    """The same layers, ranks, scalings and A; returns their ranks."""
    mine = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    true = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert mine.keys() == true.keys()
    for name, layer in mine.items():
        other = true[name]
        assert (layer.r, layer.lora_alpha) == (other.r, other.lora_alpha), name
        assert layer.scaling == other.scaling, name
        a, b, _ = layer.adapter()
        torch.testing.assert_close(a, other.lora_A["default"].weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
        assert not b.any()
    return {name: layer.r["default"] for name, layer in mine.items()}


@pytest.mark.parametrize("base", [llama, qwen2])
@pytest.mark.parametrize(
    "eva_config", [{}, {"rho": 1.0}, {"rho": 1.5, "tau": 0.9, "adjust_scaling_factors": False, "use_label_mask": False}]
)
def test_ranks_and_vectors_are_pefts(base, eva_config):
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_rslora": True}
    theirs = pefts(spread(base()), batches(), eva_config, **options)
    ours = spread(base())
    expected = logits(ours.eval())
    replace_linear(ours, init_lora_weights="eva", eva_config=eva_config, eva_dataloader=batches(), **options)
    ranks = assert_same_start(ours, theirs)
    assert sum(ranks.values()) == 4 * 8
    assert (len(set(ranks.values())) == 1) is (eva_config.get("rho") == 1.0)
    assert torch.equal(logits(ours), expected)
    state = {name: value for name, value in randomize(theirs).named_parameters() if "lora_" in name}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(state[f"base_model.model.{name}"])
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-4, atol=1e-4)


def test_random_inputs_too():
    """Without a spectrum that falls off the vectors are those of a flat one, and still peft's."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    theirs = pefts(llama(), batches(masked=False), {"tau": 0.8}, **options)
    ours = replace_linear(
        llama(), init_lora_weights="eva", eva_config={"tau": 0.8}, eva_dataloader=batches(masked=False), **options
    )
    assert_same_start(ours, theirs)


def test_a_layer_may_get_no_rank(tmp_path):
    """Its row says so, it is quantized all the same, and the saved adapter leaves it out."""
    peft = pytest.importorskip("peft")
    eva_config = {"rho": 8.0, "tau": 0.5}
    options = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS}
    config = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**eva_config), **options)
    theirs = pefts(spread(llama()), batches(), eva_config, **options)
    ours = replace_linear(spread(llama()), config, eva_dataloader=batches())
    ranks = assert_same_start(ours, theirs)
    left = [row for row in ours.fastlora_report.rows if row.reason == "EVA gave it no rank"]
    assert len(left) == 8 - len(ranks) > 0
    assert not any(row.replaced for row in left)
    save_adapter(randomize(ours), tmp_path)
    loaded = peft.PeftModel.from_pretrained(spread(llama()), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(ours), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(load_adapter(spread(llama()), tmp_path)), logits(ours))
    packed = replace_linear(spread(llama()), config, eva_dataloader=batches(), quantize="nf4")
    assert isinstance(packed.get_submodule(left[0].name), NF4Linear)
    row = next(row for row in packed.fastlora_report.rows if row.name == left[0].name)
    assert (row.replaced, row.reason) == (True, "no adapter: EVA gave it no rank, weight quantized to NF4")


def test_an_adapter_that_peft_has_started_and_saved(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = randomize(pefts(spread(llama()), batches(), r=4, target_modules=TARGETS))
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs.eval())
    torch.testing.assert_close(logits(load_adapter(spread(llama()), tmp_path)), expected, rtol=1e-4, atol=1e-4)
    assert peft.LoraConfig.from_pretrained(tmp_path).init_lora_weights == "eva"


def test_whitened():
    """peft divides vectors that layers share once for each; these two share none."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]}
    theirs = pefts(spread(llama()), batches(), {"whiten": True}, **options)
    ours = replace_linear(
        spread(llama()), init_lora_weights="eva", eva_config={"whiten": True}, eva_dataloader=batches(), **options
    )
    assert_same_start(ours, theirs)
    shared = {"r": 4, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": "eva", "eva_dataloader": batches()}
    plain = replace_linear(spread(llama()), eva_config={"rho": 1}, **shared)
    white = replace_linear(spread(llama()), eva_config={"rho": 1, "whiten": True}, **shared)
    for name in ("q_proj", "k_proj"):
        a, b = (m.model.layers[0].self_attn.get_submodule(name).adapter()[0] for m in (plain, white))
        factors = b.norm(dim=1)
        torch.testing.assert_close(b, factors.unsqueeze(1) * a, rtol=1e-3, atol=1e-5)
        assert (factors.diff() >= 0).all(), "one over the root of the singular values, which fall"
        assert factors[-1] > 1.05 * factors[0]


def test_layers_in_4_bits():
    """The inputs are those that bitsandbytes' weights give; no layer is repacked by the run, as by peft's search."""
    ours, expanded = spread(bnb_llama()).eval(), spread(llama())
    packed = {name: module for name, module in ours.named_modules() if type(module).__name__ == "Linear4bit"}
    for name, module in packed.items():
        expanded.get_submodule(name).weight.data = NF4Weight.from_bnb(module.weight).dequantize()
    codes = {name: module.weight.detach().clone() for name, module in packed.items()}
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    theirs = pefts(expanded, batches(), **options)
    replace_linear(ours, init_lora_weights="eva", eva_dataloader=batches(), **options)
    assert assert_same_start(ours, theirs).keys() < packed.keys()
    assert all(torch.equal(module.weight, codes[name]) for name, module in packed.items())
    assert not any(module.training for module in packed.values())


def test_quantized_after_the_search():
    """With quantize the batches run through the weights as they were."""
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "eva", "eva_dataloader": batches()}
    plain, packed = (replace_linear(spread(llama()), quantize=quantize, **options) for quantize in (None, "nf4"))
    assert sum(isinstance(module, NF4Linear) for module in packed.modules()) == 14
    for name, layer in plain.named_modules():
        if isinstance(layer, LoRALinear):
            assert torch.equal(layer.adapter()[0], packed.get_submodule(name).adapter()[0])
            assert isinstance(packed.get_submodule(name).base_layer, NF4Linear)
    bare, expanded = spread(llama()), spread(llama())  # with layers that are NF4 already, and with their values
    for name, module in packed.named_modules():
        if isinstance(module, NF4Linear):
            bare.set_submodule(name.removesuffix(".base_layer"), module)
            expanded.get_submodule(name.removesuffix(".base_layer")).weight.data = module.weight.dequantize()
    again, true = replace_linear(bare, **options), replace_linear(expanded, **options)
    layers = {name: module for name, module in again.named_modules() if isinstance(module, LoRALinear)}
    assert layers.keys() == {name for name, module in true.named_modules() if isinstance(module, LoRALinear)}
    for name, layer in layers.items():
        torch.testing.assert_close(layer.adapter()[0], true.get_submodule(name).adapter()[0], rtol=1e-3, atol=1e-4)


def test_gpt2_and_a_bare_sequence():
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"]}
    torch.manual_seed(0)
    ours = spread(gpt2())
    theirs = pefts(copy.deepcopy(ours), batches(), {"tau": 0.9}, fan_in_fan_out=True, **options)
    replace_linear(ours, init_lora_weights="eva", eva_config={"tau": 0.9}, eva_dataloader=batches(), **options)
    assert_same_start(ours, theirs)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    data = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)) * 0.7 ** torch.arange(16)
    for given in (list(data), [(batch,) for batch in data]):
        started = replace_linear(
            nn.Sequential(*model), r=2, target_modules=["0"], init_lora_weights="eva", eva_dataloader=given
        )
        a = started[0].adapter()[0].detach()
        rows = data.flatten(0, 1)
        exact = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:2]
        torch.testing.assert_close((a @ exact.t()).abs(), torch.eye(2), rtol=0, atol=1e-3)


def test_a_layer_whose_inputs_never_vary_gets_no_rank():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    data = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    options = {"r": 2, "init_lora_weights": "eva", "eva_config": {"tau": 0.0}, "target_modules": ["0", "2"]}
    replace_linear(model, eva_dataloader=list(data), **options)
    assert model[0].r == {"default": 4}
    assert type(model[2]) is nn.Linear


class Routed(nn.Module):
    """Three experts, each with inputs of its own; one of them is wider."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(k, 8, bias=False) for k in (8, 8, 16))

    def forward(self, x, route):
        outputs = []
        for index, expert in enumerate(self.experts):
            turn = torch.randn(8, expert.in_features, generator=torch.Generator().manual_seed(index))
            outputs.append(expert(x[route == index] @ turn))
        return torch.cat(outputs)


@pytest.mark.parametrize("first", [(0,), (0, 1, 2)])
def test_experts_without_tokens_in_the_first_batch_share_no_start(first):
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(60, 8, generator=generator), "route": torch.tensor((chosen * 60)[:60])}
        for chosen in (first, (0, 1, 2), (2, 1, 0), (1, 2, 0))
    ]
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["0", "1", "2"], "eva_config": {"rho": 1.0, "tau": 0.0}}
    model = replace_linear(Routed(), init_lora_weights="eva", eva_dataloader=data, **options)
    starts = [expert.adapter()[0] for expert in model.experts]
    assert [a.shape[1] for a in starts] == [8, 8, 16]
    assert not torch.allclose(starts[0], starts[1], atol=0.1)
    assert not torch.allclose(starts[1], starts[2][:, :8], atol=0.1)


def test_the_same_numbers_in_another_shape_are_another_input():
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(16, 4)})
    model.forward = lambda x: (model["a"](x), model["b"](x.reshape(-1, 16)))
    found = eva._representatives(model, dict(model.items()), torch.ones(4, 8), eva.EvaConfig())
    assert found == {"a": "a", "b": "b"}


def test_the_incremental_svd_is_that_of_all_rows():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(600, 24, generator=generator, dtype=torch.float64) * 0.4 ** torch.arange(24) + 3
    svd, state = eva.IncrementalSVD("layer", 4, 0.99), torch.get_rng_state()
    for part in rows.float().split([100, 200, 3, 250, 47]):
        svd.update(part)
    kept = torch.cat([rows[:300], rows[303:]])
    _, singular, vectors = torch.linalg.svd(kept - kept.mean(0), full_matrices=False)
    torch.testing.assert_close((svd.components @ vectors[:4].t()).abs(), torch.eye(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(svd.singular, singular[:4], rtol=1e-4, atol=0)
    shares = singular[:4] ** 2 / (kept - kept.mean(0)).square().sum()
    torch.testing.assert_close(svd.explained, shares, rtol=1e-4, atol=0)
    assert (svd.rows, svd.largest) == (597, 250)
    assert torch.equal(torch.get_rng_state(), state)


class Once:
    def __iter__(self):
        return self

    def __next__(self):
        return batches()[0]


class Endless:
    """Batches without end, of which no more than a limit may be asked for in a row."""

    def __init__(self, rows, limit):
        self.rows, self.limit = rows, limit

    def __iter__(self):
        yield from (batch for _ in range(self.limit + 1) for batch in batches(1, self.rows))
        raise AssertionError("more batches than the limit were read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eva_dataloader": None}, "starts from data: pass eva_dataloader, a DataLoader or a list of batches"),
        ({"eva_dataloader": []}, "eva_dataloader is empty"),
        ({"eva_dataloader": Once()}, "is read more than once: pass a DataLoader or a list of batches, not a Once"),
        ({"eva_dataloader": batches()[0]}, "must be a DataLoader or a list of batches, not a dict"),
        ({"eva_dataloader": ["text"]}, "eva_dataloader gives a str"),
        ({"eva_dataloader": batches(rows=1)}, r"at least 16 positions in a batch \(rho \* r\) for .*q_proj.*more than"),
        ({"eva_config": {"rho": 9}}, r"rho \* r = 72 components in the inputs of .*q_proj, which have 64 features"),
        ({"eva_config": {"rho": 0.5}}, "rho must be at least 1"),
        ({"eva_config": {"tau": 1.5}}, "tau must be between 0 and 1"),
        ({"eva_config": {"ro": 2}}, "no option 'ro'; it has rho, tau"),
        ({"eva_config": {"use_label_mask": "no"}}, "use_label_mask must be True or False, not 'no'"),
        ({"eva_config": {"whiten": 1}}, "whiten must be True or False, not 1"),
        ({"eva_config": {"label_mask_value": 0.5}}, r"label_mask_value must be a whole number, not 0\.5"),
        ({"eva_config": 3}, "must be a mapping or an EvaConfig"),
        ({"init_lora_weights": True}, "eva_dataloader is for init_lora_weights='eva', not True"),
        ({"init_lora_weights": True, "eva_config": {}}, "eva_config is for init_lora_weights='eva'"),
    ],
)
def test_a_refusal_changes_nothing(options, message):
    model = llama().train()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        replace_linear(
            model, **{"r": 8, "init_lora_weights": "eva", "eva_dataloader": batches(), "lora_alpha": 8} | options
        )
    assert snapshot(model) == before
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_that_are_not_finite_and_searches_without_end(monkeypatch):
    model = llama()
    model.model.embed_tokens.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"the inputs of model\.layers\.0\.self_attn\.q_proj hold NaN or inf"):
        replace_linear(model, init_lora_weights="eva", eva_dataloader=batches(), r=4)
    monkeypatch.setattr(eva, "MAX_BATCHES", 8)
    monkeypatch.setattr(eva, "MAX_PASSES", 2)
    with pytest.raises(ValueError, match=r"not converged in 8 batches; .* have not: lower tau=1\.0"):
        replace_linear(llama(), init_lora_weights="eva", eva_dataloader=batches(), eva_config={"tau": 1.0}, r=4)
    monkeypatch.setattr(eva, "MAX_FRESH", 12)
    for rows, limit, message in ((1, 8, "none of 8 batches has more than"), (6, 12, "in 12 batches")):
        data = Endless(rows, limit)
        with pytest.raises(ValueError, match=message):
            replace_linear(llama(), init_lora_weights="eva", eva_dataloader=data, eva_config={"tau": 1.0}, r=16)
    with pytest.raises(ValueError, match="one layer does not"):
        LoRALinear(nn.Linear(8, 8), r=2, init_lora_weights="eva")


@pytest.mark.parametrize("base", [llama, bnb_llama])
def test_pefts_own_start_on_a_model_sped_up_before(base):
    """peft's search runs with the adapters off, so with peft's forward; the layers are sped up afterwards."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}
    found = []
    for sped_up in (False, True):
        model = spread(base())
        model.is_loaded_in_4bit = base is bnb_llama
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        if sped_up:
            fastlora.replace_linear(model)
        peft.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
        found.append(randomize(model).train())
    plain, sped_up = found
    a, b = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in found)
    assert {name: p.shape for name, p in a.items()} == {name: p.shape for name, p in b.items()}
    torch.testing.assert_close(logits(sped_up), logits(plain), rtol=1e-4, atol=1e-4)
    layers = [module for module in sped_up.modules() if hasattr(module, "fastlora_calls")]
    assert len(layers) == len(a) // 2
    repacked = "bitsandbytes has repacked the base weight for CPU inference"  # by peft's search, in eval mode
    for calls in (layer.fastlora_calls for layer in layers):
        assert calls.sped_up == 1 or (base is bnb_llama and calls.last_reason == repacked), calls
