"""Prefix tuning: trained keys and values in front of those of the text, in every layer. Source: arXiv:2101.00190.

They go in through transformers' cache, which any attention reads. They start as the keys and values that the model
itself has for some tokens, which the source found to be better than random ones.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import fastlora.memory.adapters as counts
from fastlora.memory.shape import ModelShape
from fastlora.methods.virtual_tokens import ATTRIBUTE, KEY, VirtualTokens


class Prefix(VirtualTokens):
    """Trained keys and values [virtual tokens, layers * 2 * kv heads * head size], fp32.

    Args:
        projection: hidden features of an MLP that makes them while they are trained (`prefix_projection` of peft); 0:
            they are trained themselves.
    """

    name, peft_type = "prefix", "PREFIX_TUNING"

    def __init__(self, num_virtual_tokens: int = 20, init_ids: list[int] | None = None, projection: int = 0) -> None:
        super().__init__(num_virtual_tokens, init_ids)
        if projection < 0:
            raise ValueError(f"prefix_projection must be at least 0, not {projection}")
        self.projection = projection

    def check(self, model: Any) -> None:
        """A checkpointed layer drops its cache, and the prefix with it; layers must be equal."""
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "prefix: layers that are checkpointed drop their cache, and the prefix with it: "
                "switch gradient_checkpointing off"
            )
        text = model.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"prefix: layers of kind {', '.join(sorted(kinds))} keep no keys and values for each token"
            )

    def make(self, model: Any, ids: Tensor) -> nn.Module:
        """Starts as the model's own keys and values of `ids`."""
        given: dict[str, Any] = {"input_ids": ids[None], "use_cache": True}
        with torch.no_grad():
            found = model(**given)
        cache = found.cache if getattr(found, "cache", None) is not None else found.past_key_values
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if len({pair[0].shape for pair in layers}) > 1 or layers[0][0].shape[2] != self.count:
            raise ValueError("prefix: the model's layers keep keys of different shapes, or not of every token")
        start = torch.stack([t[0].float() for pair in layers for t in pair])  # [layers * 2, kv heads, tokens, size]
        start = start.permute(2, 0, 1, 3)
        return _Prefix(start.flatten(1), start.shape[1:], self.projection)

    def give(self, model: Any, prompt: Any, given: dict[str, Any], rows: int) -> None:
        """A cache that holds the prefix."""
        from transformers import DynamicCache

        if any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()):
            self.check(model)
        dtype = next(
            (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), torch.float32
        )
        if torch.is_autocast_enabled(prompt.weight.device.type):
            dtype = torch.get_autocast_dtype(prompt.weight.device.type)
        pairs = (
            prompt().to(dtype).expand(rows, -1, -1, -1, -1).unbind(1)
        )  # layers * 2 of [rows, kv heads, tokens, size]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            cache.update(keys, values, layer)
        given.pop("past_key_values", None)  # which newer versions of transformers call `cache`
        given["cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"] = cache

    def config(self, model: Any) -> dict[str, Any]:
        """adapter_config.json, as peft has it: `token_dim` is that of the keys."""
        _, heads, size = getattr(model, ATTRIBUTE).shape
        more = {
            "token_dim": heads * size,
            "num_attention_heads": heads,
            "encoder_hidden_size": self.projection or heads * size,
        }
        return {**super().config(model), **more, "prefix_projection": False}  # what is saved is what the MLP makes

    def tensors(self, prompt: Any) -> dict[str, Tensor]:
        """The keys and values; with a projection also what makes them, without which training cannot go on."""
        more = {f"fastlora.{name}": p for name, p in prompt.named_parameters()} if self.projection else {}
        return {KEY: prompt.flat(), **more}

    def take(self, prompt: Any, tensors: dict[str, Tensor]) -> None:
        """Set what is trained to what was saved."""
        if not self.projection:
            super().take(prompt, tensors)
            return
        for name, p in prompt.named_parameters():
            p.data.copy_(tensors[f"fastlora.{name}"])

    def memory(self, shape: ModelShape) -> int:
        """2 layers * kv features a virtual token; with a projection the MLP's own."""
        return counts.prefix(shape, self.count, self.projection)


class _Prefix(nn.Module):
    """Keys and values of the virtual tokens. shape: layers * 2, kv heads, head size."""

    def __init__(self, start: Tensor, shape: torch.Size, projection: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if not projection:
            self.weight = nn.Parameter(start.clone())
            self.mlp: nn.Module | None = None
            return
        inner = self.shape[1] * self.shape[2]
        self.weight = nn.Parameter(torch.randn(len(start), inner, device=start.device) / inner**0.5)
        last = nn.Linear(projection, start.shape[1])
        self.mlp = nn.Sequential(nn.Linear(inner, projection), nn.Tanh(), last).to(start.device)
        nn.init.zeros_(last.weight)
        last.bias.data.copy_(start.mean(0))

    def flat(self) -> Tensor:
        """[tokens, layers * 2 * kv heads * size]."""
        return self.weight if self.mlp is None else self.mlp(self.weight)  # type: ignore[no-any-return]

    def forward(self) -> Tensor:
        """[layers * 2, kv heads, tokens, size]."""
        return self.flat().unflatten(1, self.shape).permute(1, 2, 0, 3)
