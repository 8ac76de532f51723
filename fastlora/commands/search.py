"""`fastlora search`: the fewest trained parameters that reach a share of the best gain."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.commands.usage import Overrides, refuse


def search(
    recipe: Annotated[
        str | None, typer.Argument(help="a recipe with max_steps and data to evaluate on; or the demo's")
    ] = None,
    target: Annotated[float, typer.Option(help="share of the best gain to reach")] = 0.99,
    ranks: Annotated[str, typer.Option(help="with commas between them")] = "1,2,4,8,16,32,64",
    out: Annotated[Path, typer.Option(help="a folder; a search that was stopped there goes on")] = Path("runs/search"),
    overrides: Overrides = None,
) -> None:
    """Train LoRA in several ranks on several sets of layers, drop what is beaten, and name the smallest that suffices.

    Ends with 0, 3 if something was asked wrongly, 130 if it was stopped.
    """
    from rich.console import Console
    from transformers.utils import logging

    from fastlora.planner import search as searching
    from fastlora.training import recipe as recipes

    logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    try:
        asked = recipes.parse_overrides(overrides or [])
        if recipe is None:
            from fastlora.demo import demo

            values = demo.values_with_data(out.with_name(f"{out.name}-data"), asked)
        else:
            values = {**recipes.read(recipe), **asked}
        if not all(part.strip().isdigit() for part in ranks.split(",")):
            raise ValueError(f"ranks: expected whole numbers with commas between them, not {ranks!r}")
        numbers = [int(part) for part in ranks.split(",")]
        shape = searching.shape_for(values)
        best, found, steps = searching.search(values, shape, numbers, target, out, console)
    except ValueError as error:
        refuse(error)
    except KeyboardInterrupt as stop:
        console.print("stopped; the same command goes on")
        raise typer.Exit(130) from stop
    top = max((each for each in found if each.steps >= steps), key=lambda each: each.gain)
    console.print(f"\nlargest gain: {top.gain:.4f} by {top.name}, {top.trained:,} parameters")
    console.print(f"[bold]{best.name}[/]: {best.gain / top.gain:.1%} of it with {best.trained:,}")
    for each in searching.frontier([each for each in found if each.steps >= steps]):
        console.print(f"  {each.trained:>12,}  {each.gain:.4f}  {each.name}")
    console.print(
        f"every candidate is in {out / searching.STATE}, the frontier in {out / searching.PICTURE}", markup=False
    )
