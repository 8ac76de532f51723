"""A forecast as a user asks for it: a model by name, a card, and an answer with its range and the evidence behind it.

The range is what measured runs of the same runtime and kind of base allow: their worst errors under and over
(`evidence.csv`, written by `python -m bench forecast --write`), and the memory that the allocator holds beyond what is
in use. A runtime without measured runs gets the widest range and says so.
"""

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastlora.memory import forecast as memory
from fastlora.memory.adapters import METHODS
from fastlora.memory.forecast import Forecast, Setup
from fastlora.memory.runtimes import runtime as runtime_of
from fastlora.memory.sizes import FP32, HALF
from fastlora.planner.gpus import Card, card
from fastlora.planner.models import Named, resolve

EVIDENCE = Path(__file__).with_name("evidence.csv")
RESERVED = (1.04, 1.11, 1.2)  # bytes reserved a byte in use: the least, the median and nine in ten of 30 runs on a T4
_UNKNOWN_ERROR, _COUNTED_ERROR = 0.15, 0.05  # of a runtime that was never measured; that was counted
_DTYPES = {"bf16": HALF, "fp16": HALF, "fp32": FP32}
_OTHER_TERMS = {"recomputed": "activations", "logits and loss": "logits"}


@dataclass(frozen=True)
class Evidence:
    """Measured runs like the one that is forecast. under, over: the worst errors, as shares of what was measured.

    rates: the share of a card's dense 16-bit rate that they reached: the least, the median, the most.
    """

    cases: int
    within_5: float
    under: float
    over: float
    rates: tuple[float, float, float] | None
    counted: int = 0
    counted_worst: float = 0.0

    @property
    def margins(self) -> tuple[float, float]:
        """How far a forecast may be under and over, as shares."""
        if self.cases:
            return self.under, self.over
        assumed = max(_COUNTED_ERROR, 2 * self.counted_worst) if self.counted else _UNKNOWN_ERROR
        return assumed, assumed

    def __str__(self) -> str:
        if not self.cases and self.counted:
            return (
                f"no measured run of this kind; {self.counted} steps counted on tensors without memory, worst "
                f"{self.counted_worst:.1%}; {self.margins[0]:.0%} either way is assumed"
            )
        if not self.cases:
            return f"no measured run of this kind; {_UNKNOWN_ERROR:.0%} either way is assumed"
        return (
            f"{self.cases} measured cases of this runtime and kind of base: {self.within_5:.0%} within 5%, "
            f"worst {-self.under:+.1%} and {self.over:+.1%}"
        )


