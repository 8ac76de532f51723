"""`speed_up`: models of many families compute the same by fastlora's kernels, and can be taken back."""

import copy
import io
import statistics

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers import between
from tests.support.models import SIZES, llama, randomize, tokens, transformers
from tests.support.numerics import rms

pytest.importorskip("triton")
FAMILIES = {  # family: (more of its config, the parts sped up in a layer or in all)
    "Llama": ({}, {"norm": 5, "rotary": 2, "mlp": 2, "loss": 1}),
    "Mistral": ({}, {"norm": 5, "rotary": 2, "mlp": 2, "loss": 1}),
    "Qwen2": ({}, {"norm": 5, "rotary": 2, "mlp": 2, "loss": 1}),
    "Qwen3": ({"head_dim": 16}, {"norm": 9, "rotary": 2, "mlp": 2, "loss": 1}),
    "Gemma2": ({"head_dim": 16}, {"norm": 9, "rotary": 2, "mlp": 2, "loss": 1}),
    "Gemma3": ({"head_dim": 16}, {"norm": 13, "rotary": 2, "mlp": 2, "loss": 1}),
    "Phi3": ({"pad_token_id": 0, "partial_rotary_factor": 0.5}, {"norm": 5, "rotary": 2, "mlp": 2, "loss": 1}),
    "Mixtral": ({"num_local_experts": 2}, {"norm": 5, "rotary": 2, "loss": 1}),
    "Qwen3Moe": (
        {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        {"norm": 9, "rotary": 2, "loss": 1},
    ),
    "GptOss": ({"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, {"norm": 5, "rotary": 2, "loss": 1}),
    "Olmo2": ({}, {"norm": 9, "rotary": 2, "mlp": 2, "loss": 1}),
    "Cohere": ({}, {"mlp": 2, "loss": 1}),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    from fastlora.ops.backend import backend

    try:
        backend("cpu")
    except ValueError as error:
        pytest.skip(str(error))


def family(name, **options):
    torch.manual_seed(0)
    more, _ = FAMILIES[name]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    named = {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**SIZES, **named, **more, **options}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def step(model):
    """Logits, the loss, and the gradients of what is trained."""
    model.zero_grad()
    found = model(input_ids=tokens(), labels=tokens(), use_cache=False)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **gradients}


def count(model):
    found: dict[str, int] = {}
    for module in model.modules():
        for part in between.parts_of(module):
            found[part] = found.get(part, 0) + 1
    return found


def ran(monkeypatch):
    """The names of fastlora's operators between the linears, as they are called."""
    calls = []
    for operator, name in (
        (between.rms_norm, "rms_norm"), (between.rotary, "rotary"), (between.gated, "gated"),
        (between.causal_loss, "linear_cross_entropy"),
    ):  # fmt: skip
        function = getattr(operator, name)
        monkeypatch.setattr(operator, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_the_same(name, monkeypatch):
    model = family(name)
    plain = step(model)
    assert fastlora.speed_up(model) is model
    assert count(model) == FAMILIES[name][1]
    calls = ran(monkeypatch)
    ours = step(model)
    assert len(calls) == sum(FAMILIES[name][1].values())
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert rms(ours[key] - value) <= 1e-5 * rms(value) + 1e-9, key
    assert {row.part: row.sped_up for row in model.fastlora_report.parts} | dict.fromkeys(count(model), True) == {
        row.part: row.sped_up for row in model.fastlora_report.parts
    }


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3"])
def test_in_16_bits_it_is_no_further_from_fp32_and_in_the_same_dtypes(name):
    """Its distance over that of the plain code scatters by 4% with the values: the mean is held against its error."""
    shares = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        exact = family(name)
        for parameter in exact.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.4 * parameter.shape[1] ** -0.5, generator=generator)
        exact = exact.bfloat16().float()
        model = copy.deepcopy(exact).bfloat16()
        wanted, plain = step(exact), step(model)
        ours = step(fastlora.speed_up(model))
        assert all(ours[key].dtype is plain[key].dtype for key in wanted)
        off = [sum((rms(found[key] - v) / rms(v)) ** 2 for key, v in wanted.items()) ** 0.5 for found in (ours, plain)]
        shares.append(off[0] / off[1])
    assert statistics.mean(shares) <= 1 + 2 * statistics.stdev(shares) / len(shares) ** 0.5
    assert max(shares) <= 1.15


@pytest.mark.parametrize(("name", "expected"), [("Llama", torch.float32), ("Gemma3", torch.bfloat16)])
def test_a_norm_in_fp32_returns_the_dtype_that_its_own_code_does(name, expected):
    model = fastlora.speed_up(family(name))
    norm = next(module for module in model.modules() if "norm" in between.parts_of(module))
    x = torch.ones(2, norm.weight.numel(), dtype=torch.bfloat16)
    assert norm(x).dtype is type(norm).fastlora_plain.forward(norm, x).dtype is expected


def test_what_is_not_asked_for_keeps_its_code():
    model = fastlora.speed_up(family("Llama"), norm=False, mlp=False, loss=False)
    assert count(model) == {"rotary": 2}
    assert {row.reason for row in model.fastlora_report.parts if row.part != "rotary"} == {"not asked for"}
    assert count(fastlora.speed_up(model)) == FAMILIES["Llama"][1]
    assert all(row.sped_up for row in model.fastlora_report.parts)


@pytest.mark.parametrize("way", ["fastlora", "nf4", "peft"])
def test_adapted_models_and_back(way):
    model = family("Qwen3")
    if way == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    else:
        fastlora.replace_linear(model, r=4, quantize="nf4" if way == "nf4" else None)
    randomize(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    plain, states = step(model), set(model.state_dict())
    fastlora.speed_up(model)
    assert model.fastlora_report.replaced
    assert count(model) == FAMILIES["Qwen3"][1] | {"group": 4}
    assert set(model.state_dict()) == states
    for key, value in step(model).items():
        assert rms(value - plain[key]) <= 1e-4 * rms(plain[key]) + 1e-9, key
    assert "norm sped up in 9 of 9 modules" in fastlora.report(model).summary()
    fastlora.restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    for key, value in step(model).items():
        torch.testing.assert_close(value, plain[key])
    with pytest.raises(ValueError, match="sped up"):
        fastlora.restore(model)


def test_copies_pickles_and_adapters_put_on_later():
    peft = pytest.importorskip("peft")
    model = fastlora.speed_up(family("Phi3"))
    wanted = step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert count(other) == count(model)
        for key, value in step(other).items():
            assert torch.equal(value, wanted[key])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["norm"]))
    assert count(adapted)["norm"] == 2 * FAMILIES["Phi3"][1]["norm"]  # and the copies that are trained
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()


def test_generation_with_a_cache_is_the_same():
    model = family("Qwen3").eval()
    plain = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    assert torch.equal(fastlora.speed_up(model).generate(tokens(), max_new_tokens=5, do_sample=False), plain)


def test_compiled_models_run_their_own_code(monkeypatch):
    torch._dynamo.reset()
    model = fastlora.speed_up(llama(num_hidden_layers=1))
    expected, calls = model(tokens(), use_cache=False).logits, ran(monkeypatch)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert calls == []


def test_the_report_is_true_on_a_cpu(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "torch")
    model = fastlora.speed_up(family("Llama"))
    assert {(row.sped_up, row.reason) for row in model.fastlora_report.parts if row.part != "loss"} == {
        (False, "kernels for CUDA only: its own code runs on cpu")
    }


class Odd(nn.Module):
    """Norms and MLPs that are not what they look like."""

    def __init__(self) -> None:
        super().__init__()
        self.centred = Centred()
        self.clipped = Clipped(family("Llama").config)
        self.limited = Limited(family("Llama").config)
        self.dropping = Dropping(family("Llama").config)
        self.dropping_by_hand = DroppingByHand(family("Llama").config)
        self.hooked = nn.RMSNorm(8, eps=1e-6)
        self.hooked.forward = lambda x: x
        self.right = nn.RMSNorm(8, eps=1e-6)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


class Clipped(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


class Limited(transformers.models.llama.modeling_llama.LlamaMLP):
    """As gpt-oss limits what its experts multiply."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


class Dropping(transformers.models.llama.modeling_llama.LlamaMLP):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class DroppingByHand(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(y, 0.1, self.training))


def test_what_only_looks_like_a_part_is_left_and_named():
    model = fastlora.speed_up(Odd().eval())
    reasons = {row.name: row.reason for row in model.fastlora_report.parts}
    assert reasons["centred"] == "it computes something else than RMSNorm"
    for name in ("clipped", "limited", "dropping_by_hand"):
        assert reasons[name].startswith("it computes something else than act(gate) · up")
    assert reasons["dropping"] == "it has dropout of its own"
    assert reasons["hooked"] == "something has replaced this module's forward"
    assert count(model) == {"norm": 1}


def test_a_model_with_nothing_to_speed_up_is_refused():
    with pytest.raises(ValueError, match="no norms, rotary embedding, gated MLPs or causal loss"):
        fastlora.speed_up(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("act", "found"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")],
)
def test_activations_are_told_apart(act, found):
    mlp = family("Llama", hidden_act=act).model.layers[0].mlp
    assert between.facts_of(mlp, "mlp")[0] == found


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "gelu_10", "sigmoid"])
def test_other_activations_are_left(act):
    mlp = family("Llama", hidden_act=act).model.layers[0].mlp
    assert "something else" in between.facts_of(mlp, "mlp")


def test_a_model_in_fp64_stays_in_fp64():
    model = family("Qwen3").double()
    plain = step(model)
    for key, value in step(fastlora.speed_up(model, loss=False)).items():
        assert torch.equal(value, plain[key])
    for key, value in step(fastlora.speed_up(model)).items():  # transformers' loss is in fp32, and so is this one
        assert value.dtype is plain[key].dtype
        torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-7)


def test_a_part_that_another_library_has_derived_from_cannot_be_taken_back():
    model = fastlora.speed_up(family("Llama"))
    model.model.norm.__class__ = type("FSDPNorm", (type(model.model.norm),), {})
    before = count(model)
    with pytest.raises(ValueError, match="FSDP unit"):
        fastlora.restore(model)
    assert count(model) == before


def test_a_second_derivative_is_refused():
    model = fastlora.speed_up(family("Llama"))
    norm = model.model.norm
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(norm(x).sum(), x, create_graph=True)


def test_decorators_are_copied_along_with_the_function():
    def old():
        return "old"

    def new():
        return "new"

    namespace = {"old": old}
    exec("def inner(x, *, y=1):\n    return old(), x, y", namespace)

    def louder(function):
        import functools

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return *function(*args, **kwargs), "!"

        return wrapper

    decorated = louder(namespace["inner"])
    assert between.rebound(decorated, old, new)(3) == ("new", 3, 1, "!")
    assert decorated(3, y=2) == ("old", 3, 2, "!")
