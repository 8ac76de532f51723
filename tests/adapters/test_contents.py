"""What peft writes beside A and B, and what a later transformers or peft calls otherwise, loads; damage is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import load_adapter, replace_linear, save_adapter
from fastlora.files import peft_files
from tests.support.models import llama, logits, randomize, snapshot, tokens, trained

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore")


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def write(folder, tensors=None, **config):
    """Change a saved adapter."""
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def pefts(base, folder, **options):
    model = randomize(peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_base_weight_of_an_adapted_head(tie, adapted, tmp_path):
    def base():
        return llama(tie_word_embeddings=tie)

    targets = ["q_proj", "lm_head"]
    theirs = pefts(base(), tmp_path, target_modules=targets)
    assert f"{PREFIX}lm_head.base_layer.weight" in tensors_of(tmp_path)
    model = replace_linear(base(), r=4, target_modules=targets) if adapted else base()
    torch.testing.assert_close(logits(load_adapter(model, tmp_path)), logits(theirs), rtol=1e-5, atol=1e-6)
    assert (model.lm_head.base_layer.weight is model.model.embed_tokens.weight) == tie


def test_another_base_weight_in_the_file_is_taken(tmp_path):
    theirs = pefts(llama(), tmp_path, target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bare", "dora"), [(True, True), (True, False), (False, True)])
def test_what_only_pefts_layers_have(bare, dora, tmp_path):
    options = {"use_dora": True} if dora else {"target_modules": ["q_proj", "embed_tokens"]}
    theirs = pefts(llama(), tmp_path, **options)
    if not bare:
        with pytest.raises(ValueError, match="use_dora=True is not supported"):
            load_adapter(replace_linear(llama(), r=4, target_modules=["q_proj"]), tmp_path)
        return
    model = load_adapter(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert fastlora.report(model).rows[0].replaced or not dora
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    save_adapter(model, tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path).keys()
    with pytest.raises(ValueError, match="needs peft's layers, which do not take quantize"):
        load_adapter(llama(), tmp_path, quantize="nf4")


def test_a_file_for_pefts_layers_that_does_not_fit_changes_nothing(tmp_path):
    pefts(llama(), tmp_path, use_dora=True)
    tensors = tensors_of(tmp_path)
    tensors.pop(f"{PREFIX}model.layers.1.self_attn.q_proj.lora_magnitude_vector")
    write(tmp_path, tensors)
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_magnitude_vector is missing from the file"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")


def classifier(kind="LlamaForSequenceClassification"):
    torch.manual_seed(0)
    config = llama().config
    config.num_labels, config.pad_token_id = 3, 0
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        ("LlamaForSequenceClassification", "SEQ_CLS", "score"),
        ("LlamaForTokenClassification", "TOKEN_CLS", "score"),
        ("LlamaForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_heads_of_tasks(kind, task, head, tmp_path):
    def output(model):
        found = model(input_ids=tokens())
        return found.start_logits if head == "qa_outputs" else found.logits

    theirs = pefts(classifier(kind), tmp_path / "theirs", task_type=task)
    own = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type=task)
    ours = randomize(replace_linear(classifier(kind), own)).eval()
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n} == {
        name.replace("base_model.model.", "").replace(".modules_to_save.default", "")
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    with torch.no_grad():
        ours.get_submodule(head).weight.add_(0.5)
    torch.testing.assert_close(output(load_adapter(classifier(kind), tmp_path / "theirs").eval()), output(theirs))
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == task
    again = peft.PeftModel.from_pretrained(classifier(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again), output(ours), rtol=1e-5, atol=1e-6)


def llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**sizes, vocab_size=64)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("way", ["bare", "adapted", "peft"])
def test_former_names_of_an_architecture(way, tmp_path):
    targets, patterns = ["q_proj", "v_proj"], {"language_model.model.layers.1.self_attn.q_proj": 64}
    theirs = pefts(llava(), tmp_path, target_modules=targets)
    former = {
        key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision_tower.", "model.vision_tower."
        ): value
        for key, value in tensors_of(tmp_path).items()
    }
    assert former.keys() != tensors_of(tmp_path).keys()
    write(tmp_path, former)
    model = llava()
    if way == "adapted":
        replace_linear(model, r=4, target_modules=targets)
    if way == "peft":
        model = replace_linear(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)))
    torch.testing.assert_close(logits(load_adapter(model, tmp_path)), logits(theirs), rtol=1e-5, atol=1e-6)
    if way == "bare":  # patterns for former names are for those layers still
        write(tmp_path, alpha_pattern=patterns)
        again = load_adapter(llava(), tmp_path)
        layers = {name: module for name, module in again.named_modules() if isinstance(module, fastlora.LoRALinear)}
        scalings = {name: layer.scaling["default"] for name, layer in layers.items()}
        assert {name for name, scaling in scalings.items() if scaling == 16} == {
            "model.language_model.layers.1.self_attn.q_proj"
        }


def test_an_option_that_nobody_knows_is_ignored_with_a_warning(tmp_path):
    theirs = pefts(llama(), tmp_path)
    write(tmp_path, invented_option={"a": 1}, another=None)
    with pytest.warns(UserWarning, match="ignored, as not known here: invented_option of"):
        model = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="invented_option"):
        replace_linear(llama(), json.loads((tmp_path / "adapter_config.json").read_text()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", ["bare", "adapted", "peft"])
def test_an_adapter_that_is_not_finite_is_refused(way, value, tmp_path):
    pefts(llama(), tmp_path)
    tensors = tensors_of(tmp_path)
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[key][3, 1] = value
    write(tmp_path, tensors)
    model = llama()
    if way == "adapted":
        replace_linear(model, r=4, target_modules=["q_proj"])
    if way == "peft":
        model = replace_linear(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{key} holds NaN or inf.*take an earlier checkpoint"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


class Net(nn.Module):
    """Layers whose names are those of adapters, or contain "lora_"."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.attn, self.lora_head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 7)

    def forward(self, x):
        return self.lora_head(self.mlp(self.attn(x).tanh()))


