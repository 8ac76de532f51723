"""One decoder layer's step: what its modules allocate, keep for backward and free, written down as they are written.

Sources: `modeling_llama.py` and those of mistral, gemma2, mixtral and gpt_bigcode, of transformers;
`tuners/lora/layer.py` and `bnb.py` of peft; `autograd/_functions.py` of bitsandbytes; and, for what autograd keeps,
derivatives.yaml of PyTorch. Each local variable here is one there: when it is rebound, its bytes go.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fastlora.memory.shape import Linear, ModelShape
from fastlora.memory.sizes import BOOL, FP32, HALF, Book, Parameter, Sized, apply


@dataclass
class Layers:
    """How the layers of a run compute.

    Attributes:
        tokens, samples: of one forward pass of one device.
        ranks: linear -> rank of its adapter; trained: bytes a value of A and B.
        dropout: whether adapters have any.
        quantized: "nf4", "nf4-nested", "gptq", "int8" or "" for a dense base.
        width: bytes a value of a dense weight, and of what is computed from it.
        autocast: whether products run under it, in 16 bits.
        norm_width: bytes a value of a norm's weight.
        lora: "peft", "fused" (one autograd Function a module, which keeps x) or "fastlora".
        norm, rotary, gate: "eager" or "fused".
        attention: "flash", "sdpa" or "eager"; repeats: keys and values are repeated for grouped queries.
        at_once: all experts in one call, not one after the other.
        full: every weight is trained.
        shards: devices that share a gradient.
        bottleneck: features inside Houlsby adapters; prefix: trained keys and values before the text.
    """

    book: Book
    shape: ModelShape
    tokens: int
    samples: int
    ranks: dict[str, int] = field(default_factory=dict)
    trained: float = FP32
    dropout: bool = False
    quantized: str = ""
    width: float = HALF
    autocast: bool = False
    norm_width: float = HALF
    head_width: float = HALF
    lora: str = "peft"
    norm: str = "eager"
    rotary: str = "eager"
    gate: str = "eager"
    attention: str = "sdpa"
    repeats: bool = False
    at_once: bool = False
    full: bool = False
    dora: bool = False
    shards: int = 1
    bottleneck: int = 0
    prefix: int = 0
    parameters: list[Parameter] = field(default_factory=list)
    copies: dict[int, Sized] = field(default_factory=dict)  # autocast's: 16-bit copies of trained weights
    expanded: list[Sized] | None = None  # NF4 weights kept from recomputation to backward
    kept: deque[Sized] | None = None  # outputs of products and of attention, which are not computed again

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.tokens // self.samples

    def parameter(self, elements: float, width: float) -> Parameter:
        """A trained tensor of this run."""
        made = Parameter(self.book, elements / self.shards, width)
        self.parameters.append(made)
        return made

    def leave_autocast(self) -> None:
        """Free what autocast keeps."""
        self.copies.clear()

    def product(self, name: str, inputs: list[Sized], elements: float, width: float, **options: Any) -> Sized:
        """`apply` for what "selective" checkpointing keeps."""
        if self.kept is None:
            return apply(name, inputs, elements, width, **options)
        if self.book.recording:
            return apply(name, inputs, elements, width, in_place=self.kept.popleft(), **options)
        with self.book.said(term="activations"):
            y = apply(name, inputs, elements, width, **options)
        self.kept.append(y.alias())
        return y


class Layer:
    """A decoder layer; its trained tensors live as long as it does."""

    def __init__(self, run: Layers) -> None:
        self.run = run
        shape = run.shape
        self.pairs: dict[tuple[str, str], tuple[Parameter, Parameter]] = {}
        self.weights: dict[tuple[str, str], Parameter] = {}
        for linear in shape.linears:
            key = linear.at, linear.name
            if run.full:
                self.weights[key] = run.parameter(linear.values, run.width)
            elif r := run.ranks.get(linear.name, 0):
                a = run.parameter(r * linear.k * linear.copies, run.trained)
                self.pairs[key] = a, run.parameter(r * linear.n * linear.copies, run.trained)
        self.adapters = []
        if b := run.bottleneck:
            sizes = (b * (shape.hidden + 1), shape.hidden * (b + 1))
            self.adapters = [tuple(run.parameter(size, run.trained) for size in sizes) for _ in range(2)]
        self.prefix = run.parameter(2 * run.prefix * shape.kv_features, run.trained) if run.prefix else None
        self.norms = [run.parameter(shape.hidden, run.norm_width) for _ in range(4)] if run.full else [None] * 4

    def __call__(self, x: Sized) -> Sized:
        """x [tokens, hidden] -> [tokens, hidden]."""
        shape, run = self.run.shape, self.run
        four = "four_norms" in shape.flags
        y = self._adapted(0, self._attention(norm(run, x, self.norms[0])))
        if four:
            y = norm(run, y, self.norms[2])
        x = plus(x, y, "residual")
        del y
        h = norm(run, x, self.norms[1])
        y = self._adapted(1, self._experts(h) if shape.experts else self._mlp(h))
        del h
        if four:
            y = norm(run, y, self.norms[3])
        return plus(x, y, "residual")

    def _adapted(self, place: int, y: Sized) -> Sized:
        """A Houlsby adapter after a branch, if there is one."""
        if not self.adapters:
            return y
        run, (down, up) = self.run, self.adapters[place]
        x = y if run.autocast else cast(y, run.trained, "x for an adapter")
        h = trained_linear(run, x, down, run.tokens * run.bottleneck, "down of an adapter")
        del x
        h = apply("gelu of an adapter", [h], h.elements, h.width, saves=[h])
        update = trained_linear(run, h, up, y.elements, "up of an adapter")
        del h
        return plus(y, cast(update, y.width, "update"), "after an adapter")

    def _linears(self, at: str) -> list[Linear]:
        return [linear for linear in self.run.shape.linears if linear.at.startswith(at)]

    def _attention(self, h: Sized) -> Sized:
        run, shape = self.run, self.run.shape
        t = run.tokens
        *inputs, output = self._linears("attn" if "gpt" in shape.flags else "self_attn")
        if len(inputs) == 3:
            q, k, v = (self._linear(each, h) for each in inputs)
        else:
            joined = self._linear(inputs[0], h)
            q, k, v = (
                apply(f"d {name}", [joined], t * n, joined.width, in_place=joined)
                for name, n in (("q", shape.q_features), ("k", shape.kv_features), ("v", shape.kv_features))
            )
            del joined
        del h
        if "qk_norm" in shape.flags:
            q, k = norm(run, q, None, "norm of q"), norm(run, k, None, "norm of k")
        if "gpt" not in shape.flags:
            q, k = self._rotary(q, "q"), self._rotary(k, "k")
        y = self._scores(q, k, v)
        del q, k, v
        return self._linear(output, y)

    def _rotary(self, x: Sized, name: str) -> Sized:
        if self.run.rotary == "fused":
            return apply(f"rotated {name}", [x], x.elements, x.width, in_place=x, passes=True)
        product = scaled(x, f"{name} x cos")
        turned = apply(f"{name} turned", [x], x.elements, x.width)
        turned = scaled(turned, f"{name} x sin")
        return plus(product, turned, f"rotated {name}")

    def _scores(self, q: Sized, k: Sized, v: Sized) -> Sized:
        run, shape = self.run, self.run.shape
        t, groups = run.tokens, shape.heads // shape.kv_heads
        if run.attention == "flash" and q.width == FP32:
            q, k, v = (cast(x, HALF, f"{name} in 16 bits") for x, name in ((q, "q"), (k, "k"), (v, "v")))
        if self.prefix is not None:
            more = run.prefix * run.samples * shape.kv_features
            before = apply("keys and values of a prefix", [self.prefix], 2 * more, k.width)
            k, v = (
                apply(f"{name} after a prefix", [x, before], x.elements + more, x.width)
                for name, x in (("k", k), ("v", v))
            )
            del before
        if groups > 1 and (run.repeats or run.attention == "eager"):
            k, v = (apply(f"{name} repeated", [x], x.elements * groups, x.width) for x, name in ((k, "k"), (v, "v")))
        if run.attention != "eager":
            statistics = run.book.tensor("log sums of attention", t * shape.heads, FP32)
            return run.product(
                "attention", [q, k, v], t * shape.q_features, q.width, saves=[q, k, v, statistics], saves_result=True
            )
        pairs = t * run.length * shape.heads
        if run.autocast:
            q, k, v = (cast(x, HALF, f"{name} in 16 bits") for x, name in ((q, "q"), (k, "k"), (v, "v")))
        scores = apply("scores", [q, k], pairs, q.width, saves=[q, k])
        scores = scaled(scores, "scores, scaled")
        scores = scaled(scores, "scores, masked")
        scores = apply("softmax", [scores], pairs, FP32, saves_result=True, scratch_back=pairs * FP32)
        scores = cast(scores, q.width, "probabilities")
        found = apply("attention", [scores, v], t * shape.q_features, q.width, saves=[scores, v])
        del scores
        return apply("attention, heads together", [found], found.elements, found.width)

    def _mlp(self, h: Sized) -> Sized:
        run, shape = self.run, self.run.shape
        linears = self._linears("mlp")
        if not shape.gated:
            inner = self._linear(linears[0], h)
            del h
            inner = apply("gelu", [inner], inner.elements, inner.width, saves=[inner])
            return self._linear(linears[1], inner)
        *ups, down = linears
        if len(ups) == 1:
            joined = self._linear(ups[0], h)
            half = joined.elements / 2
            gate, up = (apply(name, [joined], half, joined.width, in_place=joined) for name in ("gate", "up"))
            del joined
        else:
            gate, up = self._linear(ups[0], h), self._linear(ups[1], h)
        del h
        product = gated(run, gate, up)
        del gate, up
        return self._linear(down, product)

    def _experts(self, h: Sized) -> Sized:
        """A loop over experts, each with its share of the rows, or all at once (`at_once`)."""
        run, shape = self.run, self.run.shape
        parts = 1 if run.at_once else min(shape.experts, 8)
        rows = run.tokens * shape.active / parts
        *ups, down = self._linears("mlp")
        y = apply("sum of experts", [h], h.elements, h.width, passes=True)
        for _ in range(parts):
            x = apply("rows of an expert", [h], rows * shape.hidden, h.width)
            joined = self._linear(ups[0], x)
            del x
            gate, up = (
                apply(name, [joined], joined.elements / 2, joined.width, in_place=joined) for name in ("gate", "up")
            )
            del joined
            product = gated(run, gate, up)
            del gate, up
            x = self._linear(down, product)
            del product
            x = apply("weighted", [x], x.elements, x.width, saves=[x])
            y = apply("sum of experts", [y, x], h.elements, h.width, in_place=y, passes=True)
        return y

    def _linear(self, linear: Linear, x: Sized) -> Sized:
        run = self.run
        key = linear.at, linear.name
        t = x.elements / linear.k
        if weight := self.weights.get(key):
            return trained_linear(run, x, weight, t * linear.n, linear.name)
        pair = self.pairs.get(key)
        if run.lora == "peft" or pair is None:
            y = frozen_linear(run, x, linear, t)
            return y if pair is None else self._peft(linear, x, y, pair, t)
        return self._fused(linear, x, pair, t)

    def _peft(self, linear: Linear, x: Sized, y: Sized, pair: tuple[Parameter, Parameter], t: float) -> Sized:
        run, (a, b) = self.run, pair
        width = y.width
        if run.quantized:
            y = apply(f"{linear.name}, cloned", [y], y.elements, y.width, passes=True)
        if run.dropout:
            mask = run.book.tensor("dropout mask", x.elements, BOOL)
            x = apply("x after dropout", [x], x.elements, x.width, saves=[mask])
            del mask
        if not run.autocast:
            x = cast(x, run.trained, "x for A")
        h = trained_linear(run, x, a, t * run.ranks[linear.name], "x A")
        del x
        update = trained_linear(run, h, b, t * linear.n, "x A B")
        del h
        if run.dora:
            return self._dora(linear, y, update)
        update = scaled(update, "x A B, scaled")
        if not run.autocast:
            update = cast(update, width, "update")
        return plus(y, update, linear.name)

    def _dora(self, linear: Linear, y: Sized, update: Sized) -> Sized:
        """peft's DoRA: y + (m - 1) y + m (x A B) scaling. m [n] is trained, so each product keeps what m multiplies."""
        width, wide = y.width, max(y.width, self.run.trained)
        norms = 3 * linear.n * linear.k * FP32  # the weight with its update, for the norms
        part = apply(f"{linear.name}: (m - 1) y", [y], y.elements, wide, saves=[y], scratch=norms, scratch_back=0)
        update = apply(f"{linear.name}: m x A B", [update], y.elements, wide, saves=[update])
        update = cast(plus(part, scaled(update, "x A B, scaled"), f"{linear.name}: DoRA"), width, "update")
        return plus(y, update, linear.name)

    def _fused(self, linear: Linear, x: Sized, pair: tuple[Parameter, Parameter], t: float) -> Sized:
        """One autograd Function: it keeps x and, for dB, x A."""
        run, (a, b) = self.run, pair
        kept = [x]
        if run.dropout and run.lora == "fused":
            mask = run.book.tensor("dropout mask", x.elements, BOOL)
            dropped = apply("x after dropout", [x], x.elements, x.width, saves=[mask])
            kept.append(dropped)
        h = run.book.tensor("x A", t * run.ranks[linear.name], FP32 if run.lora == "fastlora" else HALF)
        size = expansion(run, linear)
        if run.expanded is not None and size:
            run.expanded.append(run.book.tensor("expanded weights of a layer", size, 1, "scratch"))
            size = 0
        return run.product(linear.name, [x, a, b], t * linear.n, HALF, saves=[*kept, h], scratch=size)


