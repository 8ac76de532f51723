"""`fastlora recommend`: plans for a model on a card, with the evidence for each choice, and a recipe to start."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.commands.usage import refuse


def recommend(
    model: Annotated[str, typer.Argument(help="as of `fastlora forecast`")] = "",
    gpu: Annotated[str, typer.Option(help="a card, as rtx-4090, or its memory, as 24gb")] = "24gb",
    gpus: Annotated[int, typer.Option(help="how many of them")] = 1,
    params: Annotated[str | None, typer.Option(help="instead of a model: its size, as 7B")] = None,
    task: Annotated[
        str, typer.Option(help="simple | moderate | complex: how far from what the model can do")
    ] = "moderate",
    tasks: Annotated[int, typer.Option(help="how many tasks, one adapter each")] = 1,
    seq: Annotated[int | None, typer.Option(help="tokens of a sample; by default as the data, or 2048")] = None,
    data: Annotated[
        Path | None, typer.Option(help="a file with an example a line: sets the length and the time")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="write the first plan as a recipe file")] = None,
) -> None:
    """Say which method, rank, rate and batch to use on a card, and on what evidence.

    Ends with 0 if a plan fits, 1 if none does, 3 if something was asked wrongly.
    """
    from rich.console import Console

    from fastlora.planner import advice

    console = Console(highlight=False, soft_wrap=True)
    try:
        if not model and not params:
            raise ValueError("name a model, or its size with --params")
        if recipe and recipe.exists():
            raise ValueError(f"recipe: {recipe} exists already")
        held = advice.data_in(data) if data else None
        plans, missing = advice.recommend(
            model, gpu=gpu, gpus=gpus, task=task, tasks=tasks, length=seq, data=held, params=params
        )
    except ValueError as error:
        refuse(error)
    if held:
        console.print(
            f"{data}: {held.examples:,} examples, about {held.tokens:,} tokens, 99% up to {held.longest} (estimated)"
        )
    for number, plan in enumerate(plans, 1):
        console.print(f"\n[bold]{number}. {plan.title}[/]")
        for reason in plan.why:
            console.print(f"   {reason}", markup=False)
        if held and plan.estimate.tokens_per_second:
            console.print(
                f"   one epoch: {held.tokens / plan.estimate.tokens_per_second[1] / 3600:.2f} hours, predicted"
            )
        console.print(f"   {plan.leave_when}", markup=False)
    for line in missing:
        console.print(f"\n[yellow]does not fit:[/] {line}")
    console.print(f"\n{advice.tutorial(plans, task)}", markup=False)
    if not plans:
        console.print("[bold red]nothing fits this card[/]")
        raise typer.Exit(1)
    if recipe:
        recipe.write_text(plans[0].recipe(str(data) if data else None), encoding="utf-8")
        console.print(f"wrote {recipe}: fastlora train {recipe}")
