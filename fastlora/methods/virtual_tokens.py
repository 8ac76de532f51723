"""What prompt and prefix tuning share: trained vectors in front of a text, given to a model by a hook of its forward.

The hook runs before the model's own forward, so its code stays as it is. In `generate`, only the call without cached
tokens gets them; later ones find them in the cache, and have their mask and positions moved on.
"""

import inspect
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.config import base_name
from fastlora.files.peft_files import read_adapter, write_adapter
from fastlora.methods.method import Method

ATTRIBUTE = "fastlora_prompt"
KEY = "prompt_embeddings"
IGNORED = -100


class VirtualTokens(Method):
    """Trained tokens before the text.

    Args:
        num_virtual_tokens: how many.
        init_ids: tokens that they start as, repeated or cut; None: drawn from the vocabulary.
    """

    peft_type: str

    def __init__(self, num_virtual_tokens: int = 20, init_ids: list[int] | None = None) -> None:
        if num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, not {num_virtual_tokens}")
        if init_ids is not None and not init_ids:
            raise ValueError("init_text has no tokens: give some text, or none for a random start")
        self.count, self.init_ids = num_virtual_tokens, init_ids

    @abstractmethod
    def make(self, model: Any, ids: Tensor) -> nn.Module:
        """The trained module. ids [virtual tokens]: what it starts as."""

    @abstractmethod
    def give(self, model: Any, prompt: Any, given: dict[str, Any], rows: int) -> None:
        """Change the arguments of a call without cached tokens. rows: samples of it."""

    def attach(self, model: Any) -> None:
        """Freeze the model, and put the trained tokens in front of what it is given."""
        if hasattr(model, ATTRIBUTE):
            raise ValueError(f"{self.name}: the model has trained tokens already")
        if not hasattr(model, "get_input_embeddings") or not hasattr(getattr(model, "config", None), "get_text_config"):
            raise ValueError(f"{self.name}: a {type(model).__name__} is no language model of transformers")
        self.check(model)
        embedding = model.get_input_embeddings()
        ids = torch.randint(embedding.weight.shape[0], (self.count,))
        if self.init_ids is not None:
            ids = torch.tensor((self.init_ids * (self.count // len(self.init_ids) + 1))[: self.count])
        training = model.training
        made = self.make(model.eval(), ids.to(embedding.weight.device))
        model.train(training)
        model.requires_grad_(False)
        setattr(model, ATTRIBUTE, made)
        names = list(inspect.signature(model.forward).parameters)

        def before(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
            given = dict(zip(names, positional, strict=False)) | named
            self._change(module, given)
            return (), given

        model.register_forward_pre_hook(before, with_kwargs=True)

    def check(self, model: Any) -> None:
        """Raise ValueError if this kind of model cannot take the method."""

    def _change(self, model: Any, given: dict[str, Any]) -> None:
        what = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if what is None:
            raise ValueError(f"{self.name}: the call has neither input_ids nor inputs_embeds")
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(f"{self.name}: the mask must be [rows, tokens], not of {mask.dim()} axes")
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], 1)
        past = given.get("past_key_values") if given.get("past_key_values") is not None else given.get("cache")
        first = past is None or past.get_seq_length() == 0
        if positions is not None:
            given["position_ids"] = positions + self.count
        if given.get("cache_position") is not None:
            given["cache_position"] = given["cache_position"] + self.count
        if first:
            self.give(model, getattr(model, ATTRIBUTE), given, len(what))

    def config(self, model: Any) -> dict[str, Any]:
        """adapter_config.json, as peft has it."""
        text = model.config.get_text_config()
        return {
            "base_model_name_or_path": base_name(model),
            "inference_mode": True,
            "num_attention_heads": text.num_attention_heads,
            "num_layers": text.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.count,
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "token_dim": text.hidden_size,
        }

    def tensors(self, prompt: Any) -> dict[str, Tensor]:
        """What is saved, by its key."""
        return {KEY: prompt.weight}

    def take(self, prompt: Any, tensors: dict[str, Tensor]) -> None:
        """Set what is trained to what was saved, whose shapes fit."""
        prompt.weight.data.copy_(tensors[KEY])

    def save(self, model: Any, folder: Path) -> None:
        """In peft's format."""
        held = self.tensors(getattr(model, ATTRIBUTE))
        own = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in held.items()}
        write_adapter(folder, self.config(model), own)

    def load(self, model: Any, folder: Path) -> None:
        """From peft's format."""
        config, tensors = read_adapter(folder)
        if config.get("peft_type") != self.peft_type:
            raise ValueError(f"{folder}: it holds {config.get('peft_type')}, not {self.peft_type}")
        prompt = getattr(model, ATTRIBUTE)
        for key, own in self.tensors(prompt).items():
            if key not in tensors:
                raise ValueError(f"{folder}: {key} is missing")
            if tensors[key].shape != own.shape:
                raise ValueError(
                    f"{folder}: {key} is {list(tensors[key].shape)}, and the model needs {list(own.shape)}"
                )
        self.take(prompt, tensors)
