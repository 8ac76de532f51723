"""The forecast of memory held against measured runs: how often it is right, by runtime.

`bench/cases/memory.csv` has public measurements, each with its settings, its meter and its source. Each is compared on
its own meter: bytes allocated, or bytes reserved. What a source does that its settings do not say is in a function for
the whole source, never for one case:

    fms-acceleration   A100, TRL, flash attention, dropout .1, packed to 4,096. Fused LoRA only over quantized bases, an
                       eager MLP. Two states of transformers' loss. FSDP casts nothing to fp32
    fitcheck           T4, a loop that keeps the model's outputs in backward, no autocast, keys and values repeated
    peft               L40S, a loop of its own, transformers 5: the peak is that of the longest batch, which is not
                       published. `LONGEST` and `RESERVED` were found on half of its cases

A method of peft that is not built here is forecast as LoRA on the same layers with its count of trained values; those
that hold dense matrices of the size of the weight (`_DENSE`) have no forecast.

"half" is the half of the source's cases that no constant was fitted to: those whose line in the file is odd.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.compare.estimators import installed
from fastlora.memory import adapters
from fastlora.memory.forecast import Setup, forecast
from fastlora.memory.known import known_shape
from fastlora.planner.estimate import EVIDENCE, kind_of, operations
from fastlora.planner.gpus import card

SUMMARY = "the memory forecast, held against measured runs of other libraries"
CASES = Path(__file__).resolve().parents[1] / "cases" / "memory.csv"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "forecast.md"
_BEGIN, _END = "<!-- score -->", "<!-- /score -->"
COUNTED = Path(__file__).resolve().parents[1] / "results" / "counted.csv"
RUNTIMES = ("peft", "peft-lean", "fused", "liger", "hf-full")
LONGEST = 648  # tokens of the longest sample of peft's comparison, which are at most 768
RESERVED = 1.12  # bytes reserved a byte allocated, in peft's comparison; 1.11 is the median on a T4
_QUANTIZED = {"none": "", "nf4": "nf4-nested", "nf4 (no dq)": "nf4", "gptq 4bit": "gptq"}
_DENSE = ("osf", "boft", "waveft")
_WIDTHS = (12, 6, 8, 8, 8, 12, 11, 13)
_POLICIES = {"none": "none", "selective": "selective", "full": "full", "min": "offload"}
_PROMPTS = ("ptuning", "adaptionprompt", "trainable_tokens")


class Compared(NamedTuple):
    """A case and what was forecast. error: forecast over measured, less one; reason: why there is none."""

    line: int
    row: dict[str, str]
    measured: int
    forecast: int
    error: float
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench forecast`."""
    parser.add_argument(
        "--cases", type=Path, default=CASES, metavar="FILE", help="CSV with the columns of bench/cases/memory.csv"
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--write", action="store_true", help="write the planner's table of evidence")
    parser.add_argument("--list", action="store_true", help="print every case")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    found = list(compare(arguments.cases, arguments.runtimes))
    if arguments.list:
        for each in sorted(found, key=lambda each: each.error):
            row = each.row
            said = each.reason or f"{each.error:+7.1%}"
            print(f"{said}  {row['runtime']:<10} {row['model'][-30:]:<30} {row['method']:<8} {row['quantized']:<10} "
                  f"{row['batch']} x {row['length'][:5]} x {row['gpus']}  {each.measured / 2**30:.3f} GiB")  # fmt: skip
    print(
        f"{'runtime':>12}{'cases':>6}{'<= 5%':>8}{'<= 10%':>8}{'median':>8}{'most under':>12}{'most over':>11}"
        f"{'half, <= 5%':>13}"
    )
    for name in [*arguments.runtimes, "all"]:
        rows = [each for each in found if name in (each.row["runtime"], "all")]
        if rows:
            print("".join(f"{cell:>{width}}" for cell, width in zip(_cells(name, rows), _WIDTHS, strict=True)))
    for (name, base), errors in counted().items():
        print(f"{name}, {base}: {len(errors)} counted steps, {min(errors):+.1%} to {max(errors):+.1%}")
    for name, estimate in installed().items():
        print(_of_estimator(name, estimate, found))
    print("measured cases of trust A; a case without a forecast counts as a miss")
    if arguments.write and set(arguments.runtimes) != set(RUNTIMES):
        raise ValueError("--write needs all runtimes")
    if arguments.write:
        EVIDENCE.write_text(evidence(found))
        PAGE.write_text(page(found))
        print(f"wrote {EVIDENCE} and the table of {PAGE}")
    return 0


def _of_estimator(name: str, estimate: Callable[[Setup], int], found: list[Compared]) -> str:
    """The score of another estimator, on the cases that it has words for and whose meter is bytes allocated."""
    errors, ours = [], []
    for each in found:
        if each.reason or "reserved" in each.row["meter"].partition(";")[0]:
            continue
        try:
            errors.append(abs(estimate(settings(each.row)) / each.measured - 1))
        except ValueError:
            continue
        ours.append(abs(each.error))
    if not errors:
        return f"{name}: no case that it has words for"
    within = [f"{sum(error <= 0.05 for error in part) / len(part):.1%}" for part in (errors, ours)]
    median = sorted(errors)[len(errors) // 2]
    return (
        f"{name}: {len(errors)} cases, within 5% {within[0]}, median error {median:.1%}; "
        f"fastlora's on these {within[1]}"
    )


def page(found: list[Compared]) -> str:
    """docs/forecast.md with the score as a table."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = [
        "| runtime | cases | within 5% | within 10% | median error | most under | most over | half, within 5% |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (*RUNTIMES, "all"):
        lines.append(
            "| " + " | ".join(_cells(name, [each for each in found if name in (each.row["runtime"], "all")])) + " |"
        )
    return "\n".join([before + _BEGIN, *lines, _END + after])


def evidence(found: list[Compared]) -> str:
    """The planner's table: by runtime and kind of base the errors, and the rates that the runs on an A100 reached."""
    groups: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for each in found:
        if not each.reason:
            groups[each.row["runtime"], kind_of(settings(each.row))].append(each)
    lines = ["runtime,base,cases,within_5,under,over,rate_low,rate,rate_high,counted,counted_worst"]
    by_count = counted()
    for (name, base), rows in sorted(groups.items()):
        errors = [each.error for each in rows]
        rates = sorted(filter(None, (_rate(each.row) for each in rows)))
        said = [f"{rate:.3f}" for rate in (rates[0], rates[len(rates) // 2], rates[-1])] if rates else ["", "", ""]
        worst = f"{-min([0.0, *errors]):.3f},{max([0.0, *errors]):.3f}"
        steps = by_count.pop((name, base), [])
        also = f"{len(steps)},{max(map(abs, steps), default=0):.3f}"
        lines.append(",".join([name, base, str(len(rows)), f"{share(rows, 0.05):.3f}", worst, *said, also]))
    for (name, base), steps in sorted(by_count.items()):
        lines.append(f"{name},{base},0,0,0,0,,,,{len(steps)},{max(map(abs, steps)):.3f}")
    return "\n".join(lines) + "\n"


def counted(path: Path = COUNTED) -> dict[tuple[str, str], list[float]]:
    """Errors against the steps that `python -m bench count` counted, by runtime and kind of base."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            policy = _POLICIES.get(row["mode"].removeprefix("step-"))
            if row["metric"] != "peak_memory" or policy is None:
                continue
            name, quantized = row["kernel"].removeprefix("train_").rsplit("_", 1)
            runtime = row["provider"].removeprefix("counted-")
            shape = known_shape(re.sub(r"^llama3-", "llama-3-", name))
            if shape is None:
                continue
            setup = Setup(
                shape,
                length=int(row["M"]),
                r=int(row["R"]),
                quantized="nf4-nested",
                runtime=runtime,
                checkpointing=policy,
                autocast=runtime != "fastlora",
                capability=90,
                loss="fastlora-min" if policy == "offload" else "",
            )
            found[runtime, quantized].append(forecast(setup).allocated / 1e6 / float(row["p50"]) - 1)
    return found


def _rate(row: dict[str, str]) -> float | None:
    """The share of an A100's dense 16-bit rate that a run reached. A run on several devices names tokens of one."""
    found = re.search(r"([\d.]+) tok/s", row["notes"])
    if not found or "fms" not in row["source"]:
        return None
    return float(found[1]) * operations(settings(row)) / card("a100-80gb").rate


def _cells(name: str, rows: list[Compared]) -> list[str]:
    errors = sorted(abs(each.error) for each in rows)
    signed = [each.error for each in rows if not each.reason]
    unfitted = [each for each in rows if each.line % 2]
    middle = errors[len(errors) // 2]
    figures = (share(rows, 0.05), share(rows, 0.1), middle, min([0, *signed]), max([0, *signed]), share(unfitted, 0.05))
    return [name, str(len(rows)), *(f"{figure:.1%}" for figure in figures)]


def share(rows: list[Compared], within: float) -> float:
    """The share of cases whose forecast is off by at most `within`."""
    return sum(not each.reason and abs(each.error) <= within for each in rows) / max(1, len(rows))


def compare(path: Path = CASES, runtimes: Collection[str] = RUNTIMES) -> Iterator[Compared]:
    """Every measured case of trust A of these runtimes, with its forecast."""
    with path.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file)):
            if row["kind"] != "measured" or row["trust"] != "A" or row["runtime"] not in runtimes:
                continue
            measured = round(float(row["gib"]) * 2**30)
            try:
                size = _on_its_meter(row)
            except ValueError as error:
                yield Compared(line, row, measured, 0, 1.0, str(error))
                continue
            yield Compared(line, row, measured, size, size / measured - 1, "")


def _on_its_meter(row: dict[str, str]) -> int:
    found = forecast(settings(row))
    return round(found.allocated * (RESERVED if "reserved minus init" in row["meter"] else 1))


def settings(row: dict[str, str]) -> Setup:
    """The setup of a case.

    Raises:
        ValueError: a model whose shape is not known, or a setting that no runtime here has.
    """
    shape = known_shape(row["model"])
    if shape is None:
        raise ValueError(f"shape of {row['model']} not known")
    names = {linear.name for linear in shape.linears}
    short = (name.strip() for name in row["targets"].split(","))
    asked = tuple(full for name in short for full in (name, f"{name}_proj") if full in names)
    common = Setup(
        shape,
        "full" if row["method"].startswith("full") else "lora",
        r=int(row["rank"] or 1),
        targets=asked or "all-linear",
        quantized=_QUANTIZED[row["quantized"]],
        runtime=row["runtime"],
        batch=int(float(row["batch"])),
        checkpointing="full" if row["checkpointing"] == "yes" else "none",
    )
    for source, change in _SOURCES.items():
        if source in row["source"]:
            return change(common, row)
    raise ValueError(f"source {row['source']}: its habits are not known")


def _fms(setup: Setup, row: dict[str, str]) -> Setup:
    devices = int(row["gpus"])
    kept = "" if re.search(r"a100_80gb_(liger|granite)", row["source"]) else "-kept"
    losses = {"fused": f"fused{kept}", "liger": "chunks"}
    plain = setup.method == "full" or not setup.quantized
    return setup.with_(
        length=min(4096, setup.shape.positions or 4096),
        dropout=0.1,
        repeats=setup.shape.model_type in ("mistral", "mixtral"),
        autocast="amp" in row["dtype"],
        tables_cast=False,
        loss=losses.get(row["runtime"], f"hf-shifted{kept}"),
        devices=devices,
        gate="eager",
        sharding="fsdp" if devices > 1 else "none",
        lora="peft" if plain else "",
        runtime="peft-lean" if row["runtime"] == "peft" and devices > 1 else row["runtime"],
        optimizer="adamw-bf16" if setup.method == "full" else "adamw",
    )


def _fitcheck(setup: Setup, row: dict[str, str]) -> Setup:
    attention = re.search(r"attention (\w+)", row["notes"])
    return setup.with_(
        length=int(row["length"]),
        attention=attention[1] if attention else "sdpa",
        repeats=True,
        logits_kept=True,
        capability=75,
    )


def _peft(setup: Setup, row: dict[str, str]) -> Setup:
    full, trained = setup.method == "full", re.search(r"trainable=(\d+)", row["notes"])
    if row["method"] in _DENSE:
        raise ValueError(f"{row['method']}: dense matrices are not counted")
    method = "prompt" if row["method"] in _PROMPTS else setup.method
    if not full and setup.targets == "all-linear" and method == "lora":
        raise ValueError(f"{row['method']}: no layers are named")
    made = setup.with_(
        method=method, length=LONGEST, attention="sdpa", repeats=True, logits_kept=True, capability=89,
        dora="dora" in row["notes"].partition(";")[0], optimizer="adamw-bf16" if full else "adamw",
    )  # fmt: skip
    if full or not trained or int(trained[1]) == adapters.lora(setup.shape, setup.r, setup.targets, made.dora):
        return made
    return made.with_(trained_values=int(trained[1]))


_SOURCES = {"fms-acceleration": _fms, "fitcheck": _fitcheck, "peft": _peft}
