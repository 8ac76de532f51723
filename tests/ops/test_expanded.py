"""`expand_once` and `keep_weights`: weights that were expanded before are taken again, and change no bit."""

import gc
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops import dequantize, expanded
from fastlora.ops.linear import lora_linear, nf4_linear
from tests.support.linear_cases import SCALING, Case
from tests.support.models import llama, randomize, tokens


@pytest.fixture
def made(monkeypatch):
    """The expansions made, one entry each: whether in scratch."""
    calls = []
    expand = dequantize._dequantize

    def counted(*args, in_scratch):
        calls.append(in_scratch)
        return expand(*args, in_scratch=in_scratch)

    monkeypatch.setattr(dequantize, "_dequantize", counted)
    return calls


class Layer(nn.Module):
    """One linear over NF4, with as many tokens as merging needs."""

    def __init__(self, m=96, k=64, n=64, dropout=0.0, adapter=torch.float32, dtype=torch.float32, seed=0):
        super().__init__()
        case = Case(m, k, n, 4, dtype, adapter, "nf4", seed=seed)
        self.weight, self.dropout = case.weight, dropout
        self.a, self.b = nn.Parameter(case.lora_a), nn.Parameter(case.lora_b)
        self.x = case.x.requires_grad_()

    def forward(self, x):
        return lora_linear(x.sin(), self.weight, self.a, self.b, SCALING, None, self.dropout, training=True)

    def step(self, seed=0):
        """y and the gradients of one micro-batch."""
        torch.manual_seed(seed)
        y = self(self.x)
        return y.detach(), *torch.autograd.grad(y.cos().sum(), [self.x, self.a, self.b])


def check_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("dtype", "m"), [(torch.float32, 96), (torch.float16, 96), (torch.float32, 20)])
def test_micro_batches_share_one_expansion_and_change_no_bit(dropout, dtype, m, made):
    layer = Layer(m=m, dropout=dropout, dtype=dtype)
    made.clear()
    plain = [layer.step(seed) for seed in range(3)]
    assert len(made) == 6
    made.clear()
    with fastlora.expand_once() as store:
        kept = [layer.step(seed) for seed in range(3)]
        assert store.held == 64 * 64 * dtype.itemsize
    assert made == [False]
    assert store.held == len(store) == 0
    for ours, theirs in zip(kept, plain, strict=True):
        check_equal(ours, theirs)
    made.clear()
    check_equal(layer.step(0), plain[0])
    assert made == [True, True]


@pytest.mark.parametrize("change", ["update", "base", "another"])
def test_what_was_changed_is_expanded_again(change, made):
    layer, twin = Layer(), Layer(seed=1)
    made.clear()
    with fastlora.expand_once() as store:
        layer.step()
        with torch.no_grad():
            if change == "update":
                layer.b.add_(1.0)
            elif change == "base":
                layer.weight.absmax.add_(1)
            else:
                layer.a = nn.Parameter(twin.a.detach().clone())
        kept = layer.step()
        assert made == [False, False]
        assert len(store) == 1
    check_equal(kept, layer.step())


def test_an_optimizer_step_inside_is_seen(made):
    def losses():
        layer = Layer()
        optimizer = torch.optim.AdamW([layer.a, layer.b], lr=0.1, fused=True)
        found = []
        for _ in range(3):
            loss = layer(layer.x).cos().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return found

    plain = losses()
    with fastlora.expand_once():
        check_equal(losses(), plain)


def test_weights_beyond_the_limit_are_expanded_at_each_use(made):
    layers = [Layer(seed=seed) for seed in range(3)]
    plain = [layer.step() for layer in layers]
    made.clear()
    with fastlora.expand_once(memory=2 * 64 * 64 * 4 + 1) as store:
        for _ in range(2):
            for layer, theirs in zip(layers, plain, strict=True):
                check_equal(layer.step(), theirs)
        assert len(store) == 2
    assert len(made) == 2 + 4


def test_dtypes_and_scalings_are_told_apart(made):
    layer = Layer()
    x = layer.x.detach()
    with torch.no_grad():
        calls = [
            lambda: nf4_linear(x, layer.weight),
            lambda: lora_linear(x, layer.weight, layer.a, layer.b, SCALING),
            lambda: lora_linear(x, layer.weight, layer.a, layer.b, 2 * SCALING),
            lambda: nf4_linear(x.half(), layer.weight),
        ]
        plain = [call() for call in calls]
        made.clear()
        with fastlora.expand_once():
            for _ in range(2):
                check_equal([call() for call in calls], plain)
    assert len(made) == 4