def norm(run: Layers, x: Sized, weight: Parameter | None, name: str = "norm") -> Sized:
    """RMSNorm as transformers has it, in fp32, or in one kernel, which keeps x."""
    rows = x.elements / run.shape.hidden
    width = max(x.width, run.norm_width)
    if run.norm == "fused":
        statistics = run.book.tensor("statistics of norms", rows, FP32)
        inputs = [x] if weight is None else [x, weight]
        return apply(name, inputs, x.elements, x.width, saves=[x, statistics])
    if "gpt" in run.shape.flags:
        return apply(name, [x] if weight is None else [x, weight], x.elements, x.width, saves=[x])
    wide = cast(x, FP32, f"{name}: x in fp32")
    square = apply(f"{name}: x²", [wide], wide.elements, FP32, saves=[wide])
    inverse = apply(f"{name}: 1/rms", [square], rows, FP32, saves_result=True)
    del square
    wide = apply(f"{name}: x/rms", [wide, inverse], wide.elements, FP32, saves=[wide, inverse])
    del inverse
    if "four_norms" in run.shape.flags or run.shape.model_type == "gemma":  # gemma multiplies in fp32
        wide = scaled(wide, f"{name}: in fp32")
        return cast(wide, x.width, name)
    short = cast(wide, x.width, f"{name}: x/rms, cast")
    del wide
    if weight is not None:
        return apply(name, [short, weight], x.elements, width, saves=[short])
    return apply(name, [short], x.elements, width)


