"""What the floor model expects of a whole training micro-step of a decoder over NF4: `python -m bench predict --step`.

A row is a term, a column a way to compute it: peft over bitsandbytes with Hugging Face's modules; fastlora with the
parts named by --parts, or with all of them; and the floor, bare products and attention with nothing computed again.
Adapters are fp32, on all linears; tokens are so many that weights are expanded. A row's time is its FLOP over the rate
of products, or its bytes over a copy's rate:

    base products       max(2 M N K / rate, (2 N K + 2 M K + 2 M N) / bandwidth) of each linear; dx as much again
    norms, rotary,      bytes a value of what they read and write in all, forward and backward: `EAGER`, torch's kernels
    SwiGLU, loss        one by one, and `FUSED`, ours in one; queries and keys are the values that rotary turns
    attention           FLOP forward 2 M L D a head, half of the square, and 2.5 times as many backward, each at a share
                        of the rate of products that cuDNN's kernels reached (`ATTENTION`)
    LoRA, ours          shrink 2 M K, dy pass 2 M N, x pass 2 M K, and the partial sums that the launchers' plans have
                        them write and read again; with dropout 6 M N forward and 6 M K backward to add the update
    LoRA, peft's        forward 2 M K and 16 M N (copy, B, scale, add), backward 8 M N and 10 M K (dB and dy B; dA, its
                        part of dx, the sum); with dropout 5 M K more each
    expansion           0.516 read and 2 written a weight, at the share of a copy's rate that `EXPANSION` says
    lm_head             two products; ours in the parts of rows of `fastlora.ops.loss`, logits in fp32
    residuals, dx       6 M H a sum: two forward, one of them again, two backward, and three of dx that groups save
    launches            what they take more than all of the above: their number times --launch-us, memsets not counted

Each kernel adds `START_MS`. What checkpointing computes again counts twice: with "full" all, with "selective"
(`keep_linears`) all but linears and their LoRA; peft's column then computes all again. Parts beside those of
`speed_up` are "groups" (q/k/v and gate/up share a shrink, an x pass and a product for dx), "attention-kept" (not
computed again with "selective"), "weights-kept" (with "full" backward takes what recomputation expanded) and
"weights-once" (`expand_once`: expanded once for many micro-steps; that once is not counted). Embedding, optimizer and
memory are left out.

Predicted and measured, ms of an H100's kernels in a step (steps.csv; the tests compare all, and each term with
step-kernels.csv). The shares below were taken from four layers of Qwen3-8B at 4,096 tokens, so that these are a fit and
the other steps the check; `START_MS` was added when Qwen3-0.6B came out a fifth short without it. That the shares hold
for other GPUs is an assumption:

    tokens                                      4,096            1,024            4,096
    model                                  Qwen3-8B, 4 layers           Qwen3-0.6B, whole
    peft, full                              67.4   66.0      20.6   19.6     139.5   138.6
    linears only, full                      57.7   56.9      18.0   17.7     114.1   118.5
    norm, rotary, mlp, loss, full           37.8   37.4      12.4   12.8      50.6    57.9
    the same, selective                     27.9   27.7       8.9    9.2      43.3    48.8

What the other parts save has not been measured.

Short of what was measured are our low-rank passes, by a quarter; the expansion of small weights, which takes 9 us
however small they are, by half in Qwen3-0.6B; and attention over one sample of 1,024 tokens, by half. Qwen3-0.6B at
1,024 tokens is 27% short for these. Sums of activations that fit the cache are predicted too long, by a third.
"""

from collections.abc import Iterable
from typing import NamedTuple

from fastlora.kernels import lora_plan

from bench.measure.floors import BF16_BYTES, EXPAND_BYTES, Rates
from bench.measure.models import Decoder
from bench.measure.record import PREDICTED, Point
from fastlora.ops import loss

PARTS = ("norm", "rotary", "mlp", "loss", "groups", "attention-kept", "weights-kept", "weights-once")
MEASURED, PRESENT = PARTS[:4], PARTS[:7]  # in steps.csv; by default with `speed_up` and `checkpoint_layers`
CHECKPOINTING = {"none": "step", "selective": "step-kept", "full": "step-checkpointed"}  # and the mode in the CSV
PEFT, FASTLORA, FLOOR = "peft", "fastlora", "floor"
LAUNCHES = "launches beyond these"

