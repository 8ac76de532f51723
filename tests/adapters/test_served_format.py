"""What is saved obeys the rules by which vLLM's loader takes an adapter, written down here from its documentation.

One rank and one alpha for all modules, no DoRA, no further trained modules, no bias; keys that begin with
`base_model.model.` and end in `.lora_A.weight` or `.lora_B.weight`; A [r, in], B [out, r]; only modules that the model
server knows. From these the loader works out scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastlora.adapters.adapter import save_adapter
from fastlora.model.replace import replace_linear
from tests.support.models import PROJECTIONS, llama, qwen2, randomize, tokens

MAX_RANK = 16


def refusal(directory):
    """Why vLLM would not serve this adapter; empty where it would."""
    names = sorted(path.name for path in directory.iterdir())
    if names != ["adapter_config.json", "adapter_model.safetensors"]:
        return f"files {names}"
    config = json.loads((directory / "adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "target_modules"):
        if not config.get(field):
            return f"no {field}"
    if config["r"] > MAX_RANK:
        return f"r={config['r']} is greater than max_lora_rank={MAX_RANK}"
    for field, wanted in (("modules_to_save", None), ("use_dora", False), ("bias", "none"), ("peft_type", "LORA")):
        if (config.get(field) or wanted) != wanted:
            return f"{field}={config[field]}"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "ranks or alphas that differ between modules"
    shapes = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        parts = key.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            return f"{key} is unsupported LoRA weight"
        if parts[-3] not in PROJECTIONS:
            return f"{key}: not a module that the server knows"
        shapes.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor.shape
    for module, pair in shapes.items():
        if len(pair) != 2 or pair["lora_A"][0] != config["r"] or pair["lora_B"][1] != config["r"]:
            return f"{module}: {pair}"
    return ""


def served(model, directory):
    """Logits of a plain model with each update added to its weight as the server would, from nothing but the files."""
    config = json.loads((directory / "adapter_config.json").read_text())
    found = load_file(directory / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for key, lora_a in found.items():
        if key.endswith(".lora_A.weight"):
            module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            with torch.no_grad():
                module.weight += scaling * found[key.replace("lora_A", "lora_B")] @ lora_a
    return model(tokens()).logits


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (llama, {}),
        (qwen2, {"use_rslora": True}),
        (llama, {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}),
        (llama, {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        (llama, {"init_lora_weights": "pissa"}),
        (llama, {"init_lora_weights": "olora", "use_rslora": True}),
        (llama, {"init_lora_weights": "orthogonal"}),
    ],
)
def test_it_is_served_with_the_same_logits(base, options, tmp_path):
    model = randomize(replace_linear(base(), r=4, lora_alpha=6, **options)).eval()
    save_adapter(model, tmp_path)
    assert refusal(tmp_path) == ""
    torch.testing.assert_close(served(base(), tmp_path), model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_so_is_what_peft_saves_of_a_sped_up_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=list(PROJECTIONS)))
    randomize(replace_linear(model)).eval()
    save_adapter(model, tmp_path)
    assert refusal(tmp_path) == ""
    torch.testing.assert_close(served(llama(), tmp_path), model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 32}, "r=32 is greater than max_lora_rank=16"),
        ({"r": 16, "init_lora_weights": "pissa"}, "r=32 is greater"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks or alphas that differ"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*not a module that the server knows"),
    ],
)
def test_what_it_would_not_serve_is_seen(options, reason, tmp_path):
    save_adapter(replace_linear(llama(), **{"r": 4, **options}), tmp_path)
    with pytest.raises(AssertionError, match=reason):
        assert refusal(tmp_path) == "", refusal(tmp_path)
