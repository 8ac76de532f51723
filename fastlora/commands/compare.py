"""`fastlora compare`: several methods on the same data, with what each gives, costs and forgets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.commands.usage import Overrides, refuse

if TYPE_CHECKING:
    from rich.table import Table

    from fastlora.planner.compare import Row


def compare(
    recipe: Annotated[
        str | None, typer.Argument(help="a recipe with data to evaluate on; without one, the demo's")
    ] = None,
    methods: Annotated[str, typer.Option(help="with commas between them: lora, qlora, houlsby, ...; or all")] = "all",
    out: Annotated[Path, typer.Option(help="a new folder for runs, table and plot")] = Path("runs/compare"),
    general: Annotated[
        Path | None, typer.Option(help="text that shows what is forgotten; by default source code")
    ] = None,
    repeats: Annotated[int, typer.Option(help="seeds of each method")] = 1,
    rate: Annotated[list[str] | None, typer.Option(help="METHOD=LEARNING_RATE; may be repeated")] = None,
    overrides: Overrides = None,
) -> None:
    """Train with several methods on the same data for as many steps, and measure what each gives, costs and forgets.

    Ends with 0, or 3 if something was asked wrongly.
    """
    from rich.console import Console
    from transformers.utils import logging

    from fastlora.planner import compare as comparison
    from fastlora.training import recipe as recipes
    from fastlora.training.inputs import read_text

    logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    try:
        chosen = comparison.METHODS if methods == "all" else [name.strip() for name in methods.split(",")]
        rates = {name: float(value) for name, _, value in (each.partition("=") for each in rate or [])}
        if unknown := sorted(set(rates) - set(comparison.METHODS)):
            raise ValueError(f"rate: {', '.join(unknown)} is no method; there are {', '.join(comparison.METHODS)}")
        asked = recipes.parse_overrides(overrides or [])
        if recipe is None:
            from fastlora.demo import demo

            values, text = demo.values_with_data(out, asked), demo.plain_text()
        else:
            values, text = {**recipes.read(recipe), **asked}, ""
        if general is not None:
            text = read_text(general)
        elif recipe is not None:
            from fastlora.demo import demo

            text = demo.plain_text()
        rows = comparison.compare(values, chosen, text, out / "runs", repeats, console, rates)
    except ValueError as error:
        refuse(error)
    wide = Console(highlight=False, width=max(console.width, 120))
    wide.print(_table(rows))
    wide.print(_by_tutorials())
    console.print(f"table, plot and runs are in {out / 'runs'}", markup=False)


def _table(rows: "list[Row]") -> "Table":
    from rich.table import Table

    from fastlora.planner.compare import of_method, spread

    table = Table(title="measured", title_justify="left", box=None, pad_edge=False)
    names = (
        "method",
        "trained",
        "held-out loss",
        "exact",
        "forgetting",
        "ms a step",
        "MiB",
        "file, MB",
        "latency",
        "merged",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, each in of_method(rows).items():
        loss, by = spread(each, "loss")
        forgets, either = spread(each, "forgetting")
        first = each[0]
        merged = "" if first.latency_merged is None else f"{first.latency_merged / first.latency_base:.2f}x"
        table.add_row(
            method, f"{first.trained_share:.2%}", f"{loss:.4f}" + (f" ± {by:.4f}" if by else ""),
            f"{spread(each, 'exact')[0]:.1%}", f"{forgets:+.4f}" + (f" ± {either:.4f}" if either else ""),
            f"{spread(each, 'step_seconds')[0] * 1e3:.0f}", f"{first.memory / 2**20:.0f} {first.memory_is}",
            f"{first.file / 1e6:.2f}", f"{first.latency / first.latency_base:.2f}x", merged,
        )  # fmt: skip
    return table


def _by_tutorials() -> "Table":
    from rich.table import Table

    table = Table(title="what tutorials print, not measured here", title_justify="left", box=None, pad_edge=False)
    for name in ("method", "trained", "memory", "quality", "latency"):
        table.add_column(name)
    for row in (
        ("full", "100%", "16 to 20 bytes a parameter", "best", "none"),
        ("lora", "0.1 to 1%", "2 GB a billion + 2", "near full", "none once merged"),
        ("qlora", "0.1 to 1%", "0.6 GB a billion + 2", "near LoRA", "none once merged"),
        ("houlsby", "1 to 4%", "as LoRA", "near full", "some"),
        ("prefix", "0.1%", "least", "below LoRA", "context used up"),
        ("prompt", "below 0.01%", "least", "lowest on small models", "context used up"),
    ):
        table.add_row(*row)
    return table
