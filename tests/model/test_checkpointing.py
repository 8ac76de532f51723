"""`checkpoint_layers`: gradients stay the same, and what a policy holds is what was counted."""

import pytest
import torch

import fastlora
from fastlora.model import checkpointing
from fastlora.model.checkpointing import Counted, checkpoint_layers, plan
from fastlora.ops import offload
from fastlora.training import graphed_step
from tests.support.models import llama, qwen2, randomize, tokens

MIB = 2**20


def model_of(sped_up=True, **options):
    model = randomize(fastlora.replace_linear(llama(num_hidden_layers=4), r=4, **options)).train()
    return fastlora.speed_up(model) if sped_up else model


def gradients(model):
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def policies(model):
    """Of each layer, as the model has it."""
    found = []
    for layer in model.model.layers:
        context = layer._gradient_checkpointing_func.keywords.get("context_fn")
        found.append("none" if not layer.gradient_checkpointing else "selective" if context else "full")
    return found


def test_more_memory_recomputes_less():
    counted, seen = Counted([100] * 3, [30] * 3, 10), []
    for memory in range(0, 600, 10):
        kinds, needed = plan(counted, 50, 1, memory)
        least = 50 + 3 * 10 + 2 * 100
        each = {"full": 0, "selective": 30, "none": 90}
        assert needed == least + sum(each[kind] for kind in kinds)
        assert needed <= max(memory, least)
        rank = [("full", "selective", "none").index(kind) for kind in kinds]
        assert rank == sorted(rank), "the last layers hold most"
        seen.append(sum(rank))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 6)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_policy_gives_the_same_gradients(quantize):
    model = model_of(quantize=quantize)
    expected, seen = gradients(model), set()
    fixed = checkpointing._fixed(model, 24)
    for policy, memory in (
        ("full", None), ("selective", None), ("none", None), ("auto", None), ("auto", 1),
        *(("auto", fixed + share * MIB // 8) for share in range(1, 12)),
    ):  # fmt: skip
        chosen = checkpoint_layers(model, policy, tokens=24, memory=memory)
        found = policies(model)
        assert [found.count(kind) for kind in ("full", "selective", "none")] == list(chosen[:3])
        seen.add(tuple(found))
        for got, want in zip(gradients(model), expected, strict=True):
            assert torch.equal(got, want)
    assert len(seen) >= 5
    assert ("full",) * 4 in seen
    assert ("none",) * 4 in seen


@pytest.mark.parametrize("make", [model_of, lambda: model_of(sped_up=False), lambda: model_of(lora_dropout=0.1), qwen2])
def test_what_is_counted_is_what_backward_holds(make):
    model = make().train()
    layers = checkpointing._layers(model)
    counted = checkpointing.count_bytes(model, layers)
    ids = torch.randint(0, 60, (3, 40))
    held, parameters = {}, {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def watch(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = [None]
    layers[0].register_forward_pre_hook(lambda module, args: inputs.__setitem__(0, args[0]))
    model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_() if y.is_leaf else y)
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda t: t):
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert out.requires_grad
    assert sum(counted.none) * ids.numel() == pytest.approx(sum(held.values()), rel=0.1)
    assert all(0 <= linears < none for linears, none in zip(counted.linears, counted.none, strict=True))
    assert counted.input == 64 * 4


def test_what_linears_and_attention_return_is_counted_once():
    model = model_of()
    counted = checkpointing.count_bytes(model, checkpointing._layers(model))
    layer = model.model.layers[0]
    widths = [m.out_features for m in layer.modules() if isinstance(m, fastlora.LoRALinear)]
    config = model.config
    values, ranks = 4 * sum(widths), 4 * 4 * len(widths)
    attention = 4 * (config.hidden_size + config.num_attention_heads)  # its output, and a number a head
    assert values + attention <= counted.linears[0] <= values + attention + ranks


def test_counting_leaves_no_trace():
    model = model_of(lora_dropout=0.1).eval()
    model.model.layers[1].train()
    state = torch.get_rng_state()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    checkpointing.count_bytes(model, checkpointing._layers(model))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    for name, members in before.items():
        assert members.keys() - {"gradient_checkpointing"} == after[name].keys() - {"gradient_checkpointing"}
        assert not after[name]["_forward_hooks"]
        assert not after[name]["_forward_pre_hooks"]
        assert members["training"] == after[name]["training"]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_dropout_holds_is_counted_in_evaluation_mode_too():
    model = model_of(lora_dropout=0.1)
    layers = checkpointing._layers(model)
    counted = checkpointing.count_bytes(model.train(), layers)
    assert checkpointing.count_bytes(model.eval(), layers) == counted


def test_bad_calls_change_nothing():
    model = model_of()
    for call, message in (
        (lambda: checkpoint_layers(model, "most"), "policy must be one of min, full, selective, none, auto"),
        (lambda: checkpoint_layers(model), "needs the tokens of a micro-batch"),
        (
            lambda: checkpoint_layers(torch.nn.Linear(2, 2), "full"),
            "Linear has no layers that can be checkpointed one by one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_model_with_one_switch_for_all_keeps_it(monkeypatch):
    model, given = model_of(), []
    monkeypatch.setattr(checkpointing, "_layers", lambda model: [])
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        monkeypatch.setattr(type(model), name, lambda self, **options: given.append(*options.values()), raising=False)
    assert str(checkpoint_layers(model, "selective")) == "as the model's own switch has it"
    checkpoint_layers(model, "full")
    assert given == [{"use_reentrant": False, "context_fn": fastlora.keep_linears}, {"use_reentrant": False}]
    with pytest.raises(ValueError, match="one by one"):
        checkpoint_layers(model, "auto", tokens=1)


def test_what_was_chosen_is_told():
    told = str(checkpoint_layers(model_of(), "auto", tokens=10**6, memory=10**6))
    assert told.startswith("4 layers recompute all; counted ")
    assert told.endswith("which is too little: use fewer tokens")
    assert str(checkpoint_layers(model_of(), "selective")) == "4 layers recompute all but linears and attention"
    assert str(checkpoint_layers(model_of(), "auto", tokens=1)).startswith("4 layers recompute nothing; counted 0.0")


def test_a_recorded_step_can_have_it(monkeypatch):
    model = model_of()
    checkpoint_layers(model, "selective")
    with graphed_step._no_random_states(model):
        for layer in model.model.layers:
            options = layer._gradient_checkpointing_func.keywords
            assert (options["preserve_rng_state"], options["context_fn"]) == (False, fastlora.keep_linears)


def test_min_is_full_without_kept_weights(monkeypatch):
    monkeypatch.setattr(checkpointing, "_on_cuda", lambda model: True)
    contexts = {}
    for policy in ("min", "full", "selective"):
        model = model_of()
        checkpoint_layers(model, policy)
        options = [layer._gradient_checkpointing_func.keywords for layer in checkpointing._layers(model)]
        contexts[policy] = {each.get("context_fn") for each in options}
    assert contexts == {"min": {None}, "full": {fastlora.keep_weights}, "selective": {fastlora.keep_linears}}


def test_inputs_that_wait_on_the_host_change_no_bit(monkeypatch):
    model = model_of()
    with pytest.raises(ValueError, match="from a CUDA device to the host"):
        checkpoint_layers(model, "full", offload=True)
    plain = gradients(model)
    waiting = []
    real = offload._Waiting.__init__
    monkeypatch.setattr(offload._Waiting, "__init__", lambda self, *args: [waiting.append(0), real(self, *args)][1])
    monkeypatch.setattr(checkpointing, "_on_cuda", lambda model: True)
    monkeypatch.setattr(checkpointing, "offloaded", lambda: offload.offloaded(least=1))
    for policy in ("min", "full", "selective"):
        checkpoint_layers(model, policy, offload=True)
        waiting.clear()
        for ours, theirs in zip(gradients(model), plain, strict=True):
            assert torch.equal(ours, theirs)
        assert len(waiting) == 4


def test_where_full_does_not_fit_its_kept_weights_go(monkeypatch):
    monkeypatch.setattr(checkpointing, "_on_cuda", lambda model: True)
    model = llama(num_hidden_layers=4)
    fastlora.replace_linear(model, r=4, quantize="nf4")
    kept = checkpointing._kept_weights(model)
    assert kept == 2 * sum(
        m.in_features * m.out_features for m in model.model.layers[0].modules() if hasattr(m, "codes")
    )
    little = checkpoint_layers(model, "auto", tokens=8, memory=1)
    contexts = {layer._gradient_checkpointing_func.keywords.get("context_fn") for layer in model.model.layers}
    assert contexts == {None}
    enough = int((little.needed + kept) / 0.95) + 100
    assert checkpoint_layers(model, "auto", tokens=8, memory=enough).needed == little.needed + kept
    contexts = {layer._gradient_checkpointing_func.keywords.get("context_fn") for layer in model.model.layers}
    assert contexts == {fastlora.keep_weights}
