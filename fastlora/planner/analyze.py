"""What an adapter has learned: the singular values of each update, and what a smaller rank would cost.

The update of a linear is scaling * B A [n, k]. Its singular values are those of scaling * R_B R_A^T, where B = Q_B R_B
and A^T = Q_A R_A: a matrix of the rank's size, so nothing of the size of the weight is formed. Cutting the smallest off
gives the nearest update of a lower rank (Eckart and Young, 1936).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.files.peft_files import PREFIX, meant, read_adapter, write_adapter

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Update:
    """A layer's update. values: its singular values, largest first."""

    name: str
    r: int
    scaling: float
    values: list[float]

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(sum(value * value for value in self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the squared singular values: 1 if one direction holds all, r if they are equal."""
        total = self.norm**2
        shares = [value * value / total for value in self.values if value > 0] if total else []
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    def kept(self, r: int) -> float:
        """The share of the squared norm that the first r hold; 1 for an update of zeros."""
        total = self.norm**2
        return sum(value * value for value in self.values[:r]) / total if total else 1.0


@dataclass(frozen=True)
class Analysis:
    """An adapter's updates. refused: why it cannot be cut to a lower rank; "" if it can."""

    updates: list[Update]
    refused: str

    def kept(self, r: int) -> float:
        """The share of the whole adapter's squared norm that rank r keeps."""
        total = sum(update.norm**2 for update in self.updates)
        held = sum(update.kept(r) * update.norm**2 for update in self.updates)
        return held / total if total else 1.0


def scaling_of(config: Mapping[str, Any], name: str, r: int) -> float:
    """The factor before B A, by peft's config. name: of the layer; r: of its A."""
    alpha = meant({"lora_alpha": 8, **config}, "lora_alpha", name)
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = [key.removesuffix(_A) for key in tensors if key.endswith(_A)]
    return {name: (tensors[name + _A].float(), tensors[name + _B].float()) for name in names if name + _B in tensors}


def analyze(folder: Path) -> Analysis:
    """Look at an adapter in peft's format.

    Raises:
        ValueError: a file is missing or damaged, or the adapter is not LoRA.
    """
    config, tensors = read_adapter(folder)
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder}: {config.get('peft_type')} has no A and B to analyze; LoRA has")
    pairs = _pairs(tensors)
    if not pairs:
        raise ValueError(f"{folder}: it holds no lora_A and lora_B of a linear layer")
    updates = []
    for key, (a, b) in sorted(pairs.items()):
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{folder}: {key} is {list(b.shape)} x {list(a.shape)}, which is no pair of matrices")
        name, r = key.removeprefix(PREFIX), a.shape[0]
        scaling = scaling_of(config, name, r)
        small = torch.linalg.qr(b.double(), mode="r").R @ torch.linalg.qr(a.double().t(), mode="r").R.t()
        values = (torch.linalg.svdvals(small) * abs(scaling)).tolist()
        updates.append(Update(name, r, scaling, values))
    return Analysis(updates, _refusal(config, tensors, pairs))


def _refusal(config: Mapping[str, Any], tensors: Mapping[str, Tensor], pairs: Mapping[str, Any]) -> str:
    if config.get("use_dora"):
        return "DoRA: its magnitudes were trained for the update as it is"
    if config.get("lora_bias"):
        return "lora_bias: a bias of B is no part of the product"
    known = {name + end for name in pairs for end in (_A, _B)}
    if others := sorted(key for key in tensors.keys() - known if "lora_" in key):
        return f"{others[0]} is of another kind than a linear's pair"
    return ""


def truncate(folder: Path, out: Path, r: int) -> None:
    """Write the adapter with every update cut to rank r. Tensors that are no pair are carried over.

    Raises:
        ValueError: r out of range, an adapter that cannot be cut, or `out` that exists.
        OSError: the files cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: give another folder")
    found = analyze(folder)
    if found.refused:
        raise ValueError(f"{folder}: it cannot be cut: {found.refused}")
    most = max(update.r for update in found.updates)
    if not 1 <= r <= most:
        raise ValueError(f"truncate: the rank must be 1 to {most}, which this adapter has, not {r}")
    config, tensors = read_adapter(folder)
    pairs, kept = _pairs(tensors), dict(tensors)
    for key, (a, b) in pairs.items():
        rank = min(r, a.shape[0])
        dtype = tensors[key + _A].dtype
        scaling = scaling_of(config, key.removeprefix(PREFIX), a.shape[0])
        (qb, rb), (qa, ra) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().t())
        u, s, vh = torch.linalg.svd(rb @ ra.t() * scaling)
        root = s[:rank].sqrt()
        kept[key + _B] = ((qb @ u[:, :rank]) * root).to(dtype).contiguous()
        kept[key + _A] = (root[:, None] * (vh[:rank] @ qa.t())).to(dtype).contiguous()
    ranks = {key.removeprefix(PREFIX): min(r, a.shape[0]) for key, (a, _) in pairs.items()}
    less = {name: rank for name, rank in ranks.items() if rank != r}
    changed = {
        "r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": less, "alpha_pattern": dict(less),
        "init_lora_weights": True,
    }  # fmt: skip
    write_adapter(out, {**config, **changed}, kept)


def draw(found: Analysis, path: Path) -> None:
    """A heat map: layers across, modules down; the effective rank, and the norm of the update.

    Raises:
        ValueError: a name that ends neither in .png nor in .svg, or no matplotlib.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: a picture is a .png or a .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: it comes with the extra `train`") from error
    places = {update.name: place_of(update.name) for update in found.updates}
    modules = list(dict.fromkeys(module for _, module in places.values()))
    layers = sorted({layer for layer, _ in places.values()})
    figure = Figure(figsize=(max(5, 0.28 * len(layers) + 3), 1.2 + 0.6 * len(modules)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, of) in enumerate((("effective rank", "effective_rank"), ("norm of the update", "norm")), 1):
        axes = figure.add_subplot(2, 1, number)
        table = [[math.nan] * len(layers) for _ in modules]
        for update in found.updates:
            layer, module = places[update.name]
            table[modules.index(module)][layers.index(layer)] = getattr(update, of)
        image = axes.imshow(table, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(modules)), modules, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer" if number == 2 else "", fontsize=8)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def place_of(name: str) -> tuple[int, str]:
    """The number of a layer, and the module's name without it: ("model.layers.3.mlp.up_proj") -> (3, "up_proj")."""
    words = name.split(".")
    number = next((int(word) for word in words if word.isdigit()), 0)
    return number, words[-1]
