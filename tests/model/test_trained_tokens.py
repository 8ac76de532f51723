"""trainable_token_indices: single rows trained, saved under peft's keys, opened by peft; tied weights stay tied."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.adapters.adapter import load_adapter, save_adapter
from fastlora.model.merging import merge
from fastlora.model.replace import replace_linear
from tests.support.models import gpt2, llama, logits, randomize, snapshot, tokens, trained

TOKENS = [int(tokens()[0, 0]), 63, int(tokens()[1, 3])]


def tied():
    return llama(tie_word_embeddings=True)


def adapted(base, **options):
    return randomize(replace_linear(base, r=4, target_modules=["q_proj"], **options))


CASES = [
    (llama, TOKENS),
    (llama, {"embed_tokens": TOKENS, "lm_head": [5, 2]}),
    (llama, {"lm_head": [5, 2]}),
    (tied, TOKENS),
    (tied, {"model.embed_tokens": TOKENS}),
]


@pytest.mark.parametrize(("base", "wanted"), CASES)
def test_trained_saved_and_opened_by_peft(base, wanted, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(base(), trainable_token_indices=wanted)
    torch.testing.assert_close(logits(model), logits(adapted(base())))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("trained_rows")}
    assert len(rows) == (2 if isinstance(wanted, dict) and len(wanted) == 2 else 1)
    expected = logits(trained(model))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(not torch.equal(parameters[name], value) for name, value in rows.items())
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), expected, rtol=1e-5, atol=1e-6)
    other = replace_linear(base(), r=4, target_modules=["q_proj"], trainable_token_indices=wanted)
    torch.testing.assert_close(logits(load_adapter(other, tmp_path)), expected, rtol=1e-5, atol=1e-6)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(base().state_dict())
    if base is tied:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize(("base", "wanted"), CASES)
def test_a_step_is_pefts(base, wanted):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], trainable_token_indices=wanted)
    theirs = randomize(peft.get_peft_model(base(), config))
    ours = adapted(base(), trainable_token_indices=wanted)
    found = []
    for model, end in ((theirs, "trainable_tokens_delta.default"), (ours, "trained_rows")):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append([loss.detach(), *[grad for name, grad in grads.items() if name.endswith(end)]])
        found[-1] += [grad for name, grad in grads.items() if "lora_" in name]
    assert len(found[0]) == len(found[1]) >= 6
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", [TOKENS, {"embed_tokens": TOKENS}])
def test_we_open_what_peft_saves(wanted, tmp_path):
    peft = pytest.importorskip("peft")
    for base in (llama, tied):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=wanted)
        theirs = trained(randomize(peft.get_peft_model(base(), config)))
        theirs.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), logits(theirs), rtol=1e-4, atol=1e-5)


def test_the_files_keys_and_order(tmp_path):
    model = adapted(tied(), trainable_token_indices=[9, 3])
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [9, 3]}
    found = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(found[key], tied().model.embed_tokens.weight[[9, 3]])
    assert [name for name in found if "lora_" not in name] == [key]


@pytest.mark.parametrize(("base", "wanted"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_reads_the_weight_gets_the_trained_rows_and_their_gradients(base, wanted, dtype):
    """As a loss does that multiplies by the head's weight and adds its bias itself."""
    model = trained(adapted(base().to(dtype), trainable_token_indices=wanted))
    rows = [p for name, p in model.named_parameters() if name.endswith("trained_rows")]
    found = []
    for fused in (True, False):
        hidden, head = model.model(tokens()).last_hidden_state, model.lm_head
        y = torch.nn.functional.linear(hidden, head.weight, head.bias) if fused else head(hidden)
        found.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), rows)])
    for one, other in zip(*found, strict=True):
        largest = other.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(one, other, rtol=0, atol=4 * torch.finfo(dtype).eps * largest)


def test_an_embedding_is_read_with_its_trained_rows():
    """As a tied head does that has no module of its own."""
    model = trained(adapted(llama(), trainable_token_indices=TOKENS))
    embedding = model.model.embed_tokens
    assert torch.equal(torch.nn.functional.embedding(tokens(), embedding.weight), embedding(tokens()))
    assert not hasattr(embedding, "bias")


def test_a_head_with_a_bias_and_gpt2():
    torch.manual_seed(0)
    head = nn.Linear(8, 6)
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": head})
    x = torch.randn(3, 8)
    expected = head(x)
    replace_linear(model, r=2, target_modules=["body"], trainable_token_indices={"lm_head": [4, 1]})
    torch.testing.assert_close(model["lm_head"](x), expected)
    model["lm_head"].trained_rows.data.zero_()
    found = model["lm_head"](x)
    torch.testing.assert_close(found[:, [4, 1]], head.bias[[4, 1]].expand(3, 2))
    torch.testing.assert_close(found[:, [0, 2, 3, 5]], expected[:, [0, 2, 3, 5]])
    model = gpt2().eval()
    expected = logits(model)
    replace_linear(model, r=4, trainable_token_indices=[1, 2])
    torch.testing.assert_close(logits(model), expected)
    assert model.lm_head.trained_rows is model.transformer.wte.trained_rows