@pytest.mark.parametrize("other", ["mlp", "attn", "weight"])
def test_another_adapter_named_as_a_layer(other, tmp_path):
    """peft filters by name, and drops the layers in whose names the other adapter's name stands."""
    config = {"r": 4, "target_modules": ["mlp", "attn"]}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**config, init_lora_weights=False))
    x = torch.randn(3, 32)
    expected = model(x)
    try:
        model.add_adapter(other, peft.LoraConfig(**config))
    except (ValueError, KeyError) as error:
        pytest.skip(f"peft refuses the name: {error}")
    replace_linear(model)
    save_adapter(model, tmp_path)
    assert len(tensors_of(tmp_path)) == 4
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(), tmp_path)(x), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_swapped_in_place_is_saved_as_it_is(rslora, tmp_path):
    hotswap = pytest.importorskip("peft.utils.hotswap")
    x = torch.randn(3, 32)
    for number, options in enumerate(
        [{"r": 8, "lora_alpha": 16}, {"r": 4, "lora_alpha": 9, "rank_pattern": {"mlp": 2}}]
    ):
        torch.manual_seed(number)
        config = peft.LoraConfig(target_modules=["mlp", "attn"], init_lora_weights=False, use_rslora=rslora, **options)
        peft.get_peft_model(Net(), config).save_pretrained(tmp_path / str(number))
    model, own = (peft.PeftModel.from_pretrained(Net(), tmp_path / "0") for _ in range(2))
    replace_linear(model)
    for each in (model, own):
        hotswap.hotswap_adapter(each, tmp_path / "1", "default")
    expected = model(x)
    torch.testing.assert_close(own(x), expected)
    save_adapter(model, tmp_path / "saved")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(), tmp_path / "saved")(x), expected)
    torch.testing.assert_close(load_adapter(Net(), tmp_path / "saved")(x), expected)


