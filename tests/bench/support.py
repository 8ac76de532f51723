"""What several tests of the bench need: a short run of `bench kernels`, a wrong provider, a run made of points."""

import csv
from pathlib import Path

import torch

from bench.cli import main
from bench.compare.layers import LoraLayer, Provider
from bench.measure.operands import SCALING, Operands
from bench.measure.record import HEADER, Point, lines
from fastlora import reference

CPU = torch.device("cpu")
FACTS = {
    "device": "NVIDIA Test",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "abc",
    "timestamp": "2026-01-01T00:00:00Z",
}
TINY = ("--shapes", "128x96", "--m", "16", "--r", "4", "--repeats", "2", "--budget", "0.01")


def run_kernels(path: Path, *options: str) -> list[dict[str, str]]:
    """The rows of `bench kernels` for one tiny shape at 16 tokens, unless the options say otherwise."""
    assert main(["kernels", "--out", str(path), *TINY, *options]) == 0
    with path.open() as file:
        return list(csv.DictReader(file))


def scaled_provider(factor: float) -> Provider:
    """A LoRA linear whose scaling is off by a factor."""

    def build(operands: Operands) -> list[LoraLayer]:
        a, b = operands.lora_a.clone().requires_grad_(), operands.lora_b.clone().requires_grad_()
        scaling = SCALING * factor
        return [LoraLayer(lambda x, w=w: reference.lora_linear(x, w, a, b, scaling), a, b) for w in operands.dense]

    return Provider("scaled", build, torch.float32)


def point(provider: str, ms: float, mode: str = "both", m: int = 8192, **facts) -> Point:
    """A row over NF4, 4096 to 4096, r = 16, unless `facts` say otherwise."""
    facts = {"kernel": "nf4_linear", "K": 4096, "N": 4096, "R": 16, "share_of_floor": 0.7 / ms} | facts
    metric = facts.pop("metric", "time")
    return Point(provider=provider, mode=mode, metric=metric, M=m, p50=ms, **facts)


def a_run() -> list[Point]:
    """A run in which peft with bf16 adapters is faster at M = 256, and bitsandbytes is wrong."""
    points = [
        Point("copy", "torch", "forward", "time", 32768, 8192, 0, 0, 0.25, 0.24, 0.26),
        Point("matmul", "torch", "forward", "time", 8192, 8192, 8192, 0, 1.41, 1.40, 1.42),
    ]
    for m, scale in ((8192, 1.0), (256, 0.1)):
        for name, ms in (("torch", 0.70), ("fastlora-fp32", 0.80), ("fastlora-bf16", 0.77), ("peft-fp32", 1.30)):
            points.append(point(name, ms * scale, m=m))
        points.append(point("peft-bf16", 1.05 if m == 8192 else 0.07, m=m))
    for name in ("torch", "fastlora-bf16", "peft-eval"):
        for suffix, ms in (("", 0.06), ("-graph", 0.01 if name.startswith("fast") else 0.03)):
            points.append(point(name + suffix, ms, "decode", 1, N=14336, share_of_floor=0.007 / ms))
    points.append(point("bitsandbytes", 0.02, "forward", 0, kernel="nf4_dequantize", R=0, share_of_floor=0.45))
    points.append(point("fastlora-bf16", 0.01, "forward", 0, kernel="nf4_dequantize", R=0, share_of_floor=0.95))
    points.append(point("fastlora-bf16", 0.91, metric="error", share_of_floor=None))
    points.append(point("bitsandbytes", 7.5, "decode", 1, metric="error", share_of_floor=None))
    points.append(point("fastlora-bf16", 8, metric="launches", share_of_floor=None))
    return points


def write_csv(path: Path, points: list[Point], **facts: str) -> Path:
    path.write_text(HEADER + "\n" + lines(points, FACTS | facts))
    return path