def test_an_embedding_used_in_two_places():
    model = nn.ModuleDict({"one": nn.Embedding(8, 4), "body": nn.Linear(4, 4)})
    model["other"] = model["one"]
    replace_linear(model, r=2, target_modules=["body"], trainable_token_indices={"one": [5]})
    assert model["other"] is model["one"]
    model["one"].trained_rows.data.fill_(3)
    torch.testing.assert_close(merge(model)["other"](torch.tensor(5)), torch.full((4,), 3.0))
    assert model["other"] is model["one"]


def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = adapted(llama(num_hidden_layers=1, tie_word_embeddings=True), trainable_token_indices=TOKENS)
    expected = model(tokens(), use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [64]}, "64 is not a token; there are 64, from 0 on"),
        ({"trainable_token_indices": [-1]}, "-1 is not a token"),
        ({"trainable_token_indices": [1, 1]}, "must be a list of different tokens"),
        ({"trainable_token_indices": {"embed": [1]}}, "'embed' matches no modules; nearest: embed_tokens"),
        ({"trainable_token_indices": {"norm": [1]}}, "a LlamaRMSNorm has a forward of its own: use modules_to_save"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "'q_proj' matches 2 modules"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "leave it out of the other options"),
        ({"trainable_token_indices": [1], "target_modules": ["lm_head"]}, "lm_head has trained tokens"),
    ],
)
def test_a_refusal_changes_nothing(options, message):
    model = tied()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        replace_linear(model, **{"r": 4, "target_modules": ["q_proj"], **options})
    assert snapshot(model) == before


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    save_adapter(adapted(llama(), trainable_token_indices=[9, 3]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good, key = load_file(path), "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for base, message in (
        (adapted(llama()), r"the file trains {'model\.embed_tokens': \[9, 3\]}, the model none"),
        (adapted(llama(), trainable_token_indices=[3]), r"the model {'model\.embed_tokens': \[3\]}"),
    ):
        expected = logits(base)
        with pytest.raises(ValueError, match=message):
            load_adapter(base, tmp_path)
        assert torch.equal(logits(base), expected)
    for tensors, message in (
        ({**good, key: torch.ones(3, 64)}, r"shape \[3, 64\] in the file, \[2, 64\] in the model"),
        ({name: value for name, value in good.items() if name != key}, "is missing from the file"),
    ):
        save_file(tensors, path)
        model = llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert snapshot(model) == before


def t5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    return transformers.T5ForConditionalGeneration(config)


def test_rows_that_several_modules_share_are_saved_under_the_named_one(tmp_path):
    model = t5()
    with pytest.raises(ValueError, match=r"shares its weight with the input embedding: name shared"):
        replace_linear(model, r=4, target_modules=["q"], trainable_token_indices={"lm_head": [3, 5]})
    replace_linear(model, r=4, target_modules=["q"], trainable_token_indices={"shared": [3, 5]})
    shared = model.shared.trained_rows
    assert model.lm_head.trained_rows is model.encoder.embed_tokens.trained_rows is shared
    shared.data.add_(1)
    save_adapter(model, tmp_path)
    assert [key for key in load_file(tmp_path / "adapter_model.safetensors") if "token_adapter" in key] == [
        "base_model.model.shared.token_adapter.trainable_tokens_delta"
    ]
    assert torch.equal(load_adapter(t5(), tmp_path).shared.trained_rows, shared)


@pytest.mark.parametrize("base", [llama, tied])
def test_trained_rows_of_a_resized_vocabulary(base, tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = base()
    model.config._name_or_path = str(tmp_path / "base")
    model.resize_token_embeddings(70)
    adapted(model, trainable_token_indices=[66, 3])
    expected = logits(trained(model))
    save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.embed_tokens.token_adapter.base_layer.weight" in keys
    other = base()
    other.resize_token_embeddings(70)
    torch.testing.assert_close(logits(load_adapter(other, tmp_path)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trainer_saves_and_resumes_tied_rows(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = replace_linear(tied(), r=2, trainable_token_indices=[1, 2])
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    options = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **options)
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    transformers.Trainer(model, arguments, train_dataset=rows).train(str(tmp_path / "checkpoint-1"))
    model.tie_weights()
    assert model.lm_head.trained_rows is model.model.embed_tokens.trained_rows
    ties = dict(tied()._tied_weights_keys)
    merge(model)
    assert model._tied_weights_keys == model.all_tied_weights_keys == ties
    model.save_pretrained(tmp_path / "merged")


def test_a_quantized_models_trained_rows_stay():
    model = nn.Sequential()
    model.body, model.decoder = nn.Linear(64, 64), nn.Linear(64, 64)
    replace_linear(model, target_modules=["body"], quantize="nf4", trainable_token_indices={"decoder": [1, 2]})
    assert model.decoder.trained_rows.requires_grad
    row = next(row for row in model.fastlora_report.rows if row.name == "decoder")
    assert "some of its rows are trained" in row.reason