def gated(run: Layers, gate: Sized, up: Sized) -> Sized:
    """act(gate) * up."""
    if run.gate == "fused":
        return apply("gate x up", [gate, up], gate.elements, gate.width, saves=[gate, up])
    active = apply("act(gate)", [gate], gate.elements, gate.width, saves=[gate])
    return apply("gate x up", [active, up], gate.elements, gate.width, saves=[active, up])


def plus(x: Sized, y: Sized, name: str) -> Sized:
    """x + y in the wider dtype."""
    width = max(x.width, y.width)
    x, y = cast(x, width, name) if x.width < width else x, cast(y, width, name) if y.width < width else y
    return apply(name, [x, y], x.elements, width, passes=True)


def scaled(x: Sized, name: str) -> Sized:
    """x times what needs no gradient."""
    return apply(name, [x], x.elements, x.width)


def cast(x: Sized, width: float, name: str) -> Sized:
    """x in another dtype; x itself if it has that."""
    return x if x.width == width else apply(name, [x], x.elements, width)


def frozen_linear(run: Layers, x: Sized, linear: Linear, t: float) -> Sized:
    """A product with a weight that is not trained: nothing is kept. bitsandbytes returns it in the dtype of x."""
    width = x.width
    if run.quantized or run.autocast:
        x = cast(x, HALF, "x in 16 bits")
    y = apply(
        linear.name,
        [x],
        t * linear.n,
        HALF if run.quantized or run.autocast else run.width,
        scratch=expansion(run, linear),
    )
    return cast(y, width, f"{linear.name}, cast back") if run.quantized.startswith("nf4") else y


def expansion(run: Layers, linear: Linear) -> float:
    """Bytes of a weight while it is expanded: 2 a weight, and the fp32 scales that nested ones become."""
    if not run.quantized.startswith("nf4"):
        return 0
    scales = 4 / 64 if run.quantized == "nf4-nested" and run.lora != "fastlora" else 0
    return linear.n * linear.k * (HALF + scales)


def trained_linear(run: Layers, x: Sized, weight: Parameter, elements: float, name: str) -> Sized:
    """A product with a trained weight, which keeps x and the weight. Autocast holds a 16-bit copy of the weight."""
    if run.autocast and weight.width == FP32:
        x = cast(x, HALF, f"{name}: x in 16 bits")
        copy = run.copies.get(id(weight))
        if copy is None:
            with run.book.said(term="scratch"):
                copy = apply("autocast's copies of trained weights", [weight], weight.elements, HALF)
            run.copies[id(weight)] = copy
        return apply(name, [x, copy], elements, HALF, saves=[x, copy])
    return apply(name, [x, weight], elements, weight.width, saves=[x])
