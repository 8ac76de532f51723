"""Single tokens trained in full: peft's `trainable_token_indices`.

    embedding   a trained token's row is looked up among the trained rows, any other row in the frozen weight
    head        a trained token's logit is x · row; the frozen weight gives the other logits

Neither makes a changed copy of the vocabulary's weight, so a step costs only the trained rows. A head that is tied to
the embedding shares its trained rows and stays tied. The saved key is peft's (`KEY` after the module's name), with the
rows in the order of the indices.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.layers import sharded
from fastlora.layers.quoted import shown
from fastlora.model.names import means, nearest
from fastlora.model.sites import places_of, put
from fastlora.model.trained_modules import tell_config

KEY = "token_adapter.trainable_tokens_delta"


class TrainedTokens(nn.Module):
    """An `nn.Embedding`, or an `nn.Linear` that is an output head, some of whose rows are trained.

    Args:
        base_layer: used as it is, frozen; weight [V, D].
        indices: the tokens. rows: [len(indices), D], trained, cast at use; a tied embedding and head share them.
    """

    slots: Tensor
    indices: Tensor

    def __init__(self, base_layer: nn.Module, indices: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.owns = True  # the rows are saved under this module's name, not another's that shares them
        self.trained_rows = rows
        self.register_buffer("indices", torch.tensor(list(indices), device=rows.device), persistent=False)
        self.set_base(base_layer)
        self.train(base_layer.training)

    def set_base(self, base_layer: nn.Module) -> None:
        """Put the trained rows over a layer, which may have another number of tokens than the one before."""
        self.base_layer = base_layer
        weight: Any = base_layer.weight
        device = self.trained_rows.device
        slots = torch.full((weight.shape[0],), -1, device=device)
        slots[self.indices] = torch.arange(len(self.indices), device=device)
        self.register_buffer("slots", slots, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight with the trained rows in it, for code that multiplies by it itself, such as a fused loss.

        [V, D] in the dtype of the frozen weight; differentiable in the rows. It is a copy, made at each read, whole if
        FSDP2 has spread it: what is written into it is lost.
        """
        frozen: Any = self.base_layer.weight
        return sharded.whole(frozen).index_copy(0, self.indices, sharded.whole(self.trained_rows).to(frozen.dtype))

    @property
    def bias(self) -> Any:
        """The head's bias or None; whole, as the weight."""
        bias: Any = self.base_layer.bias
        return bias if bias is None else sharded.whole(bias)

    def forward(self, x: Tensor) -> Tensor:
        """ids [...] -> [..., D] of an embedding; x [..., D] -> [..., V] of a head."""
        y = self.base_layer(x)
        if isinstance(self.base_layer, nn.Embedding):
            slots = self.slots[x]  # [...]: the token's trained row, or -1
            rows = F.embedding(slots.clamp(min=0), self.trained_rows).to(y.dtype)
            return torch.where((slots >= 0).unsqueeze(-1), rows, y)
        logits = F.linear(x, self.trained_rows.to(x.dtype))  # [..., len(indices)]
        bias: Any = self.base_layer.bias
        if bias is not None:
            logits = logits + bias[self.indices]
        return y.index_copy_(-1, self.indices, logits.to(y.dtype))  # y is new, and backward does not read it

    def fold(self) -> nn.Module:
        """The base layer, with the trained rows written into its weight."""
        weight: Any = self.base_layer.weight
        with torch.no_grad():
            weight[self.indices] = self.trained_rows.to(weight.dtype)
        return self.base_layer


def resolve(model: nn.Module, wanted: Any) -> dict[str, list[int]]:
    """{name of an embedding or a head: its tokens}; a list means the input embedding.

    Raises:
        ValueError: no such module, or tokens that it does not have or cannot train.
    """
    if not wanted:
        return {}
    modules = dict(model.named_modules())
    if not isinstance(wanted, Mapping):
        get = getattr(model, "get_input_embeddings", None)
        inputs = get() if callable(get) else None
        name = next((name for name, module in modules.items() if module is inputs and name), "embed_tokens")
        wanted = {name: wanted}
    found: dict[str, list[int]] = {}
    for entry, indices in wanted.items():
        names = [name for name in modules if means(entry, name)]
        if len(names) != 1:
            hint = nearest(entry, modules.keys() - {""}) if not names else f": {', '.join(names[:3])}"
            raise ValueError(f"trainable_token_indices: {shown(entry)} matches {len(names) or 'no'} modules{hint}")
        _check_tokens(names[0], modules[names[0]], indices)
        weight = modules[names[0]].weight
        if any(modules[name].weight is weight and found[name] == list(indices) for name in found):
            continue  # tied, and so are its trained rows, as peft has it
        found[names[0]] = list(indices)
    return found


