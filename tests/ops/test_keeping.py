"""`keep_linears`: recomputation under a checkpoint takes the linears' outputs, and changes no bit."""

import gc
import threading
import weakref

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops import keeping, linear
from fastlora.ops.dora import dora_linear, row_norms
from fastlora.ops.linear import lora_linear, nf4_linear
from tests.support.linear_cases import SCALING, Case
from tests.support.models import bnb_llama, llama, randomize, tokens


@pytest.fixture
def computed(monkeypatch):
    """The linears computed, one entry each."""
    calls = []
    compute = linear._computed

    def counted(*args):
        if not torch.is_autocast_enabled("cpu"):  # under autocast it calls itself without
            calls.append(args)
        return compute(*args)

    monkeypatch.setattr(linear, "_computed", counted)
    return calls


def kept(block, *args):
    return checkpoint(block, *args, use_reentrant=False, context_fn=fastlora.keep_linears)


def gradients(y, leaves, seed=3):
    return torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y))


def check_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_checkpointed_block_multiplies_once_and_changes_no_bit(base, dtype, dropout, autocast, computed):
    case = Case(90, 64, 64, 4, dtype, torch.float32, base, bias=True)
    x, a, b, bias = leaves = case.leaves()

    def block(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = lora_linear(x.sin(), case.weight, a, b, SCALING, bias, dropout, training=True)
            return lora_linear(F.silu(y), case.weight, a, b, SCALING, None, dropout, training=True).float().cos()

    found = []
    for run in (block, kept):
        torch.manual_seed(5)
        computed.clear()
        y = block(x) if run is block else kept(block, x)
        found.append([y.detach(), *gradients(y, leaves)])
        assert len(computed) == 2
    check_equal(*found)


def test_dora_and_bare_nf4_linears_are_kept_too(computed):
    case = Case(40, 64, 64, 4, torch.float32, base="nf4")
    x, a, b = leaves = case.leaves()
    magnitude = torch.rand(64) + 1
    norms = row_norms(case.weight, a, b, SCALING)

    def block(x):
        y = F.silu(nf4_linear(x.sin(), case.weight))
        return F.silu(dora_linear(y, case.weight, a, b, SCALING, magnitude, norms))

    plain = gradients(block(x), leaves)
    computed.clear()
    check_equal(gradients(kept(block, x), leaves), plain)
    assert len(computed) == 2


def block_of(case, change=lambda y: y):
    """A block of one linear between sine and cosine, and its leaves; `change` is applied to what the linear returns."""
    x, a, b = leaves = case.leaves()
    return lambda x: change(lora_linear(x.sin(), case.weight, a, b, SCALING)).cos(), leaves, x


@pytest.mark.parametrize("change", [lambda y: y.add_(1), lambda y: y.mul_(2).view(-1), lambda y: y[:4].zero_()])
def test_an_output_changed_in_place_is_computed_again(change, computed):
    block, leaves, x = block_of(Case(40, 64, 64, 4, torch.float32), change)
    plain = gradients(block(x), leaves)
    computed.clear()
    check_equal(gradients(kept(block, x), leaves), plain)
    assert len(computed) == 2


def test_an_output_changed_in_place_behind_the_block_is_computed_again(computed):
    case = Case(40, 64, 64, 4, torch.float32)
    x, a, b = leaves = case.leaves()

    def block(x):
        return lora_linear(F.silu(lora_linear(x, case.weight, a, b, SCALING)), case.weight, a, b, SCALING)

    plain = gradients(block(x) * 2 + x, leaves)
    computed.clear()
    check_equal(gradients(kept(block, x).mul_(2).add_(x), leaves), plain)
    assert len(computed) == 3


def test_a_second_backward_computes_again(computed):
    block, leaves, x = block_of(Case(40, 64, 64, 4, torch.float32))
    y = kept(block, x)
    once, twice = (torch.autograd.grad(y.sum(), leaves, retain_graph=again) for again in (True, False))
    check_equal(once, twice)
    assert len(computed) == 2


def test_another_way_through_the_block_computes_all_that_follows(computed):
    case = Case(40, 64, 64, 4, torch.float32)
    narrow = Case(40, 64, 48, 4, torch.float32)
    x, a, b = leaves = case.leaves()
    _, a2, b2 = narrow.leaves(requires_grad=False)
    ways = iter([False, True])

    def block(x):
        if next(ways):  # only in recomputation: it leaves the tensors that are saved as they are
            with torch.no_grad():
                lora_linear(x, narrow.weight, a2, b2, SCALING)
        return lora_linear(x.sin(), case.weight, a, b, SCALING).cos()

    y = kept(block, x)
    found = gradients(y, leaves)
    ways = iter([False])
    check_equal(found, gradients(block(x), leaves))
    assert len(computed) == 4


def test_checkpoints_within_checkpoints(computed):
    case = Case(40, 64, 64, 4, torch.float32)
    x, a, b = leaves = case.leaves()

    def inner(x):
        return lora_linear(x.sin(), case.weight, a, b, SCALING).cos()

    def outer(x):
        return kept(inner, lora_linear(x, case.weight, a, b, SCALING).sin())

    plain = gradients(inner(lora_linear(x, case.weight, a, b, SCALING).sin()), leaves)
    computed.clear()
    check_equal(gradients(kept(outer, x), leaves), plain)
    assert len(computed) == 2


def test_what_was_kept_is_freed_by_backward_and_with_the_graph():
    case = Case(40, 64, 64, 4, torch.float32)
    x, a, b = leaves = case.leaves()
    seen = []

    def block(x):
        y = lora_linear(x.sin(), case.weight, a, b, SCALING)
        seen.append(weakref.ref(y.untyped_storage()))
        return y.cos()

    alive = []
    for backward in (True, False):
        seen.clear()
        y = kept(block, x)
        if backward:
            gradients(y, leaves)
        del y
        gc.collect()
        alive.append([ref() for ref in seen])
    assert alive == [[None, None], [None]]


def test_an_error_in_the_block_leaves_nothing_behind():
    def block(x):
        raise RuntimeError("of the block")

    with pytest.raises(RuntimeError, match="of the block"):
        kept(block, torch.ones(3, requires_grad=True))
    assert keeping.keeper() is None


def test_each_thread_keeps_its_own(computed):
    case = Case(40, 64, 64, 4, torch.float32)
    block, leaves, x = block_of(case)
    want = gradients(block(x), leaves)
    found: list = []
    barrier = threading.Barrier(4)

    def work():
        mine, own, start = block_of(case)
        barrier.wait()
        y = kept(mine, start)
        barrier.wait()
        found.append(gradients(y, own))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for got in found:
        check_equal(got, want)
    assert len(computed) == 1 + 4


def test_a_reentrant_checkpoint_says_that_it_cannot():
    block, _, x = block_of(Case(40, 64, 64, 4, torch.float32))
    with pytest.raises(ValueError, match="context_fn"):
        checkpoint(block, x, use_reentrant=True, context_fn=fastlora.keep_linears)


@pytest.mark.parametrize("way", ["plain", "nf4", "peft", "bitsandbytes"])
def test_a_model_checkpoints_with_it(way, computed):
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    if way in ("peft", "bitsandbytes"):
        peft = pytest.importorskip("peft")
        pytest.importorskip("bitsandbytes")
        model = peft.get_peft_model(bnb_llama() if way == "bitsandbytes" else llama(), peft.LoraConfig(**options))
        fastlora.replace_linear(model)
    else:
        model = fastlora.replace_linear(llama(), **options, quantize="nf4" if way == "nf4" else None)
    randomize(model)
    model.train()
    model.enable_input_require_grads()
    linears = sum(1 for module in model.modules() if hasattr(module, "lora_A"))

    def step(**options):
        if options:
            model.gradient_checkpointing_enable({"use_reentrant": False, **options})
        torch.manual_seed(3)
        computed.clear()
        model(tokens(), labels=tokens()).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    plain = step()
    assert len(computed) == linears
    check_equal(step(context_fn=fastlora.keep_linears), plain)
    assert len(computed) == linears
    check_equal(step(context_fn=torch.utils.checkpoint.noop_context_fn), plain)
    assert len(computed) > linears


@pytest.mark.parametrize("way", ["compiled inside", "compiled outside"])
def test_under_compile_it_keeps_too(way, computed):
    torch._dynamo.reset()
    block, leaves, x = block_of(Case(40, 64, 64, 4, torch.float32))
    want = gradients(block(x), leaves)
    compiled = torch.compile(block, backend="aot_eager")
    y = (
        kept(compiled, x)
        if way == "compiled inside"
        else torch.compile(lambda x: kept(block, x), backend="aot_eager")(x)
    )
    for got, expected in zip(gradients(y, leaves), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert len(computed) == 2


def test_trainer_takes_it(tmp_path, computed):
    model = fastlora.replace_linear(llama(), r=4)
    options = {"use_reentrant": False, "context_fn": fastlora.keep_linears}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, gradient_checkpointing=True, gradient_checkpointing_kwargs=options,
        per_device_train_batch_size=2, report_to=[], use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens().repeat(2, 1)]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert len(computed) == 2 * sum(1 for module in model.modules() if hasattr(module, "lora_A"))


@pytest.fixture
def attended(monkeypatch):
    """The kernels of attention that ran, by name, where the keeper's mode saw them."""
    calls = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.name().partition(".")[0] in keeping._KERNELS:
                calls.append(operator.name())
            return operator(*args, **(kwargs or {}))

    with Seeing():
        yield calls


def attention_of(dropout=0.0, change=lambda y: y):
    """A block with attention as transformers' models call it, and its leaves."""
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(2, 4, 24, 16, generator=generator).requires_grad_() for _ in range(3)]
    module = torch.nn.Module().train()

    def block(q, k, v):
        attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        y, _ = attend(module, q.sin(), k, v, None, dropout=dropout, is_causal=True)
        return change(y).cos() * torch.rand(())

    return block, leaves


