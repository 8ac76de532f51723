"""Counts of trained parameters against printed ones, and back from a count to the options that give it."""

import csv
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fastlora.memory import adapters
from fastlora.memory.forecast import Setup, count_trained
from fastlora.memory.known import known_shape
from fastlora.planner import counts, picture

CASES = Path(__file__).resolve().parents[2] / "bench" / "cases" / "parameters.csv"
ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
# other architectures than `memory.shape` knows, or adapters of which one factor is shared by all experts
COVERED = 59


def _setup(row):
    """The options of a printed count; None if the model or the method is not counted here."""
    shape = known_shape(row["model"])
    config, method = row["config"], row["method"]
    if shape is None or "shared-outer" in config:
        return None
    if method in ("lora", "qlora", "dora"):
        if any(word in config for word in ("lorafa", "mica", "bdlora", "tokens", "vocabulary")):
            return None
        rank = re.search(r"r=?(\d+)", config.replace("rank", "r="))
        names = re.search(r"targets=([\w,]+)", config)
        short = re.search(r"(?:, |^)(?:default targets \()?([qkvo](?:,[qkvo])*)\)?(?:$|;| )", config)
        if names:
            targets = names[1]
        elif short:
            targets = ",".join(f"{letter}_proj" for letter in short[1].split(","))
        elif "q_proj only" in config:
            targets = "q_proj"
        elif config.endswith(", attn"):
            targets = ATTENTION
        elif config.endswith(", mlp"):
            targets = MLP
        elif config.endswith("unembed"):
            targets = adapters.HEAD
        elif re.search(r"\ball\b|392 tensors", config):
            targets = "all-linear"
        else:
            return None
        if not rank:
            rank = re.search(r"r(\d+)", config)
        return Setup(shape, r=int(rank[1]), targets=targets, dora=method == "dora" or "dora" in config)
    if method == "full-finetuning":
        return Setup(shape, "full")
    return None


def _rows():
    with CASES.open(newline="") as file:
        return list(csv.DictReader(file))


def test_printed_counts_are_what_is_counted():
    wrong, covered = [], 0
    for row in _rows():
        setup = _setup(row)
        if setup is None or not row["trained"].isdigit():
            continue
        covered += 1
        if count_trained(setup) != int(row["trained"]):
            wrong.append((row["model"], row["config"], row["trained"], count_trained(setup)))
    assert wrong == []
    assert covered == COVERED


@pytest.mark.parametrize(
    ("model", "count", "said"),
    [
        ("llama-3-8b", 20_971_520, "LoRA, rank 8, all-linear"),
        ("llama-3-8b", 41_943_040, "LoRA, rank 16, all-linear"),
        ("llama-3-8b", 6_815_744, "LoRA, rank 16, q_proj,v_proj"),
        ("llama-3-8b", 33_820_672, "Houlsby adapters of 64"),
        ("llama-2-7b", 5_242_880, "a prefix of 20 tokens"),
        ("llama-3-8b", 81_920, "a prompt of 20 tokens"),
        ("llama-3-8b", 8_030_261_248, "every parameter"),
    ],
)
def test_a_printed_count_is_explained(model, count, said):
    assert said in counts.explain(known_shape(model), count)


def test_a_count_that_nothing_gives_is_not_explained():
    assert counts.explain(known_shape("llama-3-8b"), 12_345) == []


def test_the_rows_add_up():
    shape = known_shape("llama-3-8b")
    for targets in ("all-linear", "q_proj,lm_head"):
        for dora in (False, True):
            found = counts.rows(shape, 16, targets, dora)
            assert sum(row.values for row in found) == adapters.lora(shape, 16, targets, dora)


@pytest.mark.parametrize("method", ["lora", "qlora", "houlsby", "prefix", "prompt", "full"])
@pytest.mark.parametrize("model", ["llama-3-8b", "qwen3-30b-a3b", "santacoder"])
def test_the_picture_shows_every_parameter(method, model):
    setup = Setup(known_shape(model), method)
    rows = picture.parts(setup)
    assert sum(trained for *_, trained in rows) == count_trained(setup)
    frozen = sum(frozen for _, frozen, _ in rows)
    assert frozen + (method == "full") * setup.shape.parameters == setup.shape.parameters
    root = ET.fromstring(picture.svg("a <model> & more", setup))
    bars = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if rect.get("fill") == "#2f6fde"]
    assert len(bars) == 1 + sum(bool(trained) for *_, trained in rows)  # and the one of the legend
    assert all(float(bar.get("width")) >= 2 for bar in bars)