def _check_tokens(name: str, module: Any, indices: Any) -> None:
    option = f"trainable_token_indices of {name}"
    if type(module) not in (nn.Embedding, nn.Linear):
        raise ValueError(f"{option}: a {type(module).__name__} has a forward of its own: use modules_to_save for it")
    if type(module) is nn.Embedding and module.max_norm is not None:
        raise ValueError(f"{option}: its max_norm changes rows in place: use modules_to_save for it")
    vocabulary = module.weight.shape[0]
    if not isinstance(indices, Collection) or not indices:
        raise ValueError(f"{option} must be a list of different tokens, not {shown(indices)}")
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocabulary:
            raise ValueError(f"{option}: {shown(index)} is not a token; there are {vocabulary}, from 0 on")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{option} must be a list of different tokens, not {shown(indices)}")
    if getattr(module, "padding_idx", None) in indices:
        raise ValueError(f"{option}: {module.padding_idx} is the padding token, which gets no gradient")


def owners(model: nn.Module, wanted: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """{module to wrap: module that owns its rows}: the wanted modules, and heads tied to a wanted embedding.

    Raises:
        ValueError: a module of another kind shares the weight, or it is the input embedding's, which is not wanted.
    """
    found = {name: name for name in wanted}
    get = getattr(model, "get_input_embeddings", None)
    inputs = get() if callable(get) else None
    source = next((name for name, module in model.named_modules() if module is inputs and name), None)
    for name in wanted:
        weight = model.get_submodule(name).weight
        if source and source not in wanted and getattr(inputs, "weight", None) is weight:
            raise ValueError(
                f"trainable_token_indices: {name} shares its weight with the input embedding: name {source}, and its "
                "rows are trained for both"
            )
        for other, module in model.named_modules():
            if other not in found and module._parameters.get("weight") is weight:
                if type(module) not in (nn.Embedding, nn.Linear):
                    raise ValueError(
                        f"trainable_token_indices: {name} shares its weight with {other}, a {type(module).__name__}, "
                        "which would not see the trained rows: untie them"
                    )
                found[other] = name
    return found


def wrap(model: nn.Module, wanted: Mapping[str, Sequence[int]], trains: bool, dtype: torch.dtype | None = None) -> None:
    """Put a `TrainedTokens` over each of these modules and what is tied to them; dtype: of the rows, None for fp32."""
    rows = {}
    for name, indices in wanted.items():
        weight: Any = model.get_submodule(name).weight
        chosen = weight.detach()[list(indices)].to(dtype or torch.float32, copy=True)
        rows[name] = nn.Parameter(chosen, requires_grad=trains)
    bases = {name: model.get_submodule(name) for name in owners(model, wanted)}
    places = places_of(model, bases.values())
    for name, owner in owners(model, wanted).items():
        layer = TrainedTokens(bases[name], wanted[owner], rows[owner])
        layer.owns = name == owner
        put(places[id(bases[name])], layer)
    update_ties(model)


def update_ties(model: Any) -> None:
    """Rename the wrapped modules in transformers' table of tied weights, {"lm_head.weight": "embed_tokens.weight"}.

    `save_pretrained` and Trainer's checkpoints look there before they write a shared tensor once.
    """
    wrapped = {name for name, module in model.named_modules() if isinstance(module, TrainedTokens)}
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, table, None)
        if not isinstance(known, dict):
            continue
        ties: dict[str, str] = {}
        for head, embedding in known.items():
            plain = [key.removesuffix(".weight").removesuffix(".base_layer") for key in (head, embedding)]
            if all(name in wrapped for name in plain):
                ties |= {f"{plain[0]}.{part}": f"{plain[1]}.{part}" for part in ("base_layer.weight", "trained_rows")}
            elif not head.endswith(".trained_rows"):
                ties[head.replace(".base_layer.weight", ".weight")] = embedding.replace(".base_layer.weight", ".weight")
        if ties != known:
            setattr(model, table, ties)


def layers(model: nn.Module) -> dict[str, TrainedTokens]:
    """The wrapped modules by name; of those that share rows only the one that was named."""
    found: dict[int, tuple[str, TrainedTokens]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainedTokens) and (module.owns or id(module.trained_rows) not in found):
            found[id(module.trained_rows)] = name, module
    return dict(found.values())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained rows under peft's keys."""
    return {f"{name}.{KEY}": layer.trained_rows for name, layer in layers(model).items()}


@torch.no_grad()
def load(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Fill the trained rows of these modules."""
    for name, values in rows.items():
        layer: Any = model.get_submodule(name)
        sharded.fill(layer.trained_rows, values)


def not_finite(model: nn.Module) -> str:
    """The name of trained rows that the dtype of their weight cannot hold; "" without any."""
    for name, layer in layers(model).items():
        weight: Any = layer.base_layer.weight
        if not torch.isfinite(layer.trained_rows.to(weight.dtype)).all():
            return f"{name}.trained_rows"
    return ""


def fold(model: nn.Module) -> None:
    """Write all trained rows into the weights and remove the wrappers; tied weights with different rows are untied."""
    wrappers = [module for module in model.modules() if isinstance(module, TrainedTokens)]
    places = places_of(model, wrappers)
    rows: dict[int, nn.Parameter] = {}
    for wrapper in wrappers:
        base: Any = wrapper.base_layer
        if rows.setdefault(id(base.weight), wrapper.trained_rows) is not wrapper.trained_rows:
            base.weight = nn.Parameter(base.weight.detach().clone(), base.weight.requires_grad)
    for wrapper in wrappers:
        put(places[id(wrapper)], wrapper.fold())
    if wrappers:
        update_ties(model)
        tell_config(model)
