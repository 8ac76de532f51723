"""A block of a model as an SVG: frozen parts grey, trained ones coloured, areas in proportion to parameters."""

from xml.sax.saxutils import escape

from fastlora.memory import adapters
from fastlora.memory.forecast import Setup
from fastlora.memory.shape import ModelShape

_WIDTH, _PART_HEIGHT, _GAP, _LEFT = 900, 54, 10, 150
_FROZEN, _TRAINED, _INK, _LINE = "#d5d8dd", "#2f6fde", "#1c2430", "#8a8f98"


def parts(setup: Setup) -> list[tuple[str, int, int]]:
    """(name, frozen values, trained values) of the model's parts, a linear of all its layers each."""
    shape, full = setup.shape, setup.method == "full"
    adapted = {}
    if setup.method in ("lora", "qlora"):
        for linear in adapters.targeted(shape, setup.targets):
            more = linear.n if setup.dora else 0
            values = setup.r * (linear.n + linear.k) + more
            adapted[linear.at, linear.name] = shape.layers * linear.copies * values
    found = [("embeddings", shape.embeddings, 0)]
    for linear in shape.linears:
        found.append(
            (f"{linear.at}.{linear.name}", shape.layers * linear.values, adapted.get((linear.at, linear.name), 0))
        )
    found.append(("norms", shape.layers * (shape.norms + shape.others) + shape.final_norm, 0))
    if shape.head:
        found.append(("lm_head", shape.head, 0))
    if setup.method == "houlsby":
        each = shape.layers * adapters.houlsby_module(shape.hidden, setup.bottleneck)
        found += [("houlsby after attention", 0, each), ("houlsby after the MLP", 0, each)]
    if setup.method == "prefix":
        found.append(("prefix of keys and values", 0, adapters.prefix(shape, setup.virtual_tokens)))
    if setup.method == "prompt":
        found.append(("prompt before the text", 0, adapters.prompt(shape, setup.virtual_tokens)))
    return [(name, 0, frozen) if full else (name, frozen, trained) for name, frozen, trained in found]


def svg(name: str, setup: Setup) -> str:
    """The picture. Every bar has the same height, so its length is its number of parameters."""
    rows = parts(setup)
    most = max(frozen + trained for _, frozen, trained in rows)
    room = _WIDTH - _LEFT - 180
    height = 70 + len(rows) * (_PART_HEIGHT // 2 + _GAP) + 30
    total, trained = sum(f + t for _, f, t in rows), sum(t for *_, t in rows)
    said = f"{name}: {setup.method}, {trained:,} of {total:,} parameters trained ({trained / total:.3%})"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="26" font-size="15" font-weight="600" fill="{_INK}">{escape(said)}</text>',
        f'<text x="12" y="46" fill="{_LINE}">{escape(_shape_in_words(setup.shape))}</text>',
    ]
    y = 64
    for label, frozen, values in rows:
        middle = y + _PART_HEIGHT // 4 + 5
        lines.append(
            f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end" fill="{_INK}">{escape(_short(label))}</text>'
        )
        width = room * frozen / most
        own = max(2.0, room * values / most) if values else 0.0
        for x, wide, colour in ((_LEFT, width, _FROZEN), (_LEFT + width, own, _TRAINED)):
            if wide:
                lines.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{_PART_HEIGHT // 2}" fill="{colour}"/>'
                )
        figures = f"{frozen + values:,}" if not frozen or not values else f"{frozen:,} + {values:,}"
        x = _LEFT + width + own + 6
        lines.append(f'<text x="{x:.2f}" y="{middle}" fill="{_LINE}" font-size="12">{figures}</text>')
        y += _PART_HEIGHT // 2 + _GAP
    y += 8
    for x, colour, word in ((_LEFT, _FROZEN, "frozen"), (_LEFT + 110, _TRAINED, "trained, at least 2 pixels")):
        lines.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{y + 12}" fill="{_INK}">{word}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _short(label: str) -> str:
    return label.rpartition(".")[2] if "." in label else label.replace("houlsby after", "after")


def _shape_in_words(shape: ModelShape) -> str:
    experts = f", {shape.experts} experts of which {shape.active} take a token" if shape.experts else ""
    return (
        f"{shape.layers} layers, each linear's bar is that of all of them; hidden {shape.hidden}, {shape.heads} heads, "
        f"{shape.kv_heads} of keys and values, vocabulary {shape.vocabulary}{experts}"
    )