# Measured on an H100 80GB HBM3. `UNEVEN`, `ATTENTION` and `START_MS` are from step-kernels.csv, four layers of
# Qwen3-8B at 4,096 tokens; `EXPANSION` has the shares of kernels.csv, 4096 x 12288, r = 16.
UNEVEN = 0.50  # of a copy's rate: torch's kernels that broadcast, reduce or turn
ATTENTION = {"forward": 0.62, "backward": 0.44}  # of the rate of products
START_MS = 1.3e-3  # of any kernel: torch's rsqrt over 4,096 values, 33 in 43 us
EXPANSION = {"merged": 0.52, "plain": 0.87, "bitsandbytes": 0.60}  # of a copy's rate


class Work(NamedTuple):
    """Bytes that kernels move: `even` at a copy's rate, `uneven` at UNEVEN of it; and how many kernels."""

    even: float
    uneven: float = 0.0
    launches: float = 0

    def of(self, values: float, calls: float) -> "Work":
        """That of so many values, in so many calls, where this one is a value's and a call's."""
        return Work(self.even * values, self.uneven * values, self.launches * calls)

    def ms(self, rates: Rates) -> float:
        """How long they take."""
        return (self.even + self.uneven / UNEVEN) / rates.bytes_per_s * 1e3 + self.launches * START_MS


def total(works: Iterable[Work]) -> Work:
    """All of them."""
    return Work(*(sum(column) for column in zip(*works, strict=True)))


EAGER = {  # (forward, backward), bytes a value in bf16: transformers' modules, each operator of torch's a kernel
    "norm": (Work(20, 16, 8), Work(64, 20, 14)),
    "rotary": (Work(0, 20.2, 10), Work(12, 16.2, 14)),
    "mlp": (Work(10, 0, 2), Work(18, 0, 3)),
    "loss": (Work(14, 0, 3), Work(22, 0, 3)),
}
FUSED = {  # the same by fastlora's kernels; the loss finds its gradient in forward and reads fp32 logits twice
    "norm": (Work(4, 0, 1), Work(6, 0, 1)),
    "rotary": (Work(4, 0, 1), Work(4, 0, 1)),
    "mlp": (Work(6, 0, 1), Work(10, 0, 1)),
    "loss": (Work(10, 0, 1), Work(0)),
}
ATTENTION_LAUNCHES = 1, 5  # forward; backward with its sums over a group's heads


class Case(NamedTuple):
    """A micro-step: of `tokens` in samples of `length`, on a machine."""

    model: Decoder
    tokens: int
    length: int
    r: int
    dropout: float
    checkpointing: str
    rates: Rates
    programs: int  # that fill the device
    major: int  # of its compute capability


class Way(NamedTuple):
    """How it is computed: the column's name, by whom, with which parts."""

    name: str
    by: str
    parts: frozenset[str] = frozenset()


def product_ms(rates: Rates, m: int, k: int, n: int, out_bytes: int = BF16_BYTES) -> float:
    """One product of bf16, [M, K] by [K, N]."""
    moved = BF16_BYTES * k * (n + m) + out_bytes * m * n
    return max(2 * m * k * n / rates.flop_per_s, moved / rates.bytes_per_s) * 1e3 + START_MS


def plan(case: Case, op: str, length: int, r: int) -> lora_plan.Plan:
    """How the launcher divides a low-rank product of fp32 adapters; by the built-in tiles."""
    drops = bool(case.dropout) and op != "dy"
    cut = lora_plan.tile(op, lora_plan.block_r(r), "split", drops, case.major)
    return lora_plan.divide(op, case.tokens, length, r, cut, case.programs)


def summed(parts: int, values: int) -> Work:
    """fp32 values written in so many parts, which a second kernel reads and adds up."""
    return Work(4 * values * (2 * parts + 1), 0, 1) if parts > 1 else Work(4 * values)


def shrink(case: Case, k: int, r: int) -> Work:
    """h = x Aᵀ: `kernels.lora.shrink`."""
    m = case.tokens
    return total([Work(2 * m * k + 4 * r * k, 0, 1), summed(plan(case, "shrink", k, r).splits, m * r)])


def x_pass(case: Case, k: int, r: int) -> Work:
    """dA = gᵀ x: `kernels.lora.x_parts` and the sum."""
    m = case.tokens
    return total([Work(2 * m * k + 4 * m * r, 0, 1), summed(plan(case, "x", k, r).splits, k * r)])


