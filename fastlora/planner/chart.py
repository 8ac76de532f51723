"""A forecast as one stacked bar beside the card's memory, in PNG or SVG."""

from pathlib import Path

from fastlora.planner.estimate import Estimate

_COLOURS = {
    "weights": "#8a8f98",
    "adapters": "#2f6fde",
    "gradients": "#7aa7f0",
    "optimizer": "#b6cdf7",
    "activations": "#e08a2e",
    "logits": "#f2c078",
    "scratch": "#6fae75",
    "batch": "#b9dcbc",
    "workspaces": "#c9c3d9",
    "context": "#dcdcdc",
    "slack": "#efefef",
}


def draw(estimate: Estimate, path: Path) -> None:
    """Write the chart.

    Raises:
        ValueError: a name that ends neither in .png nor in .svg, or no matplotlib.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: a chart is a .png or a .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a chart needs matplotlib: it comes with the extra `train`") from error
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = 0.0
    for name, size in sorted(estimate.terms.items(), key=lambda item: list(_COLOURS).index(item[0])):
        width = size / 2**30
        axes.barh(0, width, left=left, color=_COLOURS[name], label=f"{name} {width:.2f}" if width >= 0.05 else None)
        left += width
    low, high = estimate.low / 2**30, estimate.high / 2**30
    axes.errorbar((low + high) / 2, 0, xerr=(high - low) / 2, color="black", capsize=4, fmt="none", label="range")
    if estimate.card:
        axes.axvline(estimate.card.memory / 2**30, color="#c0392b", label=f"{estimate.card.name}")
    setup = estimate.forecast.setup
    axes.set_title(
        f"{estimate.model.name}, {setup.method}, {setup.batch} x {setup.length} tokens, {setup.runtime}: forecast"
    )
    axes.set_xlabel("GiB on each device")
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
