"""What the floor model expects of GPUs that were not measured: bytes over bandwidth, FLOP over rate, launches.

Every row is called predicted-NAME and goes to a file of its own; nothing here was measured. A pass of a layer takes the
sum of its kernels' times, or that of its launches where it is larger. X = 2 M K and Y = 2 M N bytes are an activation
read or written once:

    torch               the products, each max(2 M N K / rate, (2 N K + X + Y) / bandwidth)
    fastlora, merged    + expanding W each way, X in forward (shrink), X + Y in backward (dA, dB): NF4 without dropout
    fastlora, p > 0     + Y in forward, X in backward: the update is written, and the product added to it
    fastlora, small M   one kernel that reads the packed weight, where that is faster than expanding it: at a share
                        FUSED of the matrix rate, in decoding up to the rate itself
    peft-bf16           + expanding W each way, and with dropout 11 X + 10 Y: forward 3.5 X + 6 Y (dropout, the two
                        low-rank products, scale, add), backward 7.5 X + 4 Y; without dropout 6 X + 10 Y

`--step` predicts whole training micro-steps instead: `bench.compare.predict_step` has their terms.

GPU data sheets give peaks. The share of them that is reached is taken from the one GPU measured, an H200: 4.3 of
4.8 TB/s, 780 of 989 TFLOP/s. Peaks (memory bandwidth; dense bf16 with fp32 accumulation) and multiprocessors, NVIDIA's
figures:

    A100 SXM 80 GB   2.039 TB/s   312 TFLOP/s     108   data sheet, June 2021; GA100 white paper
    H100 SXM         3.35 TB/s    989 TFLOP/s     132   data sheet, 2023 (1979 with sparsity); GH100 white paper
    H200 SXM         4.8 TB/s     989 TFLOP/s     132   data sheet, 2024
    RTX 3090         0.936 TB/s   71 TFLOP/s      82    GA102 white paper, version 2, appendix A
    RTX 4090         1.008 TB/s   165.2 TFLOP/s   128   Ada white paper, appendix A
    RTX 5090         1.792 TB/s   209.5 TFLOP/s   170   RTX Blackwell white paper, appendix A

Decoding is given twice: issued call by call, and replayed from a CUDA graph, whose launches are taken to cost nothing.
A launch costs the CPU at least 3.8 us (NVIDIA, "Getting Started with CUDA Graphs", 2019, back-to-back launches of a
2.9 us kernel). FUSED = 0.6 is an assumption, the one that `kernels/choice.csv` starts from.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastlora.kernels.lora_plan import PROGRAMS_PER_SM

from bench.compare import predict_step
from bench.compare.linear import PRESETS
from bench.measure.floors import (
    BF16_BYTES,
    PACKED_BYTES,
    Rates,
    dequantize_ms,
    floor_ms,
    packed_product_ms,
    share_of_floor,
)
from bench.measure.models import DECODERS, MODEL_SHAPES, model_shapes, parse_shape
from bench.measure.operands import DECODE_MAX_M, DEQUANTIZE
from bench.measure.record import GRAPH, HEADER, PREDICTED, Point, commit, lines, timestamp

SUMMARY = "the same cases by the floor model, for GPUs that were not measured; marked as predicted"
COPY_SHARE, MATRIX_SHARE = 4.3 / 4.8, 780 / 989
FUSED = 0.6
LAUNCH_MS = 3.8e-3
LAUNCHES = {  # kernels of a call; bitsandbytes expands a nested weight in three
    "torch": {"forward": 1, "both": 2, "decode": 1},
    "fastlora": {"forward": 4, "both": 10, "decode": 2},
    "peft-bf16": {"forward": 9, "both": 20, "decode": 8},
}


class Gpu(NamedTuple):
    """A GPU by its data sheet: bytes and FLOP a second, multiprocessors."""

    name: str
    peak_bytes_per_s: float
    peak_flop_per_s: float
    processors: int
    major: int  # of the compute capability

    @property
    def rates(self) -> Rates:
        """What a copy and a product reach of the peaks."""
        return Rates(self.peak_bytes_per_s * COPY_SHARE, self.peak_flop_per_s * MATRIX_SHARE)


GPUS = {
    "a100": Gpu("NVIDIA A100 SXM 80GB", 2.039e12, 312e12, 108, 8),
    "h100": Gpu("NVIDIA H100 SXM", 3.35e12, 989e12, 132, 9),
    "h200": Gpu("NVIDIA H200", 4.8e12, 989e12, 132, 9),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 0.936e12, 71e12, 82, 8),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12, 128, 8),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 1.792e12, 209.5e12, 170, 12),
}


class Layer(NamedTuple):
    """A LoRA linear at M tokens on a machine."""

    kernel: str
    m: int
    k: int
    n: int
    r: int
    dropout: float
    rates: Rates

    @property
    def x_ms(self) -> float:
        """Reading or writing [M, K] once."""
        return BF16_BYTES * self.m * self.k / self.rates.bytes_per_s * 1e3

    @property
    def y_ms(self) -> float:
        """Reading or writing [M, N] once."""
        return BF16_BYTES * self.m * self.n / self.rates.bytes_per_s * 1e3

    @property
    def product_ms(self) -> float:
        """One bare bf16 product."""
        moved = BF16_BYTES * self.k * self.n / self.rates.bytes_per_s * 1e3 + self.x_ms + self.y_ms
        return max(2 * self.m * self.k * self.n / self.rates.flop_per_s * 1e3, moved)

    @property
    def expanded_ms(self) -> float:
        """One product, with the weight expanded first where it is NF4."""
        return self.product_ms + (dequantize_ms(self.k, self.n, self.rates) if self.kernel == "nf4_linear" else 0.0)

    def fused_ms(self, efficiency: float) -> float:
        """One kernel over the packed weight, the update inside, at a share of the matrix rate."""
        rates = self.rates._replace(flop_per_s=self.rates.flop_per_s * efficiency)
        return packed_product_ms(self.m, self.k, self.n, rates) + self.x_ms + self.y_ms


def torch_ms(layer: Layer, mode: str) -> float:
    """The bare products."""
    return layer.product_ms * (2 if mode == "both" else 1)


def fastlora_ms(layer: Layer, mode: str) -> float:
    """Ours, by the fastest of its ways."""
    nf4 = layer.kernel == "nf4_linear"
    if mode == "decode" and nf4:
        return layer.fused_ms(1.0)
    merges = nf4 and not layer.dropout
    expand_y, expand_x = (0.0, 0.0) if merges else (layer.y_ms, layer.x_ms)
    ways = [(layer.expanded_ms + expand_y, layer.expanded_ms + expand_x)]
    if nf4:
        ways.append((layer.fused_ms(FUSED), layer.fused_ms(FUSED)))
    forward, back = (min(way[i] for way in ways) for i in range(2))
    shrink = 0.0 if mode == "decode" else layer.x_ms
    return forward + shrink + ((back + layer.x_ms + layer.y_ms) if mode == "both" else 0.0)


def peft_ms(layer: Layer, mode: str) -> float:
    """peft with bf16 adapters, eager."""
    dropped = bool(layer.dropout)
    forward = layer.expanded_ms + (3.5 if dropped else 1.0) * layer.x_ms + 6 * layer.y_ms
    if mode != "both":
        return forward
    return forward + layer.expanded_ms + (7.5 if dropped else 5.0) * layer.x_ms + 4 * layer.y_ms


MODELS = {"torch": torch_ms, "fastlora": fastlora_ms, "peft-bf16": peft_ms}


def predict(gpu: Gpu, shape: tuple[int, int], tokens: list[int], ranks: list[int]) -> Iterator[Point]:
    """The rows of one GPU and shape: expansion, and every provider, mode, M and dropout."""
    k, n = shape
    for r in (0, *ranks):
        yield _point(gpu, Layer(DEQUANTIZE, 0, k, n, r, 0.0, gpu.rates), "fastlora", "forward")
    for kernel in ("nf4_linear", "bf16_linear"):
        for m in tokens:
            for r in ranks:
                for mode, dropouts in (("forward", (0.0, 0.1)), ("both", (0.0, 0.1)), ("decode", (0.0,))):
                    if mode == "decode" and m > DECODE_MAX_M:
                        continue
                    for p in dropouts if m >= PRESETS["cuda"].dropout_from_m else (0.0,):
                        layer = Layer(kernel, m, k, n, r, p, gpu.rates)
                        for name in MODELS:
                            yield _point(gpu, layer, name, mode)
                            if mode == "decode":
                                yield _point(gpu, layer, name, mode, GRAPH)


def _point(gpu: Gpu, layer: Layer, name: str, mode: str, suffix: str = "") -> Point:
    if layer.kernel == DEQUANTIZE:
        ms, launches = dequantize_ms(layer.k, layer.n, gpu.rates), 1
    else:
        ms, launches = MODELS[name](layer, mode), LAUNCHES[name][mode]
    if not suffix:
        ms = max(ms, launches * LAUNCH_MS)
    floor = floor_ms(layer.kernel, mode, layer.m, layer.k, layer.n, gpu.rates, torch_ms(layer, mode))
    return Point(
        layer.kernel, f"{PREDICTED}{name}{suffix}", mode, "time", layer.m, layer.k, layer.n, layer.r, ms,
        share_of_floor=share_of_floor(floor, ms), dropout=layer.dropout,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench predict`."""
    preset = PRESETS["cuda"]
    parser.add_argument("--gpu", nargs="+", choices=GPUS, metavar="GPU", help=", ".join(GPUS) + " (all; a step's h100)")
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help="in_features x out_features")
    models = f"their linear layers: {', '.join(MODEL_SHAPES)}; their steps: {', '.join(DECODERS)} (qwen3-8b)"
    parser.add_argument("--models", nargs="+", metavar="NAME", help=models)
    parser.add_argument("--m", nargs="+", type=int, metavar="M", default=sorted(preset.tokens), help="tokens")
    parser.add_argument("--r", nargs="+", type=int, metavar="R", default=[16], help="ranks (16)")
    parser.add_argument("--out", type=Path, help="CSV to overwrite (bench/results/predicted.csv or predicted-step.csv)")
    step = parser.add_argument_group("whole training micro-steps")
    step.add_argument("--step", action="store_true", help="predict these, not single layers")
    step.add_argument("--tokens", type=int, default=4096, metavar="M", help="of a micro-step (4096)")
    step.add_argument("--length", type=int, default=2048, metavar="L", help="tokens of a sample at most (2048)")
    step.add_argument("--checkpointing", nargs="+", choices=predict_step.CHECKPOINTING, default=["full"])
    step.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of the adapters (0)")
    parts, present = predict_step.PARTS, predict_step.PRESENT
    step.add_argument("--parts", nargs="*", choices=parts, default=list(present), metavar="PART", help=", ".join(parts))
    step.add_argument(
        "--launch-us", type=float, default=LAUNCH_MS * 1e3, metavar="US", help="host time of a launch (3.8)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compute, write, print.

    Raises:
        ValueError: a shape, model, rank or number of tokens that cannot be; a file that holds measured rows.
    """
    default = "bench/results/predicted-step.csv" if arguments.step else "bench/results/predicted.csv"
    out: Path = arguments.out or Path(default)
    if out.exists() and any(f",{PREDICTED}" not in line for line in out.read_text().splitlines()[1:]):
        raise ValueError(f"{out} holds rows that were not predicted: name another file")
    text = HEADER + "\n"
    for gpu, points in (_steps if arguments.step else _layers)(arguments):
        facts = {"device": gpu.name, "torch": "none", "triton": "none", "commit": commit(), "timestamp": timestamp()}
        text += lines(points, facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(f"predicted, not measured: {len(text.splitlines()) - 1} rows in {out}")
    return 0


def _layers(arguments: argparse.Namespace) -> Iterator[tuple[Gpu, list[Point]]]:
    """Each GPU and the rows of its single layers, which are printed."""
    if min(*arguments.m, *arguments.r) < 1:
        raise ValueError("--m and --r must be at least 1")
    shapes = model_shapes(arguments.models or [])
    if arguments.shapes or not shapes:
        shapes += tuple(parse_shape(text) for text in arguments.shapes or PRESETS["cuda"].shapes)
    for name in arguments.gpu or GPUS:
        points = [point for shape in shapes for point in predict(GPUS[name], shape, arguments.m, arguments.r)]
        _show(GPUS[name], points)
        yield GPUS[name], points


def _steps(arguments: argparse.Namespace) -> Iterator[tuple[Gpu, list[Point]]]:
    """Each GPU and the rows of whole steps on it, which are printed."""
    m, length, models = arguments.tokens, arguments.length, arguments.models or ["qwen3-8b"]
    if arguments.shapes:
        raise ValueError("--step takes --models, not --shapes")
    if unknown := [name for name in models if name not in DECODERS]:
        raise ValueError(f"no step of a model called {unknown[0]!r}; there are {', '.join(DECODERS)}")
    if min(m, length, *arguments.r) < 1 or m % min(m, length) or not 0 <= arguments.dropout < 1:
        raise ValueError("--tokens must be whole samples of --length, --r at least 1, --dropout in [0, 1)")
    for gpu in (GPUS[name] for name in arguments.gpu or ["h100"]):
        points: list[Point] = []
        for name, r, checkpointing in itertools.product(models, arguments.r, arguments.checkpointing):
            sizes = DECODERS[name], m, min(m, length), r, arguments.dropout, checkpointing
            case = predict_step.Case(*sizes, gpu.rates, PROGRAMS_PER_SM * gpu.processors, gpu.major)
            ways = predict_step.ways(arguments.parts)
            columns = {way.name: predict_step.step(case, way, arguments.launch_us * 1e-3) for way in ways}
            points += predict_step.points(name, case, columns)
            print(
                f"\n{name}, {gpu.name}, predicted: {m} tokens in samples of {case.length}, r={r}, "
                f"dropout {case.dropout:g}, checkpointing {case.checkpointing}\n{predict_step.table(columns, m)}"
            )
        yield gpu, points


def _show(gpu: Gpu, points: list[Point]) -> None:
    rates = gpu.rates
    print(
        f"\n{gpu.name}, predicted: {rates.bytes_per_s / 1e12:.2f} TB/s, {rates.flop_per_s / 1e12:.0f} TFLOP/s reached; "
        f"{PACKED_BYTES:.3f} bytes a weight read, balance at {rates.balance:.0f} tokens"
    )
    for point in points:
        if point.provider == PREDICTED + "fastlora" and point.kernel != "bf16_linear":
            print(f"  {point.case:<60} {point.p50 * 1e3:10.1f} us  {point.share_of_floor or 0:.2f} of the floor")