def dy_pass(case: Case, n: int, r: int) -> Work:
    """g = dy B and dB = dyᵀ h: `kernels.lora.dy_parts` and the sums; dB's is added up in the x pass's launch."""
    m, launch = case.tokens, plan(case, "dy", n, r)
    if 2 * 4 * r * launch.tiles > BF16_BYTES * n:  # `kernels.lora.reads_twice`
        return total([shrink(case, n, r), x_pass(case, n, r)])
    db = summed(launch.splits, n * r)._replace(launches=0)
    return total([Work(2 * m * n + 4 * n * r + 4 * m * r, 0, 1), summed(launch.tiles, m * r), db])


def lora(case: Case, way: Way, again: int) -> dict[str, Work]:
    """What the adapters of a layer cost beside its base products. again: 1 where forward is computed again, else 0."""
    m, drops, linears = case.tokens, bool(case.dropout), case.model.linears
    x, y = m * sum(k for k, _ in linears), m * sum(n for _, n in linears)
    ones, forwards = len(linears), 1 + again
    if way.by == PEFT:
        return {
            "LoRA: shrink": Work(2 + 5 * drops, 0, 3 + 2 * drops).of(x * forwards, ones * forwards),
            "LoRA: update": Work(16, 0, 5).of(y * forwards, ones * forwards),
            "LoRA: dy pass": Work(8, 0, 5).of(y, ones),
            "LoRA: x pass": Work(10 + 5 * drops, 0, 5 + drops).of(x, ones),
        }
    groups = case.model.groups if "groups" in way.parts else [[linear] for linear in linears]
    reads = [(group[0][0], case.r * len(group)) for group in groups]
    h = total(shrink(case, k, r) for k, r in reads)
    update = Work(6, 0, 1).of(y * forwards + x, ones * (forwards + 1)) if drops else Work(0)
    return {
        "LoRA: shrink": h.of(forwards, forwards),
        "LoRA: update": update,
        "LoRA: dy pass": total(dy_pass(case, n, case.r) for _, n in linears),
        "LoRA: x pass": total(x_pass(case, k, r) for k, r in reads),
    }


def expansion(case: Case, way: Way, again: int) -> Work:
    """A layer's weights from NF4 to bf16, forward, again and backward."""
    if "weights-once" in way.parts:
        return Work(0)
    again *= "weights-kept" not in way.parts
    how = "bitsandbytes" if way.by == PEFT else "plain" if case.dropout else "merged"
    weights = sum(k * n for k, n in case.model.linears)
    launches = (3 if way.by == PEFT else 1) * len(case.model.linears)
    return Work(EXPAND_BYTES / EXPANSION[how], 0, launches).of(weights * (2 + again), 2 + again)


def attention_ms(case: Case, forwards: int) -> float:
    """A layer's attention, causal, forward so many times and backward once."""
    flop = 2 * case.tokens * case.length * case.model.heads * case.model.head_dim
    shares = forwards / ATTENTION["forward"] + 2.5 / ATTENTION["backward"]
    return shares * flop / case.rates.flop_per_s * 1e3


