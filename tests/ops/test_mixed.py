"""A batch whose samples have different adapters: peft's results, forward and backward, and peft's refusals."""

import pytest
import torch
from fastlora.kernels.operands import Lora

from fastlora.model.replace import replace_linear
from fastlora.ops import mixed, nf4
from tests.support.models import bnb_llama, llama, qwen2, randomize
from tests.support.peft_models import counts, wrapped

peft = pytest.importorskip("peft")
BATCH = torch.randint(0, 64, (5, 7), generator=torch.Generator().manual_seed(9))
NAMES = ["default", "other", "__base__", "default", "other"]


def _with_other(model, **options):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], **options))
    return randomize(model)


@pytest.mark.parametrize("base", [llama, qwen2, bnb_llama])
def test_mixed_batches(base, monkeypatch):
    """Whole models, with layers that have both adapters, one of them, or none of a sample's."""
    plain, model = (_with_other(wrapped(base)).eval() for _ in range(2))
    replace_linear(model)
    for module in (*plain.modules(), *model.modules()):
        module.training = type(module).__name__ == "Linear4bit"  # in eval mode bitsandbytes repacks it, and loses bits
    expected = []
    for tokens_, names, few in ((BATCH, NAMES, 0), (BATCH[:, :1], NAMES, 100), (BATCH[:2], ["other", "other"], 0)):
        monkeypatch.setitem(mixed.SIDE_BY_SIDE_UP_TO, "cpu", few)
        expected.append(plain(tokens_, adapter_names=names).logits)
        torch.testing.assert_close(model(tokens_, adapter_names=names).logits, expected[-1], rtol=1e-4, atol=1e-5)
    assert counts(model) == (24, 0), "8 layers, 3 calls"
    torch.testing.assert_close(model(BATCH[2:3]).logits, plain(BATCH[2:3]).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0][2:3], plain(BATCH[2:3]).logits, atol=1e-3), "a base row has no update"


def test_mixed_batches_are_trained():
    """peft refuses adapter_names in training for a PeftModel as a whole; its layers and ours take them."""
    plain, model = (_with_other(wrapped(lora_dropout=0.0)).train() for _ in range(2))
    replace_linear(model)
    found = []
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1))
    for each in (plain, model):
        layer = each.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        given = x.clone().requires_grad_()
        y = layer(given, adapter_names=NAMES)
        found.append(
            [y.detach(), *torch.autograd.grad(y, [given, *trained], torch.cos(torch.arange(64.0)).expand_as(y))]
        )
    assert len(found[0]) == 6
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counts(model) == (1, 0)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model(BATCH, adapter_names=NAMES)


def test_dropout_in_a_mixed_batch_is_that_of_each_samples_adapter():
    plain, model = (wrapped(lora_dropout=0.5).train() for _ in range(2))
    replace_linear(model)
    x, names = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1)), ["default", "__base__"] * 2
    found = []
    for each in (plain, model):
        torch.manual_seed(5)
        found.append(each.base_model.model.model.layers[0].self_attn.q_proj(x, adapter_names=names))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    quiet = plain.eval().base_model.model.model.layers[0].self_attn.q_proj(x, adapter_names=names)
    assert torch.allclose(found[1][1::2], quiet[1::2], atol=1e-6), "rows without an adapter drop nothing"
    assert not torch.allclose(found[1][::2], quiet[::2], atol=1e-2)


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (_with_other, NAMES[:3], "Length of `adapter_names` should be the same as the number of inputs"),
        (_with_other, ["default", "odd", *NAMES[2:]], "Trying to infer with non-existing adapter"),
        (lambda model: _with_other(model, use_dora=True), NAMES, "Cannot pass `adapter_names` when DoRA is enabled"),
        (lambda model: _with_other(model).merge_adapter(), NAMES, "Cannot pass `adapter_names` when there are merged"),
    ],
)
def test_what_peft_refuses_in_mixed_batches_is_still_its_error(change, names, message):
    model = replace_linear(wrapped()).eval()
    change(model)
    with pytest.raises(ValueError, match=message):
        model(BATCH, adapter_names=names)


def test_mixed_batches_generate():
    plain, model = (_with_other(wrapped()).eval() for _ in range(2))
    replace_linear(model)
    options = {"adapter_names": NAMES, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(input_ids=BATCH, **options)
    assert torch.equal(model.generate(input_ids=BATCH, **options), expected)
    assert counts(model)[1] == 0
    beams = {**options, "num_beams": 2}
    assert torch.equal(model.generate(input_ids=BATCH, **beams), plain.generate(input_ids=BATCH, **beams))


def test_mixed_batches_after_inference_mode_can_be_trained():
    """Tensors kept for a batch in inference mode must not reach a graph."""
    model = replace_linear(_with_other(wrapped())).eval()
    with torch.inference_mode():
        model(BATCH, adapter_names=NAMES)
    model(BATCH, adapter_names=NAMES).logits.sum().backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_mixed_batch_compiles_without_a_graph_break(side_by_side, monkeypatch):
    monkeypatch.setitem(mixed.SIDE_BY_SIDE_UP_TO, "cpu", 1000 if side_by_side else 0)
    torch._dynamo.reset()
    model = replace_linear(_with_other(wrapped(lambda: llama(num_hidden_layers=1)))).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 3, 64)
    expected = layer(x, adapter_names=NAMES)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, adapter_names=NAMES), expected)


def test_a_name_for_each_sample():
    x, weight = torch.randn(3, 2, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="one adapter name for each sample: got 2 names for a batch of 3"):
        mixed.mixed_linear(x, weight, None, {}, ["a", "b"])


@pytest.mark.parametrize("rows", [3, 40, 700])
def test_kernels_read_an_nf4_weight_packed_where_rows_are_few(rows, monkeypatch):
    """Decoding, the fused dequantize-GEMM, and the expanded weight: each against separate products of the samples."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    from fastlora.ops import linear_cuda

    expanded, real = [], linear_cuda.dense
    monkeypatch.setattr(linear_cuda, "dense", lambda *args: expanded.append(1) or real(*args))
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    weight = nf4.quantize(draw(128, 128) / 12)
    values = weight.dequantize(torch.float32)
    adapters = {name: Lora(draw(4, 128) / 12, draw(128, 4) / 8, 0.5) for name in ("one", "two")}
    names = ["two", "none", "one"]
    x, dy = draw(3, rows, 128).requires_grad_(), draw(3, rows, 128)
    y = mixed.mixed_linear(x, weight, None, adapters, names)
    (dx,) = torch.autograd.grad(y, x, dy)
    for place, name in enumerate(names):
        merged = values
        if name in adapters:
            merged = values + 0.5 * adapters[name].b @ adapters[name].a
        torch.testing.assert_close(y[place], x[place] @ merged.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx[place], dy[place] @ merged, rtol=1e-4, atol=1e-4)
    assert len(expanded) == {3: 1, 40: 2, 700: 2}[rows]
