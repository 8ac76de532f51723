"""Single tokens trained in full: peft's `trainable_token_indices`.

    embedding   the row of a trained token is looked up among the trained rows, any other in the frozen weight
    head        its logit is x · row, in place of the frozen weight's

Neither forms a changed copy of the vocabulary's weight: a step costs the trained rows alone. A head that is tied to the
embedding shares its trained rows and stays tied. The saved key is peft's (`KEY` after the module's name), its rows in
the order of the indices.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.model.names import nearest

KEY = "token_adapter.trainable_tokens_delta"


class TrainedTokens(nn.Module):
    """An `nn.Embedding`, or an `nn.Linear` that is an output head, some of whose rows are trained.

    Args:
        base_layer: used as it is, frozen.
        indices: the tokens. rows: [len(indices), D], trained; shared between a tied embedding and head.
    """

    slots: Tensor
    indices: Tensor

    def __init__(self, base_layer: nn.Module, indices: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer, self.trained_rows = base_layer, rows
        vocabulary = self.weight.shape[0]
        chosen = torch.tensor(list(indices), device=rows.device)
        slots = torch.full((vocabulary,), -1, device=rows.device)
        slots[chosen] = torch.arange(len(chosen), device=rows.device)
        self.register_buffer("indices", chosen, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Any:
        """The frozen weight, as code that asks an embedding for its dtype or device expects."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """ids [...] -> [..., D] of an embedding; x [..., D] -> [..., V] of a head."""
        y = self.base_layer(x)
        if isinstance(self.base_layer, nn.Embedding):
            slots = self.slots[x]
            rows = F.embedding(slots.clamp(min=0), self.trained_rows).to(y.dtype)
            return torch.where((slots >= 0).unsqueeze(-1), rows, y)
        logits = F.linear(x, self.trained_rows.to(x.dtype))
        bias: Any = self.base_layer.bias
        if bias is not None:
            logits = logits + bias[self.indices]
        return y.index_copy_(-1, self.indices, logits.to(y.dtype))  # y is new, and its product needs it no more

    def fold(self) -> nn.Module:
        """The layer beneath, with the trained rows written into its weight."""
        with torch.no_grad():
            self.weight[self.indices] = self.trained_rows.to(self.weight.dtype)
        return self.base_layer


def resolve(model: nn.Module, wanted: Any) -> dict[str, list[int]]:
    """{name of an embedding or a head: its tokens}; a list means the input embedding.

    Raises:
        ValueError: no such module, or tokens that it has not or cannot train.
    """
    if not wanted:
        return {}
    modules = dict(model.named_modules())
    if not isinstance(wanted, Mapping):
        get = getattr(model, "get_input_embeddings", None)
        inputs = get() if callable(get) else None
        name = next((name for name, module in modules.items() if module is inputs and name), "embed_tokens")
        wanted = {name: wanted}
    found = {}
    for entry, indices in wanted.items():
        names = [name for name in modules if name == entry or name.endswith(f".{entry}")]
        if len(names) != 1:
            hint = nearest(entry, modules.keys() - {""}) if not names else f": {', '.join(names[:3])}"
            raise ValueError(f"trainable_token_indices: {entry!r} matches {len(names) or 'no'} modules{hint}")
        _check(names[0], modules[names[0]], indices)
        found[names[0]] = list(indices)
    return found


def _check(name: str, module: Any, indices: Any) -> None:
    said = f"trainable_token_indices of {name}"
    if type(module) not in (nn.Embedding, nn.Linear):
        raise ValueError(f"{said}: a {type(module).__name__} has a forward of its own: use modules_to_save for it")
    if type(module) is nn.Embedding and module.max_norm is not None:
        raise ValueError(f"{said}: its max_norm changes rows in place: use modules_to_save for it")
    vocabulary = module.weight.shape[0]
    if not isinstance(indices, Collection) or not indices or len(set(indices)) != len(indices):
        raise ValueError(f"{said} must be a list of different tokens, not {indices!r}")
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocabulary:
            raise ValueError(f"{said}: {index!r} is no token; there are {vocabulary}, from 0 on")
    if getattr(module, "padding_idx", None) in indices:
        raise ValueError(f"{said}: {module.padding_idx} is the padding token, which gets no gradient")


def places(model: nn.Module, wanted: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """{module to wrap: the module whose rows it has}: those wanted, and heads tied to a wanted embedding."""
    found = {name: name for name in wanted}
    for name in wanted:
        weight = model.get_submodule(name).weight
        for other, module in model.named_modules():
            if other not in found and module._parameters.get("weight") is weight:
                if type(module) not in (nn.Embedding, nn.Linear):
                    raise ValueError(
                        f"trainable_token_indices: {name} shares its weight with {other}, a {type(module).__name__}, "
                        "which would not see the trained rows: untie them"
                    )
                found[other] = name
    return found


def wrap(model: nn.Module, wanted: Mapping[str, Sequence[int]], trains: bool) -> None:
    """Hang a `TrainedTokens` over each of these modules and what is tied to them."""
    rows = {}
    for name, indices in wanted.items():
        weight: Any = model.get_submodule(name).weight
        rows[name] = nn.Parameter(weight.detach()[list(indices)].clone(), requires_grad=trains)
    for name, source in places(model, wanted).items():
        parent, _, attribute = name.rpartition(".")
        layer = TrainedTokens(model.get_submodule(name), wanted[source], rows[source])
        setattr(model.get_submodule(parent), attribute, layer)
    _tell_ties(model)


def _tell_ties(model: Any) -> None:
    """Keep transformers' table of tied weights, {"lm_head.weight": "embed_tokens.weight"}, true to the wrapped modules.

    It is what `save_pretrained` and Trainer's checkpoints ask before they write a shared tensor once.
    """
    wrapped = {name for name, module in model.named_modules() if isinstance(module, TrainedTokens)}
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, table, None)
        if not isinstance(known, dict):
            continue
        told: dict[str, str] = {}
        for head, embedding in known.items():
            plain = [key.removesuffix(".weight").removesuffix(".base_layer") for key in (head, embedding)]
            if all(name in wrapped for name in plain):
                told |= {f"{plain[0]}.{part}": f"{plain[1]}.{part}" for part in ("base_layer.weight", "trained_rows")}
            elif not head.endswith(".trained_rows"):
                told[head.replace(".base_layer.weight", ".weight")] = embedding.replace(".base_layer.weight", ".weight")
        if told != known:
            setattr(model, table, told)


def layers(model: nn.Module) -> dict[str, TrainedTokens]:
    """The wrapped modules by name, each set of rows once."""
    found: dict[int, tuple[str, TrainedTokens]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainedTokens):
            known = found.get(id(module.trained_rows))
            if known is None or isinstance(module.base_layer, nn.Embedding):
                found[id(module.trained_rows)] = name, module
    return dict(found.values())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained rows under peft's keys."""
    return {f"{name}.{KEY}": layer.trained_rows.detach().clone() for name, layer in layers(model).items()}


def fold(model: nn.Module) -> None:
    """Write all trained rows into the weights and take the wrappers off."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, TrainedTokens):
                setattr(parent, attribute, child.fold())
    _tell_ties(model)