def head_ms(case: Case, parts: int, out_bytes: int = BF16_BYTES) -> float:
    """The head's product and its dx, in so many parts of rows."""
    if not case.model.vocab:
        return 0.0
    rows, hidden, vocab = -(-case.tokens // parts), case.model.hidden, case.model.vocab
    one = product_ms(case.rates, rows, hidden, vocab, out_bytes) + product_ms(case.rates, rows, vocab, hidden)
    return parts * one


def between(case: Case, way: Way, part: str, forward: float, backward: float, calls: float = 1) -> Work:
    """A part between the linears, for so many values forward and backward. calls: of the backward."""
    ahead, back = (FUSED if part in way.parts else EAGER)[part]
    return total([ahead.of(forward, calls * forward / (backward or 1)), back.of(backward, calls)])


def step(case: Case, way: Way, launch_ms: float) -> dict[str, float]:
    """Milliseconds of each term."""
    model, m, rates = case.model, case.tokens, case.rates
    repeats = case.checkpointing != "none" and way.by != FLOOR
    again = int(repeats and (case.checkpointing == "full" or way.by == PEFT))  # of linears
    forwards, layers = 1 + repeats, model.layers
    product = layers * sum(product_ms(rates, m, k, n) for k, n in model.linears)
    attends = 1 + (repeats and (again or "attention-kept" not in way.parts))
    chunk = loss._rows_at_a_time(m, model.vocab, True) if "loss" in way.parts and model.vocab else m
    found = {
        "base products: forward": product,
        "base products: again": product * again,
        "base products: dx": product,
        "attention": layers * attention_ms(case, attends),
        "lm_head": head_ms(case, -(-m // chunk), 4 if "loss" in way.parts else BF16_BYTES),
    }
    if way.by == FLOOR:
        return found
    turned = m * model.head_dim * (model.heads + model.kv_heads)
    norms, gates, grouped = 2 * layers, layers * m * model.inner, "groups" in way.parts
    hidden, logits = m * model.hidden, m * model.vocab
    adapters = {name: work.of(layers, layers) for name, work in lora(case, way, again).items()}
    sums = layers * (2 + repeats + 2 + 3 * (not grouped))
    of_heads = layers * turned * model.head_norms
    work = {
        "norms": between(case, way, "norm", hidden * (norms * forwards + 1), hidden * (norms + 1), norms + 1),
        "norms of q and k": between(case, way, "norm", of_heads * forwards, of_heads, norms * model.head_norms),
        "rotary": between(case, way, "rotary", layers * turned * forwards, layers * turned, layers),
        "SwiGLU": between(case, way, "mlp", gates * forwards, gates, layers),
        **adapters,
        "expansion and merge": expansion(case, way, again).of(layers, layers),
        "loss": between(case, way, "loss", logits, logits, -(-m // chunk) if logits else 0),
        "residuals and sums of dx": Work(6, 0, 1).of(sums * hidden, sums),
    }
    found |= {name: each.ms(rates) for name, each in work.items()}
    launches = total(work.values()).launches + layers * len(model.linears) * (2 + again)
    launches += layers * (ATTENTION_LAUNCHES[0] * attends + ATTENTION_LAUNCHES[1])
    return found | {LAUNCHES: max(0.0, launches * launch_ms - sum(found.values()))}


def ways(parts: Iterable[str]) -> list[Way]:
    """The columns: peft, fastlora with these parts and with all, the floor."""
    chosen = frozenset(parts)
    suffix = "" if chosen == frozenset(PRESENT) else "-" + ("-".join(p for p in PARTS if p in chosen) or "linears")
    found = [Way(PEFT, PEFT), Way(FASTLORA + suffix, FASTLORA, chosen)]
    if chosen != frozenset(PARTS):
        found.append(Way(FASTLORA + "-all", FASTLORA, frozenset(PARTS)))
    return [*found, Way(FLOOR, FLOOR)]


def points(name: str, case: Case, columns: dict[str, dict[str, float]]) -> list[Point]:
    """Rows of the CSV: each column's terms, named in the mode, its whole time and its tokens a second."""
    kernel, mode = f"step_{name}_nf4", f"{CHECKPOINTING[case.checkpointing]}-{case.length}"
    sizes = case.tokens, case.model.hidden, case.model.inner, case.r
    floor, found = sum(columns[FLOOR].values()), list[Point]()
    for column, terms in columns.items():
        provider, ms = PREDICTED + column, sum(terms.values())
        for term, each in terms.items():
            found.append(Point(kernel, provider, f"{mode}: {term}", "time", *sizes, each, dropout=case.dropout))
        per_s, share = case.tokens / ms * 1e3, floor / ms
        found.append(Point(kernel, provider, mode, "time", *sizes, ms, share_of_floor=share, dropout=case.dropout))
        found.append(Point(kernel, provider, mode, "tokens_per_s", *sizes, per_s, dropout=case.dropout))
    return found


def table(columns: dict[str, dict[str, float]], tokens: int) -> str:
    """The terms as lines, a column a way."""
    rows = list(dict.fromkeys(term for terms in columns.values() for term in terms))
    width = max(14, *(len(column) + 2 for column in columns))
    lines = [f"{'ms':<26}" + "".join(f"{column:>{width}}" for column in columns)]
    for row in rows:
        cells = (f"{terms[row]:.1f}" if row in terms else "-" for terms in columns.values())
        lines.append(f"{row:<26}" + "".join(f"{cell:>{width}}" for cell in cells))
    sums = {column: sum(terms.values()) for column, terms in columns.items()}
    lines.append(f"{'together':<26}" + "".join(f"{ms:>{width}.1f}" for ms in sums.values()))
    lines.append(f"{'tokens/s':<26}" + "".join(f"{tokens / ms * 1e3:>{width},.0f}" for ms in sums.values()))
    return "\n".join(lines)