@dataclass(frozen=True)
class Estimate:
    """The answer. Bytes are those of one device.

    Attributes:
        allocated: tensors at the peak; expected: with the allocator's slack and the CUDA context.
        low, high: the range of `expected`.
        verdict: "fits", "does not fit" or "uncertain"; "" where no card was named.
        ways: changes that would make it fit, each with its expected bytes.
        tokens_per_second: (low, middle, high) of all devices, predicted; None where no rate was ever measured.
    """

    model: Named
    forecast: Forecast
    card: Card | None
    evidence: Evidence
    allocated: int
    expected: int
    low: int
    high: int
    verdict: str
    ways: list[tuple[str, int]]
    tokens_per_second: tuple[float, float, float] | None

    @property
    def fits(self) -> bool | None:
        """True, False, or None where it is uncertain or no card was named."""
        return {"fits": True, "does not fit": False}.get(self.verdict)

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term; their sum is `expected`."""
        found: dict[str, int] = {}
        for name, size in self.forecast.terms.items():
            name = _OTHER_TERMS.get(name, name)
            found[name] = found.get(name, 0) + size
        slack = self.expected - self.allocated - self.forecast.context
        return {**found, "context": self.forecast.context, "slack": slack}

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        names = (
            "weights",
            "adapters",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "scratch",
            "batch",
            "workspaces",
            "context",
            "slack",
        )
        setup, shape = self.forecast.setup, self.model.shape
        return {
            "model": self.model.name,
            "shape_from": self.model.source,
            "parameters": shape.parameters,
            "trained_parameters": setup.trained,
            "method": setup.method,
            "runtime": setup.runtime,
            "length": setup.length,
            "batch": setup.batch,
            "gpu": self.card and self.card.name,
            "gpus": setup.devices,
            "gpu_bytes": self.card and self.card.memory,
            "total_bytes": self.expected,
            "low_bytes": self.low,
            "high_bytes": self.high,
            "allocated_bytes": self.allocated,
            **{f"{name}_bytes": self.terms.get(name, 0) for name in names},
            "fits": self.fits,
            "verdict": self.verdict,
            "peak_during": self.forecast.moment,
            "evidence": str(self.evidence),
            "ways": [{"change": change, "total_bytes": size} for change, size in self.ways],
            "tokens_per_second": self.tokens_per_second and self.tokens_per_second[1],
        }


def forecast(
    model: str = "",
    *,
    params: str | None = None,
    method: str = "qlora",
    length: int = 2048,
    batch: int = 1,
    r: int = 16,
    targets: str | tuple[str, ...] = "all-linear",
    dora: bool = False,
    dropout: float = 0.0,
    bottleneck: int = 64,
    virtual_tokens: int = 20,
    quantize: str | None = None,
    dtype: str = "",
    optimizer: str = "",
    checkpointing: str = "",
    attention: str = "flash",
    micro_batches: int = 1,
    runtime: str = "fastlora",
    gpu: str | None = None,
    gpus: int = 1,
    sharding: str = "",
    advise: bool = True,
) -> Estimate:
    """What a run will hold in the memory of each device.

    Args:
        model: a folder with config.json, a hub name, or a known name as llama-3-8b; params: instead, as 7B.
        method: lora, qlora, full, houlsby, prefix, prompt or inference.
        length, batch: tokens of a sample, samples of one device's forward pass.
        dtype: of what is not quantized: bf16, fp16 or fp32; "": bf16, and fp32 under autocast for full fine-tuning by
            fastlora, which trains no weight in 16 bits.
        quantize: nf4, nf4-nested, int8 or gptq; None: nf4-nested for qlora, else none.
        optimizer: one of `memory.optimizer.OPTIMIZERS`; "": adamw, in bf16 for full fine-tuning of a bf16 model.
        checkpointing: none, selective, full or offload; "": what the runtime does.
        runtime: one of `memory.runtimes.RUNTIMES`.
        gpu: a card's name or size; None: no verdict.
        sharding: none, ddp, fsdp, zero2 or zero3; "": ddp over several devices, fsdp for full fine-tuning.
        advise: look for changes that make it fit where it does not.

    Raises:
        ValueError: something unknown or out of range; the message names it and says what is possible.
    """
    named = resolve(model, params)
    chosen = card(gpu) if gpu else None
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    dtype = dtype or ("fp32" if method == "full" and runtime == "fastlora" else "bf16")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    if gpus > 1 and not sharding:
        sharding = "fsdp" if method == "full" else "ddp"
    kind = runtime_of(runtime)
    width, full = _DTYPES[dtype], method == "full"
    setup = Setup(
        named.shape, method, length, batch, r, targets, dora, bottleneck, virtual_tokens,
        quantized={"none": "", None: "nf4-nested" if method == "qlora" else ""}.get(quantize, quantize or ""),
        width=width, dropout=dropout, optimizer=optimizer or ("adamw-bf16" if full and width == HALF else "adamw"),
        runtime=runtime, checkpointing=checkpointing,
        autocast=width == FP32 if full else kind.lora != "fastlora" and width == HALF,
        attention=attention, micro_batches=micro_batches, devices=gpus, sharding=sharding or "none",
        capability=chosen.capability if chosen else 80,
    )  # fmt: skip
    return _estimate(named, setup, chosen, advise)


def estimate_of(named: Named, setup: Setup, gpu: str | None, advise: bool = True) -> Estimate:
    """As `forecast`, of a setup that is there already.

    Raises:
        ValueError: an unknown card.
    """
    chosen = card(gpu) if gpu else None
    return _estimate(named, setup.with_(capability=chosen.capability) if chosen else setup, chosen, advise)


def _estimate(named: Named, setup: Setup, chosen: Card | None, advise: bool) -> Estimate:
    found = memory.forecast(setup)
    known = evidence_for(setup)
    under, over = known.margins
    allocated, context = found.allocated, found.context
    least, median, most = RESERVED
    low = round(allocated / (1 + over) * least) + context
    high = round(allocated / (1 - under) * most) + context
    expected = round(allocated * median) + context
    verdict = "" if chosen is None else _verdict(low, high, chosen.memory)
    ways = _ways(named, setup, chosen) if advise and chosen and verdict != "fits" else []
    return Estimate(
        named, found, chosen, known, allocated, expected, low, high, verdict, ways, _rate(setup, chosen, known)
    )


def _verdict(low: int, high: int, memory: int) -> str:
    return "fits" if high <= memory else "does not fit" if low > memory else "uncertain"


def _ways(named: Named, setup: Setup, chosen: Card | None) -> list[tuple[str, int]]:
    """Single changes, and then several, that make a run fit."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if setup.batch > 1:
        changes.append(("batch 1, and as many micro-batches", {"batch": 1, "micro_batches": setup.batch}))
    if setup.checkpointing not in ("full", "offload") and setup.method != "inference":
        changes.append(("checkpointing full", {"checkpointing": "full"}))
    if setup.checkpointing != "offload" and setup.runtime in ("fastlora", "unsloth"):
        changes.append(("checkpointing offload", {"checkpointing": "offload"}))
    if setup.method == "lora" and not setup.quantized:
        changes.append(("method qlora", {"method": "qlora", "quantized": "nf4-nested"}))
    if setup.method == "full":
        changes.append(("method lora", {"method": "lora", "optimizer": "adamw"}))
        changes.append(("method qlora", {"method": "qlora", "quantized": "nf4-nested", "optimizer": "adamw"}))
    if setup.optimizer.startswith("adamw") and "8bit" not in setup.optimizer and setup.method == "full":
        changes.append(("optimizer adamw-8bit", {"optimizer": "adamw-8bit"}))
    if setup.runtime != "fastlora" and setup.method != "inference":
        changes.append(("runtime fastlora", {"runtime": "fastlora", "autocast": False}))
    if setup.length > 512:
        changes.append((f"length {setup.length // 2}", {"length": setup.length // 2}))
    for devices in (2, 4, 8):
        if devices > setup.devices:
            changes.append((f"{devices} devices with fsdp", {"devices": devices, "sharding": "fsdp"}))
    everything: dict[str, Any] = {}
    fitting, together = [], []
    for name, change in changes:
        alone = _estimate(named, setup.with_(**change), chosen, advise=False)
        if alone.fits:
            fitting.append((name, alone.expected))
    for name, change in changes:
        if fitting or "devices" in name or "method" in name:
            continue
        everything |= change
        together.append(name)
        both = _estimate(named, setup.with_(**everything), chosen, advise=False)
        if both.fits:
            return [(", ".join(together), both.expected)]
    return fitting


def kind_of(setup: Setup) -> str:
    """What evidence is kept by: the kind of base, or "full"."""
    if setup.method == "full":
        return "full"
    return "dense" if not setup.quantized else setup.quantized.partition("-")[0]


@cache
def _table() -> dict[tuple[str, str], Evidence]:
    found = {}
    with EVIDENCE.open(newline="") as file:
        for row in csv.DictReader(file):
            rates = tuple(float(row[name]) for name in ("rate_low", "rate", "rate_high")) if row["rate"] else None
            found[row["runtime"], row["base"]] = Evidence(
                int(row["cases"]), float(row["within_5"]), float(row["under"]), float(row["over"]), rates,  # type: ignore[arg-type]
                int(row["counted"]), float(row["counted_worst"]),
            )  # fmt: skip
    return found


def evidence_for(setup: Setup) -> Evidence:
    """The measured runs of the same runtime and kind of base."""
    name = "hf-full" if setup.method == "full" and setup.runtime in ("peft", "peft-lean", "hf-full") else setup.runtime
    return _table().get((name, kind_of(setup)), Evidence(0, 0.0, 0.0, 0.0, None))


def operations(setup: Setup) -> float:
    """Floating-point operations of a token of a training step, a multiply-add counted twice.

    2 a weight in forward, 2 for the gradient of its input, 2 for its own where it is trained, and 2 again where it is
    recomputed; attention has 4 length/2 features a layer and pass, and 2.5 passes in backward.
    """
    shape = setup.shape
    active = shape.parameters - shape.embeddings - (0 if not shape.tied else -shape.vocabulary * shape.hidden)
    if shape.experts:
        idle = sum(linear.weights for linear in shape.linears if linear.copies > 1) * (1 - shape.active / shape.experts)
        active -= round(shape.layers * idle)
    checkpointing = setup.checkpointing or runtime_of(setup.runtime).checkpointing
    passes = 2 + (setup.method == "full") + (checkpointing in ("full", "offload"))
    attention = shape.layers * 2 * setup.length * shape.q_features * (1 + 2.5 + (checkpointing in ("full", "offload")))
    return 2 * active * passes + attention


def _rate(setup: Setup, chosen: Card | None, known: Evidence) -> tuple[float, float, float] | None:
    if chosen is None or not chosen.rate or setup.method == "inference":
        return None
    rates = known.rates
    if rates is None and setup.runtime in ("fastlora", "unsloth", "torchtune"):
        like = evidence_for(replace(setup, runtime="fused"))  # as another runtime with fused kernels
        rates = like.rates
    if rates is None:
        return None
    each = chosen.rate * setup.devices / operations(setup)
    return rates[0] * each, rates[1] * each, rates[2] * each
