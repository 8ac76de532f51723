"""`fastlora inspect`: which parts of a model a method trains, as a table and as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.commands.usage import Bottleneck, Dora, Model, Rank, Targets, VirtualTokens, refuse


def inspect(
    model: Model,
    method: Annotated[str, typer.Option(help="lora | qlora | houlsby | prefix | prompt | full")] = "lora",
    rank: Rank = 16,
    targets: Targets = "all-linear",
    dora: Dora = False,
    bottleneck: Bottleneck = 64,
    virtual_tokens: VirtualTokens = 20,
    svg: Annotated[Path | None, typer.Option(help="write the picture: FILE.svg")] = None,
) -> None:
    """Show a model's parts, frozen and trained, from its config alone.

    Ends with 0, or 3 if something was asked wrongly.
    """
    from rich.console import Console
    from rich.table import Table

    from fastlora.memory.forecast import Setup, count_trained
    from fastlora.planner import picture
    from fastlora.planner.models import resolve

    try:
        if min(rank, bottleneck, virtual_tokens) < 1:
            raise ValueError("rank, bottleneck and virtual-tokens must be at least 1")
        named = resolve(model)
        setup = Setup(
            named.shape,
            method,
            r=rank,
            targets=targets,
            dora=dora,
            bottleneck=bottleneck,
            virtual_tokens=virtual_tokens,
        )
        count_trained(setup)
        if svg:
            svg.write_text(picture.svg(model, setup), encoding="utf-8")
    except (ValueError, OSError) as error:
        refuse(error)
    table = Table(box=None, pad_edge=False, title=f"{model}, {method}", title_justify="left")
    table.add_column("part")
    table.add_column("frozen", justify="right")
    table.add_column("trained", justify="right", style="blue")
    rows = picture.parts(setup)
    for name, frozen, trained in rows:
        table.add_row(name, f"{frozen:,}" if frozen else "", f"{trained:,}" if trained else "")
    table.add_row("[bold]in all[/]", f"{sum(f for _, f, _ in rows):,}", f"{sum(t for *_, t in rows):,}")
    Console(highlight=False).print(table)
    if svg:
        typer.echo(f"wrote {svg}")
