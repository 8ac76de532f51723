"""Prompt tuning: trained embeddings in front of the text. Source: arXiv:2104.08691."""

from typing import Any

import torch
from torch import Tensor, nn

import fastlora.memory.adapters as counts
from fastlora.memory.shape import ModelShape
from fastlora.methods.virtual_tokens import IGNORED, VirtualTokens


class Prompt(VirtualTokens):
    """Trained embeddings [virtual tokens, hidden], fp32. Logits have as many positions more, in front, as in peft."""

    name, peft_type = "prompt", "PROMPT_TUNING"

    @property
    def virtual_tokens(self) -> int:  # type: ignore[override]
        """Positions that the logits have more than the input."""
        return self.count

    def make(self, model: Any, ids: Tensor) -> nn.Module:
        """Starts as the embeddings of `ids`."""
        start = model.get_input_embeddings()(ids).detach().float()
        return nn.Embedding.from_pretrained(start.clone(), freeze=False)

    def give(self, model: Any, prompt: Any, given: dict[str, Any], rows: int) -> None:
        """Embeddings in the place of ids, and targets that count nothing at the new positions."""
        ids = given.pop("input_ids", None)
        text = model.get_input_embeddings()(ids) if ids is not None else given["inputs_embeds"]
        front = prompt.weight.to(text.dtype).expand(rows, -1, -1)
        given["inputs_embeds"] = torch.cat([front, text], 1)
        given.pop("cache_position", None)
        if (positions := given.get("position_ids")) is not None:
            first = torch.arange(self.count, device=positions.device, dtype=positions.dtype)
            given["position_ids"] = torch.cat([first.expand(len(positions), -1), positions], 1)
        if (labels := given.get("labels")) is not None:
            given["labels"] = torch.cat([labels.new_full((rows, self.count), IGNORED), labels], 1)

    def config(self, model: Any) -> dict[str, Any]:
        """adapter_config.json, as peft has it."""
        return {**super().config(model), "prompt_tuning_init": "RANDOM"}

    def memory(self, shape: ModelShape) -> int:
        """hidden a virtual token."""
        return counts.prompt(shape, self.count)
