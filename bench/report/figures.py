"""The pictures of a run, from its rows and nothing else: speedup bars, the roofline, the share of the floor.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; each provider has a marker too. Lines and
bars carry their names, so there is no legend to look up.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bench.measure.floors import BF16_BYTES, EXPAND_BYTES, PACKED_BYTES, Rates
from bench.measure.machine import Machine
from bench.measure.operands import DEQUANTIZE
from bench.measure.record import GRAPH, Point
from bench.report.cases import MODES, OURS, Case, Run, comparisons, in_order


class Look(NamedTuple):
    """How a provider is drawn."""

    color: str
    marker: str


LOOKS = {
    "fastlora-bf16": Look("#0072B2", "o"),
    "fastlora-fp32": Look("#56B4E9", "s"),
    "torch": Look("#000000", "D"),
    "peft-bf16": Look("#D55E00", "v"),
    "peft-fp32": Look("#E69F00", "^"),
    "peft-eval": Look("#8C564B", "<"),
    "bitsandbytes": Look("#CC79A7", "X"),
    "unsloth": Look("#009E73", "P"),
    "lorafusion": Look("#7A6A00", "*"),
    "compile": Look("#7F7F7F", "h"),
}
_OTHER = Look("#444444", ".")
_LABEL_GAP = 0.065  # of an axis' height: the least between two names next to it
_TITLES = {"nf4_linear": "NF4", "bf16_linear": "bf16", DEQUANTIZE: "NF4 expanded"}


def look(provider: str) -> Look:
    """Colour and marker of a provider; a replayed graph has its provider's."""
    return LOOKS.get(provider.removesuffix(GRAPH), _OTHER)


def _dress(axes: Any, x: str, y: str = "", title: str = "", grid: bool = False) -> None:
    """Labels, small ticks, no frame on the right and on top."""
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6)


def _marked(provider: str, size: int) -> dict[str, Any]:
    """Options of a line's or a point's marker; that of a replayed graph is hollow."""
    shown = look(provider)
    face = "white" if provider.endswith(GRAPH) else shown.color
    return {"color": shown.color, "marker": shown.marker, "markersize": size, "markerfacecolor": face}


def all_figures(points: Sequence[Point]) -> dict[str, Figure]:
    """Name -> figure, of all that the rows have something for."""
    figures: dict[str, Figure | None] = {}
    for mode in ("both", "decode", "forward", "backward"):
        figures[f"speedup_{mode}"] = speedup(points, mode)
        figures[f"share_of_floor_{mode}"] = share_of_floor(points, mode)
    figures["dequantize"] = dequantize(points)
    figures["roofline"] = roofline(points)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _panels(
    cases: Iterable[Case], width: float, height: Callable[[list[Case]], float]
) -> tuple[Figure, list[tuple[Any, list[Case]]]]:
    """A figure with a panel a kernel, rank and dropout (rows) and shape (columns); each panel with its cases.

    height: inches of a panel, by its cases; the tallest of a row counts.
    """
    found: dict[tuple[Any, Any], list[Case]] = {}
    for c in sorted(cases):
        found.setdefault(((c.kernel != "nf4_linear", c.kernel, c.dropout, c.R), (c.K, c.N)), []).append(c)
    rows, shapes = (sorted({key[i] for key in found}) for i in range(2))
    heights = [max(height(found.get((row, shape), [])) for shape in shapes) for row in rows]
    figure = Figure(figsize=(width * len(shapes) + 0.5, sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(shapes), squeeze=False, height_ratios=heights)
    panels = []
    for axes, key in zip(grid.flat, itertools.product(rows, shapes), strict=True):
        if key in found:
            (_, kernel, dropout, r), (k, n) = key
            p = f", p={dropout:g}" if dropout else ""
            axes.set_title(f"{_TITLES[kernel]} {k} → {n}, r={r}{p}", fontsize=10, loc="left")
            panels.append((axes, found[key]))
        else:
            axes.set_axis_off()
    return figure, panels


def speedup(points: Iterable[Point], mode: str) -> Figure | None:
    """Bars: each peer's time over ours; None without such rows."""
    found: dict[Case, dict[str, float]] = {}
    for c in comparisons(points):
        if c.case.mode == mode and c.case.kernel != DEQUANTIZE:
            found.setdefault(c.case, {})[c.peer] = c.speedup
    if not found:
        return None
    figure, panels = _panels(found, 4.6, lambda cases: 0.9 + 0.19 * sum(1 + len(found[case]) for case in cases))
    for axes, cases in panels:
        _speedup_panel(axes, {case.M: found[case] for case in cases})
    figure.suptitle(f"How many times as fast as each peer: {MODES[mode]}", fontsize=12)
    return figure


def _speedup_panel(axes: Any, found: dict[int, dict[str, float]]) -> None:
    """For each M a heading, and a bar a peer."""
    _dress(axes, "peer's time over fastlora's; hatched: the peer is faster")
    y, names = 0.0, {}
    for m, speedups in found.items():
        names[y] = f"M = {m}"
        for peer in in_order(speedups, list(LOOKS)):
            y += 1
            names[y], value = peer, speedups[peer]
            hatch = "" if value >= 1 else "////"
            axes.barh(y, value, height=0.78, color=look(peer).color, hatch=hatch, edgecolor="white")
            axes.text(max(value, 1), y, f" {value:.2f}×", va="center", fontsize=8)
        y += 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(names), list(names.values()), fontsize=8)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("M =") else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -0.6)
    axes.set_xlim(0, max(1.2, *(value for speedups in found.values() for value in speedups.values())) * 1.18)