@pytest.mark.parametrize(("dropout", "times"), [(0.0, 1), (0.2, 0)])
def test_attention_is_kept_and_changes_no_bit(attended, dropout, times):
    fastlora.keep_linears()  # now the function has its name
    block, leaves = attention_of(dropout)
    found = []
    for run in (lambda: block(*leaves), lambda: kept(block, *leaves)):
        torch.manual_seed(3)
        attended.clear()
        found.append(gradients(run(), leaves))
        assert len(attended) == times  # with dropout torch has no kernel for a CPU
    check_equal(*found)
    attended.clear()
    gradients(checkpoint(block, *leaves, use_reentrant=False), leaves)
    assert len(attended) == 2 * times


@pytest.mark.parametrize("change", ["version", "key"])
def test_attention_that_is_another_in_recomputation_is_computed_again(change):
    recorder = keeping.keep_linears()[0]
    y = torch.ones(3)
    with recorder:
        assert recorder.call(("this",), lambda: (y, None))[0] is y
    if change == "version":
        y.add_(1)
    giver, other = keeping._Giver(recorder.taken), (torch.zeros(3), None)
    with giver:
        assert giver.call(("this" if change == "version" else "other",), lambda: other) is other
        assert giver.call(("this",), lambda: other) is other


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_model_attends_once_a_step(attended, fraction):
    fastlora.keep_linears()
    model = fastlora.replace_linear(llama(attn_implementation="sdpa"), r=4, lora_dropout=fraction).train()
    randomize(model)

    def step():
        torch.manual_seed(7)
        for p in model.parameters():
            p.grad = None
        attended.clear()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, layers = step(), model.config.num_hidden_layers
    assert len(attended) == layers
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": fastlora.keep_linears})
    check_equal(step(), plain)
    assert len(attended) == layers
