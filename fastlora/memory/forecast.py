"""The memory of a run on one device: what is held before a step, and what a step adds at its peak.

`Setup` says what is run; `forecast` counts it. Weights, adapters, their gradients and the optimizer's state come from
formulas, each in its file. Activations, recomputed layers, logits and scratch come from the step itself, which runs on
tensors without values (`step`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

from fastlora.memory import adapters, optimizer, overhead, weights
from fastlora.memory.layer import Layers
from fastlora.memory.loss import KINDS
from fastlora.memory.runtimes import Runtime, runtime
from fastlora.memory.shape import ModelShape
from fastlora.memory.sizes import FP32, HALF, Book
from fastlora.memory.step import Step, run_step

CHECKPOINTING = ("none", "selective", "full", "offload")
ATTENTION = ("flash", "sdpa", "eager")
SHARDINGS = ("none", "ddp", "fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class Setup:
    """A run.

    Attributes:
        shape: of the model.
        method: one of `adapters.METHODS`; qlora is lora over NF4.
        length, batch: tokens of a sample; samples of one device's forward pass.
        quantized: one of `weights.QUANTIZED`, or "" for a base of `width` bytes a value.
        optimizer: one of `optimizer.OPTIMIZERS`.
        checkpointing: "none", "full" or "offload"; "": what the runtime does.
        autocast: 16-bit products by autocast; adapters are fp32 either way if `trained_width` is 4.
        loss, lora, gate: as `loss.KINDS` and `layer.Layers` have them; "": the runtime's.
        tables_cast: whether the casts of runtime "peft" reach embeddings and head (TRL takes those back under bf16).
        devices, sharding: one of `SHARDINGS`.
        trained_values: trained values, where they are known; None: counted from the method.
        capability: of the device, as 80 for sm_80.
    """

    shape: ModelShape
    method: str = "lora"
    length: int = 2048
    batch: int = 1
    r: int = 16
    targets: tuple[str, ...] | str = "all-linear"
    dora: bool = False
    bottleneck: int = 64
    virtual_tokens: int = 20
    quantized: str = ""
    width: float = HALF
    trained_width: float = FP32
    dropout: float = 0.0
    optimizer: str = "adamw"
    runtime: str = "fastlora"
    checkpointing: str = ""
    autocast: bool = False
    attention: str = "flash"
    repeats: bool = False
    loss: str = ""
    lora: str = ""
    gate: str = ""
    logits_kept: bool | None = None
    tables_cast: bool = True
    micro_batches: int = 1
    devices: int = 1
    sharding: str = "none"
    capability: int = 80

    trained_values: int | None = None

    def with_(self, **changes: Any) -> "Setup":
        return replace(self, **changes)

    @property
    def trained(self) -> int:
        """Trained values."""
        return count_trained(self) if self.trained_values is None else self.trained_values


@dataclass(frozen=True)
class Forecast:
    """Bytes on one device.

    Attributes:
        terms: bytes at the peak, by name; their sum is `allocated`.
        allocated: what `torch.cuda.max_memory_allocated` would say.
        context: of CUDA, not torch's.
        moment: when the peak is.
        largest: (term, name, bytes) at the peak, the largest first.
        entries: of weights: how each was found.
    """

    setup: Setup
    terms: dict[str, int]
    allocated: int
    context: int
    moment: str
    largest: list[tuple[str, str, int]]
    entries: list[weights.Entry] = field(default_factory=list)


def count_trained(setup: Setup) -> int:
    """How many values a run trains.

    Raises:
        ValueError: an unknown method, or targets that the model does not have.
    """
    shape = setup.shape
    match setup.method:
        case "lora" | "qlora":
            return adapters.lora(shape, setup.r, setup.targets, setup.dora)
        case "houlsby":
            return adapters.houlsby(shape, setup.bottleneck)
        case "prefix":
            return adapters.prefix(shape, setup.virtual_tokens)
        case "prompt":
            return adapters.prompt(shape, setup.virtual_tokens)
        case "full":
            return shape.parameters
        case "inference":
            return 0
    raise ValueError(f"method must be one of {', '.join(adapters.METHODS)}, not {setup.method!r}")


def forecast(setup: Setup) -> Forecast:
    """What a run holds at its peak on one device.

    Raises:
        ValueError: a name that is unknown, or a size that cannot be.
    """
    setup = _checked(setup)
    kind, shape, full = runtime(setup.runtime), setup.shape, setup.method == "full"
    book = Book()
    sharded = setup.devices if setup.sharding in ("fsdp", "zero3") else 1
    casts = kind.casts and bool(setup.quantized)
    norm_width = FP32 if casts else setup.width
    table_width = FP32 if casts and setup.tables_cast else setup.width
    entries = weights.entries(shape, setup.quantized, setup.width, norm_width, table_width)
    for entry in entries:
        book.hold("weights", entry.name, entry.size / sharded)
    trained = setup.trained
    states = optimizer.state_bytes(trained, setup.optimizer) if trained else 0
    parts = setup.devices if setup.sharding in ("fsdp", "zero2", "zero3") else 1
    if not full:
        book.hold("adapters", setup.method, trained * setup.trained_width / sharded)
    book.hold("optimizer", setup.optimizer, states / parts)
    book.hold("workspaces", "of cuBLAS", overhead.workspaces(setup.capability))
    if sharded > 1:
        _hold_gathered(book, setup, entries)
    if trained and setup.sharding == "ddp":
        book.hold("gradients", "buckets of DDP", trained * (setup.width if full else setup.trained_width))
    checkpointing = setup.checkpointing or kind.checkpointing
    run = _layers(setup, kind, book, norm_width, table_width)
    if setup.method == "prompt":
        book.hold("gradients", "of the prompt", trained * setup.trained_width)
    step = Step(
        checkpointing=checkpointing,
        again=setup.sharding == "fsdp",
        loss=setup.loss or kind.loss,
        logits_kept=kind.logits_kept if setup.logits_kept is None else setup.logits_kept,
        micro_batches=setup.micro_batches,
        residual_width=table_width if not setup.autocast or casts else setup.width,
        inputs_train=not full and (setup.method not in ("houlsby", "prefix") or checkpointing != "none"),
    )
    if setup.method == "inference":
        step = replace(step, checkpointing="none")
    if setup.method == "inference":
        cache = 2 * shape.layers * shape.kv_features * setup.length * setup.batch * setup.width
        book.hold("activations", "cache of keys and values", cache)
        with book.said(recording=False):
            run_step(run, step)
    else:
        run_step(run, step)
        with book.said(doing="the optimizer's step", term="optimizer"):
            more = optimizer.update_bytes(trained, setup.trained_width if not full else setup.width, setup.optimizer)
            held = book.tensor("denominators", more / parts, 1)
            del held
    terms: dict[str, int] = {}
    for (term, _), size in book.at_peak.items():
        terms[term] = terms.get(term, 0) + size
    largest = sorted(((*key, size) for key, size in book.at_peak.items() if size), key=lambda item: -item[2])
    return Forecast(
        setup,
        {k: v for k, v in terms.items() if v},
        book.peak,
        overhead.context(setup.capability),
        book.moment,
        largest,
        entries,
    )


def _checked(setup: Setup) -> Setup:
    for name in ("length", "batch", "r", "devices", "micro_batches", "bottleneck", "virtual_tokens"):
        if getattr(setup, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(setup, name)}")
    choices = {
        "method": adapters.METHODS, "sharding": SHARDINGS, "quantized": ("", *weights.QUANTIZED),
        "checkpointing": ("", *CHECKPOINTING), "attention": ATTENTION, "optimizer": optimizer.OPTIMIZERS,
        "loss": ("", *KINDS),
    }  # fmt: skip
    for name, possible in choices.items():
        if (given := getattr(setup, name)) not in possible:
            raise ValueError(f"{name} must be one of {', '.join(filter(None, possible))}, not {given!r}")
    if setup.method == "full" and setup.quantized:
        raise ValueError("full fine-tuning trains every weight: a quantized base cannot be trained")
    if setup.method == "qlora" and not setup.quantized:
        return replace(setup, quantized="nf4-nested")
    return setup


def _layers(setup: Setup, kind: Runtime, book: Book, norm_width: float, table_width: float) -> Layers:
    ranks = {}
    if setup.method in ("lora", "qlora"):
        ranks = {each.name: setup.r for each in adapters.targeted(setup.shape, setup.targets)}
    extra = setup.virtual_tokens if setup.method == "prompt" else 0
    return Layers(
        book,
        setup.shape,
        tokens=setup.batch * (setup.length + extra),
        samples=setup.batch,
        ranks=ranks,
        trained=setup.trained_width,
        dropout=setup.dropout > 0,
        quantized=setup.quantized,
        width=setup.width,
        autocast=setup.autocast,
        norm_width=norm_width,
        head_width=table_width,
        lora=setup.lora or kind.lora,
        norm=kind.norm,
        rotary=kind.rotary,
        gate=setup.gate or kind.gate,
        attention=setup.attention,
        repeats=setup.repeats or setup.method == "prefix",  # a mask with a prefix in it rules out grouped queries
        at_once=kind.lora == "fastlora",
        full=setup.method == "full",
        dora=setup.dora,
        shards=setup.devices if setup.sharding in ("fsdp", "zero2", "zero3") else 1,
        bottleneck=setup.bottleneck if setup.method == "houlsby" else 0,
        prefix=setup.virtual_tokens if setup.method == "prefix" else 0,
    )


def _hold_gathered(book: Book, setup: Setup, entries: list[weights.Entry]) -> None:
    """What is whole while it is used: the root's tables, and one layer."""
    tables = sum(entry.size for entry in entries if entry.name in ("embeddings", "lm_head"))
    linears = entries[0].size / setup.shape.layers
    book.hold("weights", "gathered: embeddings and head", tables * (1 - 1 / setup.devices))
    book.hold("weights", "gathered: one layer", linears)