def test_adapters_that_are_made_for_each_call_do_not_fill_the_store(made):
    layer = Layer()
    with fastlora.expand_once() as store:
        for _ in range(3):
            lora_linear(layer.x, layer.weight, layer.a.clone(), layer.b.clone(), SCALING)
        assert len(store) == 0


def test_one_context_at_a_time_and_none_left_behind_after_an_error():
    with pytest.raises(ValueError, match="memory must be 0 bytes or more"), fastlora.expand_once(-1):
        pass
    with fastlora.expand_once(), pytest.raises(RuntimeError, match="open already"), fastlora.expand_once():
        pass
    with pytest.raises(KeyError), fastlora.expand_once():
        raise KeyError
    with fastlora.expand_once():
        pass


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_backward_takes_what_recomputation_expanded(dropout, made):
    layers = [Layer(dropout=dropout, seed=seed) for seed in range(2)]
    leaves = [layers[0].x, *(p for layer in layers for p in layer.parameters())]

    def run(context):
        torch.manual_seed(4)
        x = layers[0].x
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, **context) if context is not None else layer(x)
        return torch.autograd.grad(x.cos().sum(), leaves)

    plain = run(None)
    made.clear()
    check_equal(run({}), plain)
    assert len(made) == 6
    made.clear()
    check_equal(run({"context_fn": fastlora.keep_weights}), plain)
    assert len(made) == 4
    assert expanded._recomputed() is None  # nothing outlives the graph


def test_a_weight_that_backward_does_not_want_is_given_back():
    layer = Layer()
    y = checkpoint(lambda x: layer(x.detach()), layer.x, use_reentrant=False, context_fn=fastlora.keep_weights)
    torch.autograd.grad(y.sum(), [layer.a, layer.b], retain_graph=True)
    assert len(expanded._recomputed().store) == 1
    del y
    gc.collect()
    assert expanded._recomputed() is None


def test_a_layer_called_twice_and_a_second_backward(made):
    layer = Layer()
    y = checkpoint(lambda x: layer(layer(x)), layer.x, use_reentrant=False, context_fn=fastlora.keep_weights)
    leaves = [layer.x, layer.a, layer.b]
    plain = torch.autograd.grad(layer(layer(layer.x)).sum(), leaves)
    for again in (True, False):
        check_equal(torch.autograd.grad(y.sum(), leaves, retain_graph=again), plain)


def test_threads_do_not_take_one_another_s_weights():
    layers = [Layer(seed=seed) for seed in range(4)]
    plain = [layer.step() for layer in layers]
    failures = []

    def work(layer, theirs):
        for _ in range(20):
            y = checkpoint(layer, layer.x, use_reentrant=False, context_fn=fastlora.keep_weights)
            found = torch.autograd.grad(y.cos().sum(), [layer.x, layer.a, layer.b])
            if not all(map(torch.equal, found, theirs[1:])):
                failures.append(layer)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, plain, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_both_together_over_a_model(made):
    model = fastlora.replace_linear(llama(), r=4, quantize="nf4")
    randomize(model)
    model.train()

    def gradients():
        for p in model.parameters():
            p.grad = None
        for seed in range(2):
            ids = tokens().roll(seed, 1)
            model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_weights})
    check_equal(gradients(), plain)
    with fastlora.expand_once():
        check_equal(gradients(), plain)


def test_a_trainer_takes_keep_weights(tmp_path):
    model = fastlora.replace_linear(llama(), r=4, quantize="nf4")
    rows = [{"input_ids": row, "labels": row} for row in tokens().repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": fastlora.keep_weights},
    )  # fmt: skip
    trained = transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert trained.training_loss > 0


def test_a_compiled_block_runs_with_it():
    layer = Layer()

    def block(x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=fastlora.keep_weights).cos().sum()

    leaves = [layer.x, layer.a, layer.b]
    plain = torch.autograd.grad(block(layer.x), leaves)
    compiled = torch.compile(block, backend="aot_eager")
    check_equal(torch.autograd.grad(compiled(layer.x), leaves), plain)
