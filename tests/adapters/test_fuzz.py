"""Adapter folders that are damaged in any way: loaded as they are, or refused in one line with the model unchanged."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.files.peft_files import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from tests.support import fuzz


class Toy(nn.Module):
    """An embedding, two linear layers and a head: what adapters can name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 16)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.v(self.q(self.embed(ids)))))


OPTIONS = [
    {"target_modules": ["q", "v"]},
    {"target_modules": ["q", "v"], "rank_pattern": {"v": 3}, "alpha_pattern": {"q": 5}, "use_rslora": True},
    {"target_modules": ["q"], "modules_to_save": ["norm"], "trainable_token_indices": [1, 3]},
]


def reheaded(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A safetensors file with another header, whose length is told as it is."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end])
    return len(header).to_bytes(8, "little") + header + content[end:]


def harmed(folder: Path, rng: random.Random) -> None:
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    kind, change = rng.randrange(6), fuzz.altered
    if kind == 0:
        config.write_bytes(fuzz.damaged(config.read_bytes(), rng))
    elif kind == 1:
        config.write_text(json.dumps(fuzz.altered(json.loads(config.read_text()), rng)))
    elif kind == 2:
        weights.write_bytes(fuzz.damaged(weights.read_bytes(), rng))
    elif kind == 3:
        weights.write_bytes(reheaded(weights.read_bytes(), lambda header: fuzz.damaged(header, rng)))
    elif kind == 4:
        content = weights.read_bytes()
        weights.write_bytes(reheaded(content, lambda header: json.dumps(change(json.loads(header), rng)).encode()))
    else:
        gone = rng.choice((config, weights))
        gone.unlink()
        if rng.random() < 0.5:
            gone.mkdir()


def test_adapter_folders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = []
    for number, options in enumerate(OPTIONS):
        model = fastlora.replace_linear(Toy(), r=2, **options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        fastlora.save_adapter(model, tmp_path / str(number))
        saved.append(tmp_path / str(number))
    folder = tmp_path / "harmed"

    def attempt(rng: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rng.choice(saved), folder)
        harmed(folder, rng)
        model = Toy()
        if rng.random() < 0.3:
            model = fastlora.replace_linear(model, r=2, **rng.choice(OPTIONS))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            fastlora.load_adapter(model, folder)
        except ValueError:
            now = model.state_dict()
            assert now.keys() == before.keys()
            for name, tensor in before.items():
                torch.testing.assert_close(now[name], tensor, rtol=0, atol=0)
            raise
        found = {PREFIX + name.replace(".default", ""): tensor for name, tensor in model.state_dict().items()}
        found[f"{PREFIX}embed.token_adapter.trainable_tokens_delta"] = found.get(f"{PREFIX}embed.trained_rows")
        for key, tensor in load_file(folder / WEIGHTS_NAME).items():
            torch.testing.assert_close(found[key], tensor.to(found[key].dtype), rtol=0, atol=0, equal_nan=True)

    fuzz.check_each("adapters", attempt)
