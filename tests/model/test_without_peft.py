"""Everything that needs no peft runs where peft and bitsandbytes are not installed, in a process of its own."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.modules.update(peft=None, bitsandbytes=None)  # any import of either fails from here on
import torch
import fastlora
public = [getattr(fastlora, name) for name in fastlora.__all__]
from tests.support.models import SIZES, gpt2, llama, logits, tokens, transformers


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


BATCHES = [{"input_ids": tokens()}]
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES = [
    (mixtral, EXPERTS),
    (mixtral, {**EXPERTS, "quantize": "nf4"}),
    (llama, {"init_lora_weights": "eva", "eva_dataloader": BATCHES}),
    (llama, {"init_lora_weights": "pissa"}),
    (llama, {"init_lora_weights": "olora", "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    (llama, {"init_lora_weights": "loftq", "quantize": "nf4"}),
    (gpt2, {"init_lora_weights": "orthogonal", "trainable_token_indices": [3, 7]}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
]


for number, (base, options) in enumerate(CASES):
    directory, quantize = f"{sys.argv[1]}/{number}", options.get("quantize")
    torch.manual_seed(0)
    model = base().eval()
    state, expected = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    fastlora.replace_linear(model, r=4, **options)
    if quantize is None:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    expected = logits(model.eval())
    fastlora.save_adapter(model, directory)
    other = base().eval()
    other.load_state_dict(state)
    fastlora.load_adapter(other, directory, **({"quantize": quantize} if quantize else {}))
    torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
    assert fastlora.report(model).replaced
    torch.testing.assert_close(logits(fastlora.merge(model)), expected, rtol=1e-3, atol=1e-4)
    print("done", number)
"""


def test_start_train_save_load_merge(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.split("\n")[-2:] == ["done 7", ""], done.stderr[-3000:]
