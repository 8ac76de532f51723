"""Explained variance adaptation: A starts as the leading right singular vectors of a layer's inputs, B = 0.

Batches of the user's data run through the model as it is. The centred inputs of each layer go into an incremental SVD.
Layers with the same input (q, k and v; gate and up) share one, that of the first of them, their representative. The
rank budget is r · (number of layers). After each batch it goes to the components that explain the largest shares of
their layer's variance, at most rho · r in a layer. A component has converged when its cosine similarity to that of the
batch before is at least tau. The search ends when every component that counts towards a rank has converged.

A layer of rank 0 gets no adapter. With `adjust_scaling_factors`, lora_alpha is scaled with the rank, so lora_alpha / r
stays the same.

The numbers are peft's for the same batches in the same order: the same randomized SVD from the same seed, in fp32 for
the first batch and in fp64 from then on. As in peft, the batches are repeated for as long as it takes. One difference:
`whiten` divides each layer's vectors once, where peft divides shared vectors once for each layer that shares them.

Source: arXiv:2410.07170; arXiv:0811.4413 (the incremental SVD with a correction for the mean's change).
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from fastlora.layers.bases import is_linear4bit
from fastlora.layers.quoted import shown

if TYPE_CHECKING:
    from fastlora.model.sites import Site

SEED, NITER = 42, 4
# A search that has not ended after this many passes over the data and this many batches never will,
MAX_PASSES, MAX_BATCHES = 100, 1000
# and neither will one that has not ended after this many batches of the first pass, which may be endless.
MAX_FRESH = 10_000


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """EVA's options, under the names of peft's `EvaConfig`.

    Args:
        rho: a layer's rank is at most rho · r; 1 leaves every layer its r.
        tau: a component has converged when its cosine similarity to that of the batch before is at least this.
        use_label_mask: leave out positions whose label is `label_mask_value`, where batches have labels.
        whiten: divide each vector by the square root of its singular value.
        adjust_scaling_factors: scale lora_alpha with a layer's rank.
    Raises:
        ValueError: a value out of its range.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        for name in ("rho", "tau"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"eva_config: {name} must be a number, not {shown(value)}")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"eva_config: {name} must be True or False, not {shown(getattr(self, name))}")
        if not isinstance(self.label_mask_value, int) or isinstance(self.label_mask_value, bool):
            raise ValueError(f"eva_config: label_mask_value must be a whole number, not {shown(self.label_mask_value)}")
        if not self.rho >= 1:
            raise ValueError(f"eva_config: rho must be at least 1, not {shown(self.rho)}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"eva_config: tau must be between 0 and 1, not {shown(self.tau)}")


def config_of(given: Any) -> EvaConfig:
    """The options as a mapping or peft's `EvaConfig` gives them; the defaults where None.

    Raises:
        ValueError: an unknown option, or a value out of its range.
    """
    if given is None or isinstance(given, EvaConfig):
        return given or EvaConfig()
    if not isinstance(given, Mapping) and not dataclasses.is_dataclass(given):
        raise ValueError(f"eva_config must be a mapping or an EvaConfig, not {shown(given)}")
    options = dict(given) if isinstance(given, Mapping) else dict(vars(given))
    known = [field.name for field in dataclasses.fields(EvaConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"eva_config has no option {shown(unknown[0])}; it has {', '.join(known)}")
    return EvaConfig(**options)


@torch.no_grad()
def components(model: nn.Module, sites: "Mapping[str, Site]", dataloader: Any, config: EvaConfig) -> dict[str, Tensor]:
    """What A starts as in each layer. The model is run and left as it was.

    In a process group every process must call this, with batches of its own. The inputs of all processes are put
    together, so all find the same.

    Args:
        sites: the layers by name, in the model's order.
        dataloader: batches, each a mapping of the model's arguments, a tuple of them, or one tensor; read more than
            once. Positions that `attention_mask` or `labels` mask are left out.
    Returns:
        A [R, K] by name, fp32 or fp64; R may be 0.
    Raises:
        ValueError: no data, batches too small for the ranks, inputs that are not finite, rho · r above the number of a
            layer's inputs, or a search that does not end.
    """
    counts = {name: round(site.r * config.rho) for name, site in sites.items()}
    for name, site in sites.items():
        if counts[name] > site.shape[1]:
            raise ValueError(
                f"EVA looks for rho * r = {counts[name]} components in the inputs of {name}, which have "
                f"{site.shape[1]} features: lower rho={config.rho} or r={site.r}"
            )
    first = _first(dataloader)
    with _ready(model):
        modules = {name: site.module for name, site in sites.items()}
        represented_by = _representatives(model, modules, first, config)
        for name, representative in represented_by.items():
            counts[representative] = max(counts[representative], counts[name])
        counts = {name: counts[representative] for name, representative in represented_by.items()}
        budget = sum(site.r for site in sites.values())
        ranks, found = _search(model, modules, represented_by, counts, budget, dataloader, config)
    result = {}
    for name in sites:
        svd, rank = found[represented_by[name]], ranks[name]
        vectors = svd.components[:rank].clone()
        result[name] = vectors / svd.singular[:rank].sqrt().unsqueeze(1) if config.whiten else vectors
    return result


class IncrementalSVD:
    """The leading right singular vectors of rows that arrive in batches, centred by the mean of all rows so far.

    Args:
        name: of the layer, for messages. count: the number of vectors. tau: the similarity at which one has converged.
    """

    components: Tensor
    singular: Tensor
    _mean: Tensor
    _scatter: Tensor

    def __init__(self, name: str, count: int, tau: float) -> None:
        self.name, self.count, self.tau = name, count, tau
        self.rows, self.largest = 0, 0
        self.converged = torch.zeros(count, dtype=torch.bool)

    def update(self, x: Tensor) -> None:
        """Take in a batch [T, K]; a batch with fewer rows than vectors is left out."""
        self.largest = max(self.largest, x.shape[0])
        if x.shape[0] < self.count:
            return
        if not torch.isfinite(x).all():
            raise ValueError(f"the inputs of {self.name} hold NaN or inf: EVA cannot start from them")
        x, wide, before = x.float(), x.double(), self.rows
        mean = wide.mean(0)
        scatter = (wide - mean).square().sum()
        if before:
            # the difference of the two means adds one more row
            weight = before * x.shape[0] / (before + x.shape[0])
            shift = (self._mean - mean) * weight**0.5
            known = self.singular.unsqueeze(1) * self.components  # [count, K]
            rows = torch.cat((known, x - mean.float(), shift.unsqueeze(0)))  # [count + T + 1, K]
            self._scatter = self._scatter + scatter + shift.square().sum()
            self._mean = self._mean + (mean - self._mean) * (x.shape[0] / (before + x.shape[0]))
        else:
            rows, self._mean, self._scatter = (x - mean).float(), mean, scatter
        self.rows = before + x.shape[0]
        singular, vectors = _svd(rows, 2 * self.count)
        if before:
            similarity = torch.nn.functional.cosine_similarity(vectors[: self.count], self.components)
            self.converged = similarity.cpu() >= self.tau
        self.components, self.singular = vectors[: self.count], singular[: self.count]

    @property
    def explained(self) -> Tensor:
        """[count]: the share of the variance that each vector explains; 0 where all rows are the same."""
        return (self.singular.square() / self._scatter).nan_to_num(0.0).cpu()


def _svd(rows: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """(singular values [q], right singular vectors [q, K]); the largest element of each vector is positive."""
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
        # this device's generator only: torch.manual_seed would seed those of all devices
        (torch.cuda.default_generators[rows.device.index] if rows.is_cuda else torch.default_generator).manual_seed(
            SEED
        )
        _, singular, v = torch.svd_lowrank(rows, q=q, niter=NITER)
    vectors = v.t()
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return singular, vectors * largest.sign()


def _search(
    model: nn.Module, modules: dict[str, nn.Module], represented_by: dict[str, str], counts: dict[str, int],
    budget: int, dataloader: Any, config: EvaConfig,
) -> tuple[dict[str, int], dict[str, IncrementalSVD]]:  # fmt: skip
    """Run batches until every component that counts has converged: ranks by name, SVDs by representative."""
    found = {
        name: IncrementalSVD(name, counts[name], config.tau) for name, first in represented_by.items() if name == first
    }
    ranks = dict(counts)
    for steps, (number, batch) in enumerate(_repeated(dataloader)):
        unsettled = [svd for name, svd in found.items() if not svd.converged[: ranks[name]].all()]
        if not unsettled:
            return ranks, found
        short = next((svd for svd in found.values() if not svd.rows), None)
        if short and (number or steps >= MAX_BATCHES):
            raise ValueError(
                f"EVA needs at least {short.count} positions in a batch (rho * r) for {short.name}, and none of "
                f"{steps} batches has more than {short.largest}: give larger batches, or lower rho or r"
            )
        if (number >= MAX_PASSES and steps >= MAX_BATCHES) or (not number and steps >= MAX_FRESH):
            raise ValueError(
                f"EVA has not converged in {steps} batches; {len(unsettled)} layers such as {unsettled[0].name} have "
                f"not: lower tau={config.tau} or rho={config.rho}, or give more data"
            )
        asked = {svd.name: modules[svd.name] for svd in unsettled}
        _run(model, asked, batch, config, lambda name, x: found[name].update(x))
        if all(svd.rows for svd in found.values()):
            ranks = _ranks(found, represented_by, counts, budget)
    raise AssertionError("the batches are repeated without end")


def _ranks(
    found: dict[str, IncrementalSVD], represented_by: dict[str, str], counts: dict[str, int], budget: int
) -> dict[str, int]:
    """The rank of each layer: the budget goes to the components that explain the largest shares."""
    order = [*found, *(name for name in represented_by if name not in found)]
    owners = [name for name in order for _ in range(counts[name])]
    shares = torch.cat([found[represented_by[name]].explained[: counts[name]].double() for name in order])
    ranks = dict.fromkeys(order, 0)
    for index in shares.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[owners[index]] += 1
    for name in order[len(found) :]:
        # of two ranks that a tie made different, the representative takes the higher: convergence is checked on it
        first = represented_by[name]
        ranks[first], ranks[name] = max(ranks[first], ranks[name]), min(ranks[first], ranks[name])
    return ranks


def _representatives(model: nn.Module, modules: dict[str, nn.Module], batch: Any, config: EvaConfig) -> dict[str, str]:
    """Layer -> the first layer with the same input, which may be itself; representatives first, then by them.

    An input without rows says nothing: experts that get no token in this batch represent only themselves.
    """
    digests: dict[str, bytes] = {}

    def note(name: str, x: Tensor) -> None:
        if name not in digests and x.shape[0]:
            content = x.contiguous().cpu().view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.blake2b(f"{list(x.shape)} {x.dtype}".encode() + content).digest()

    _run(model, modules, batch, config, note)
    groups: dict[bytes, list[str]] = {}
    for name in modules:
        groups.setdefault(digests.get(name, name.encode()), []).append(name)
    first_of = {names[0]: names[0] for names in groups.values()}
    return first_of | {name: names[0] for names in groups.values() for name in names[1:]}


def _run(
    model: nn.Module, modules: dict[str, nn.Module], batch: Any, config: EvaConfig, take: Callable[[str, Tensor], None]
) -> None:
    """Call the model on a batch and pass each module's input [T, K], without masked positions, to `take`."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    batch = _moved(batch, device)
    mask = _mask(batch, config)
    called = {id(module): name for name, module in modules.items()}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        masked = mask is not None and x.shape[:-1] == mask.shape
        x = x[mask.to(x.device)] if mask is not None and masked else x.reshape(-1, x.shape[-1])
        take(called[id(module)], _of_all_processes(x))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules.values()]
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for handle in handles:
            handle.remove()


def _mask(batch: Any, config: EvaConfig) -> Tensor | None:
    """[batch, positions] bool: which positions count; None if all do."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    labels = batch.get("labels") if config.use_label_mask else None
    if isinstance(labels, Tensor) and labels.ndim == 2 and (mask is None or mask.shape == labels.shape):
        labelled = labels != config.label_mask_value
        mask = labelled if mask is None else mask & labelled
    return mask


def _of_all_processes(x: Tensor) -> Tensor:
    """[T, K] of this process -> [sum of all T, K]: the rows of all processes, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor([x.shape[0]], device=x.device))
    lengths = [int(size) for size in sizes]
    padded = x.new_zeros(max(lengths), x.shape[1])
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, except bitsandbytes' layers: on some CPUs these repack their weight when called in it."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = is_linear4bit(module)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _first(dataloader: Any) -> Any:
    """The first batch.

    Raises:
        ValueError: no batches, or batches that can be read only once.
    """
    wanted = "a DataLoader or a list of batches"
    if dataloader is None:
        raise ValueError(f"init_lora_weights='eva' starts from data: pass eva_dataloader, {wanted}")
    if not isinstance(dataloader, Iterable) or isinstance(dataloader, (Mapping, Tensor, str)):
        raise ValueError(f"eva_dataloader must be {wanted}, not a {type(dataloader).__name__}")
    iterator = iter(dataloader)
    if iterator is dataloader:
        raise ValueError(f"eva_dataloader is read more than once: pass {wanted}, not a {type(dataloader).__name__}")
    for batch in iterator:
        if not isinstance(batch, (Mapping, Tensor, tuple, list)):
            raise ValueError(f"eva_dataloader gives a {type(batch).__name__}: it must give mappings, tuples or tensors")
        return batch
    raise ValueError(f"eva_dataloader is empty: pass {wanted}")


def _repeated(dataloader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """(number of the pass, batch), endlessly; later passes repeat the first one's batches in its order."""
    kept = []
    for batch in dataloader:
        kept.append(batch)
        yield 0, batch
    for number in itertools.count(1):
        for batch in kept:
            yield number, batch


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_moved(value, device) for value in batch]
    return batch
