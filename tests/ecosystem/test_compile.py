"""`torch.compile` of whole models: one graph without a break, no recompilation per step, the eager numbers."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import fastlora
from tests.support.models import bnb_llama, llama, randomize, tokens
from tests.support.numerics import rms

peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")
STEPS = 3


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def small(**options):
    return llama(num_hidden_layers=1, **options)


def in_peft(base=small, **options):
    model = base()
    if base is bnb_llama:
        model.is_loaded_in_4bit, model.model.layers = True, model.model.layers[:1]
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})
    return randomize(peft.get_peft_model(model, config))


def in_nf4():
    return randomize(fastlora.replace_linear(small(), r=4, quantize="nf4"))


def step(model, optimizer, ids):
    optimizer.zero_grad()
    torch.manual_seed(7)  # of the dropout mask
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def adapters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def graphs():
    """How many graphs were compiled, each recompilation one more; none after a break."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


CASES = {
    "dropout": lambda: fastlora.replace_linear(in_peft(lora_dropout=0.2)),
    "bitsandbytes": lambda: fastlora.replace_linear(in_peft(bnb_llama, target_modules="all-linear")),
    "nf4": in_nf4,
    "dora": lambda: fastlora.replace_linear(in_peft(use_dora=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_one_graph_and_the_eager_numbers(case):
    eager = CASES[case]().train()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    one, other = (torch.optim.SGD(adapters(each), lr=0.5) for each in (model, eager))
    for _ in range(STEPS):
        torch.testing.assert_close(step(compiled, one, tokens()), step(eager, other, tokens()))
    for ours, expected in zip(adapters(model), adapters(eager), strict=True):
        torch.testing.assert_close(ours, expected)
    assert graphs() == 1


def test_the_length_of_the_sequence_may_vary():
    eager = fastlora.replace_linear(in_peft()).train()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    one, other = (torch.optim.SGD(adapters(each), lr=0.5) for each in (model, eager))
    for length in (12, 9, 31, 12):
        ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
        torch._dynamo.mark_dynamic(ids, 1)
        torch.testing.assert_close(step(compiled, one, ids), step(eager, other, ids))
    assert graphs() == 1


def test_inductor():
    """`torch.compile`'s default takes the operator as an opaque call; one layer, for compiling C++ takes long."""
    model = fastlora.replace_linear(in_peft()).eval()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x)
        found = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    assert graphs() == 1


def test_adapters_are_swapped_without_recompiling(tmp_path):
    """peft's hot-swap into a compiled model: other weights, another rank and scaling, the same graph."""
    for name, options in (("one", {"r": 4, "lora_alpha": 8}), ("two", {"r": 6, "lora_alpha": 3})):
        torch.manual_seed(5)
        adapted = in_peft(**options)
        for parameter in adapters(adapted):
            torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(tmp_path / name)
    expected = {
        name: peft.PeftModel.from_pretrained(small(), tmp_path / name).eval()(tokens(), use_cache=False).logits
        for name in ("one", "two")
    }
    model = peft.PeftModel.from_pretrained(small(), tmp_path / "one")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    fastlora.replace_linear(model).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("one", "two", "one"):
        hotswap.hotswap_adapter(model, tmp_path / name, adapter_name="default")
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected[name])
    assert graphs() == 1
    assert all(row.calls.stepped_back == 0 for row in model.fastlora_report.replaced)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(), use_cache=False).logits, expected["one"])
    assert all(row.calls.sped_up == 1 and row.calls.stepped_back == 0 for row in model.fastlora_report.replaced)


@pytest.mark.parametrize("context", [None, "keep_linears"])
def test_blocks_compile_without_a_break_and_for_all_lengths(context, monkeypatch):
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="aot_eager", **options))
    model = fastlora.speed_up(randomize(fastlora.replace_linear(llama(num_hidden_layers=3), r=4, quantize="nf4")))
    model.train()
    lengths = [tokens().repeat(1, 3)[:, :length] for length in (24, 40, 33, 17)]

    def losses():
        found = []
        for ids in lengths:
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        return found

    if context:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_linears})
    expected, states = losses(), set(model.state_dict())
    fastlora.speed_up(model, compile=True)
    for ours, theirs in zip(losses(), expected, strict=True):
        for got, want in zip(ours, theirs, strict=True):
            assert rms(got - want) <= 1e-5 * rms(want)
    assert graphs() <= 2  # one for blocks after the first, whose input needs no gradient
    assert [row.sped_up for row in fastlora.report(model).parts if row.part == "compile"] == [True] * 3
    assert set(model.state_dict()) == states
    other = copy.deepcopy(model)
    assert [row.reason for row in fastlora.report(other).parts if row.part == "compile"] == ["taken back since"] * 3
    fastlora.restore(model)
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    with pytest.raises(ValueError, match="no blocks"):
        fastlora.speed_up(torch.nn.RMSNorm(8, eps=1e-6), compile=True)