def share_of_floor(points: Iterable[Point], mode: str) -> Figure | None:
    """Lines: the floor's time over each provider's against M, at dropout 0; None without such rows."""
    cases = {
        case: shares
        for case, timed in Run(points).cases().items()
        if case.mode == mode and case.kernel != DEQUANTIZE and not case.dropout
        if (shares := {name: p.share_of_floor for name, p in timed.items() if p.share_of_floor is not None})
    }
    if not cases:
        return None
    figure, panels = _panels(cases, 4.8, lambda _: 3.7)
    for axes, of_panel in panels:
        _dress(axes, "tokens, M", "floor's time over the provider's", grid=True)
        _share_panel(axes, {case.M: cases[case] for case in of_panel})
    figure.suptitle(f"Share of the floor: {MODES[mode]}, no dropout", fontsize=12)
    return figure


def _share_panel(axes: Any, shares: dict[int, dict[str, float]]) -> None:
    """A line a provider, named at its right end."""
    ends: list[tuple[str, float, float]] = []
    for provider in in_order((name for found in shares.values() for name in found), list(LOOKS)):
        xy = [(m, found[provider]) for m, found in shares.items() if provider in found]
        width, style = 2.2 if provider.startswith(OURS) else 1.3, "--" if provider.endswith(GRAPH) else "-"
        axes.plot(*zip(*xy, strict=True), **_marked(provider, 5), linewidth=width, linestyle=style)
        ends.append((provider, *xy[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(shares), [str(m) for m in shares], fontsize=8)
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    _name_ends(axes, ends)


def _name_ends(axes: Any, ends: list[tuple[str, float, float]]) -> None:
    """Write each line's name next to its end, moved apart where two would overlap."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    above = 1.0 + _LABEL_GAP
    places = []
    for height, name in sorted(((to_axes.transform((x, y))[1], name) for name, x, y in ends), reverse=True):
        above = min(height, above - _LABEL_GAP)
        places.append((name, above))
    under = min(0.0, above)
    for name, height in places:
        where = height - under
        axes.plot(1.02, where, **_marked(name, 5), transform=axes.transAxes, clip_on=False)
        axes.text(1.04, where, name, transform=axes.transAxes, fontsize=8, va="center", color=look(name).color)


def dequantize(points: Iterable[Point]) -> Figure | None:
    """Bars: what share of the copy bandwidth the expansion of a weight reaches; None without such rows."""
    cases = {case: timed for case, timed in Run(points).cases().items() if case.kernel == DEQUANTIZE}
    bars = []
    for case in sorted(cases):
        how = f"merged, r={case.R}" if case.R else "plain"
        for name in in_order(cases[case], list(LOOKS)):
            share = cases[case][name].share_of_floor
            if share is not None:
                bars.append((f"{case.shape} {how}: {name}", share, look(name).color))
    if not bars:
        return None
    figure = Figure(figsize=(8, 0.26 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    names, shares, colors = zip(*bars, strict=True)
    axes.barh(range(len(bars)), shares, color=colors, height=0.75)
    for y, share in enumerate(shares):
        axes.text(share, y, f" {share:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, max(1.1, *shares) * 1.05)
    _dress(axes, f"share of the floor: {EXPAND_BYTES:.3f} bytes a weight at the measured copy bandwidth")
    figure.suptitle("Expanding an NF4 weight to bf16", fontsize=12)
    return figure


def roofline(points: Sequence[Point]) -> Figure | None:
    """FLOP a second against FLOP a byte that must move, under the measured roof; None without the roof or rows."""
    copies, products = ([p for p in points if p.kernel == kernel] for kernel in ("copy", "matmul"))
    cases = {
        case: timed
        for case, timed in Run(points).cases().items()
        if case.mode in ("both", "decode") and case.kernel != DEQUANTIZE and not case.dropout
    }
    if not copies or not products or not cases:
        return None
    rates = Machine(copies[-1], products[-1]).rates
    kernels = sorted({case.kernel for case in cases}, reverse=True)
    figure = Figure(figsize=(6.2 * len(kernels) + 0.4, 5.0), layout="constrained")
    labels = "FLOP per byte that must be moved", "TFLOP/s of the products"
    for axes, kernel in zip(figure.subplots(1, len(kernels), squeeze=False)[0], kernels, strict=True):
        _dress(axes, *labels, f"{_TITLES[kernel]} base", grid=True)
        of_kernel = {case: timed for case, timed in cases.items() if case.kernel == kernel}
        _roofline_panel(axes, of_kernel, rates)
    figure.suptitle("Roofline: forward + backward, and decode (hollow: replayed from a CUDA graph)", fontsize=12)
    return figure


def _roofline_panel(axes: Any, cases: dict[Case, dict[str, Point]], rates: Rates) -> None:
    ends: dict[str, tuple[float, float]] = {}
    xs = []
    for case, timed in cases.items():
        passes = 2 if case.mode == "both" else 1
        flop = passes * 2 * case.M * case.K * case.N
        weight = (PACKED_BYTES if case.kernel == "nf4_linear" else BF16_BYTES) * case.K * case.N
        x = flop / (passes * (weight + BF16_BYTES * case.M * (case.K + case.N)))
        xs.append(x)
        for name in in_order(timed, list(LOOKS)):
            y = flop / timed[name].p50 / 1e9
            axes.plot(x, y, **_marked(name, 6), linestyle="none")
            if x >= ends.get(name, (0.0, 0.0))[0]:
                ends[name] = (x, y)
    low, high = min(xs) / 2, max(xs) * 2
    corner = min(max(rates.balance, low), high)
    roof = [(x, min(x * rates.bytes_per_s, rates.flop_per_s) / 1e12) for x in (low, corner, high)]
    axes.plot(*zip(*roof, strict=True), color="black", linewidth=1.5)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    text = f"roof: {rates.bytes_per_s / 1e9:.0f} GB/s, {rates.flop_per_s / 1e12:.3g} TFLOP/s, measured"
    axes.text(0.98, 0.03, text, transform=axes.transAxes, fontsize=8, ha="right")
    _name_ends(axes, [(name, *end) for name, end in ends.items()])


def training_bars(timed: dict[Case, dict[str, float]], names: dict[str, str], title: str) -> Figure:
    """Bars of milliseconds for the README: a group a case, a bar for each of `names` (provider -> label)."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    _dress(axes, "", "milliseconds, log scale", title)
    width = 0.81 / len(names)
    for i, (provider, label) in enumerate(names.items()):
        heights = [found[provider] for found in timed.values()]
        places = [group + (i - (len(names) - 1) / 2) * width for group in range(len(heights))]
        bars = axes.bar(places, heights, width * 0.92, label=label, color=look(provider).color)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(timed)), [f"M = {case.M}" for case in timed])
    axes.legend(frameon=False, fontsize=9)
    return figure