@pytest.mark.parametrize("way", ["plain", "peft"])
def test_a_disk_that_gives_back_something_else_is_noticed(way, tmp_path, monkeypatch):
    model = llama()
    if way == "plain":
        replace_linear(model, r=4)
    else:
        model = replace_linear(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")))
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomize(model)
    write_file = save_file

    def damaged(tensors, path, **options):
        first, *_ = tensors
        write_file({**tensors, first: tensors[first] * 0}, path, **options)

    def short(tensors, path, **options):
        write_file(dict(list(tensors.items())[1:]), path, **options)

    def torn(tensors, path, **options):
        write_file(tensors, path, **options)
        path.write_bytes(path.read_bytes()[:-7])

    for fault in (damaged, short, torn):
        monkeypatch.setattr(peft_files, "save_file", fault)
        with pytest.raises(OSError, match=r"gives back something else|cannot be read"):
            save_adapter(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


BLOCKS = [{}, {"modules_to_save": ["input_layernorm", "norm"]}, {"trainable_token_indices": [3]}]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", BLOCKS)
def test_compiled_blocks_have_no_part_in_names(options, first, tmp_path):
    options = {"r": 4, "target_modules": ["layers.0.self_attn.q_proj", "down_proj"], **options}

    def compiled(model):
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = torch.compile(block, backend="eager")
        return model

    model = replace_linear(compiled(llama()), **options) if first else compiled(replace_linear(llama(), **options))
    randomize(model)
    save_adapter(model, tmp_path)
    assert not [key for key in tensors_of(tmp_path) if "_orig_mod" in key]
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    expected = logits(model)
    for again in (
        load_adapter(llama(), tmp_path),
        load_adapter(compiled(llama()), tmp_path),
        load_adapter(compiled(replace_linear(llama(), **options)), tmp_path),
        peft.PeftModel.from_pretrained(llama(), tmp_path),
    ):
        torch.testing.assert_close(logits(again.eval()), expected, rtol=1e-5, atol=1e-6)
    assert {row.name for row in fastlora.report(model).rows if row.path == "unchanged" and row.replaced} == set()


def test_nothing_is_said_of_an_ordinary_adapter(tmp_path):
    model = trained(randomize(replace_linear(llama(), r=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
        load_adapter(llama(), tmp_path)


def test_modules_to_save_that_are_not_all_there(tmp_path):
    model = replace_linear(llama(), r=4, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    save_adapter(model, tmp_path)
    good = tensors_of(tmp_path)
    for key in ("model.norm.weight", "lm_head.weight"):
        write(tmp_path, {name: value for name, value in good.items() if name != PREFIX + key})
        for base in (llama(), model):
            before, expected = snapshot(base), logits(base)
            with pytest.raises(ValueError, match=rf"{PREFIX}{key} is missing from the file"):
                load_adapter(base, tmp_path)
            assert snapshot(base) == before
            assert torch.equal(logits(base), expected)


def test_a_rank_that_the_config_does_not_mean(tmp_path):
    save_adapter(replace_linear(llama(), r=4, target_modules=["q_proj"]), tmp_path)
    write(tmp_path, r=8)
    with pytest.raises(ValueError, match=r"has rank 4, and the config means 8 \(r, rank_pattern\)"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_numbers_of_another_kind_than_the_models(dtype, tmp_path):
    save_adapter(replace_linear(llama(), r=4, target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path)
    good = tensors_of(tmp_path)
    for key in good:
        write(tmp_path, {**good, key: good[key].to(dtype)})
        model = llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=key):
            load_adapter(model, tmp_path)
        assert snapshot(model) == before


def test_weights_in_8_bits_are_read(tmp_path):
    model = randomize(replace_linear(llama(), r=4, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    eighths = {key: value.to(torch.float8_e4m3fn) for key, value in tensors_of(tmp_path).items()}
    write(tmp_path, eighths)
    layer = load_adapter(llama(), tmp_path).model.layers[0].self_attn.q_proj
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(layer.lora_A["default"].weight, eighths[key].float())


class Pair(nn.Module):
    """Two models in one, each adapted by itself."""

    def __init__(self):
        super().__init__()
        self.left, self.right = llama(), llama()

    def forward(self, ids):
        return self.left(ids).logits + self.right(ids).logits


def pair():
    model = Pair()
    replace_linear(model.left, r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["norm"])
    replace_linear(model.right, r=9, lora_alpha=8, target_modules=["k_proj"], use_rslora=True)
    return model


def test_several_adapted_parts_of_one_model(tmp_path):
    model = randomize(pair())
    model.left.model.norm.weight.data.add_(1)
    expected = model(tokens()).detach()
    save_adapter(model, tmp_path)
    assert f"{PREFIX}left.model.norm.weight" in tensors_of(tmp_path)
    for other in (pair(), Pair()):
        torch.testing.assert_close(load_adapter(other, tmp_path)(tokens()), expected)
    theirs = peft.PeftModel.from_pretrained(Pair(), tmp_path)
    torch.testing.assert_close(theirs(tokens()), expected)
