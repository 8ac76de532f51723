"""`fastlora params`: how many parameters a method trains, and which options a printed count stands for."""

from typing import Annotated

import typer

from fastlora.commands.usage import Bottleneck, Dora, Model, Rank, Targets, VirtualTokens, refuse


def params(
    model: Model,
    method: Annotated[str, typer.Option(help="lora | qlora | houlsby | prefix | prompt | full")] = "lora",
    rank: Rank = 16,
    targets: Targets = "all-linear",
    dora: Dora = False,
    bottleneck: Bottleneck = 64,
    virtual_tokens: VirtualTokens = 20,
    explain: Annotated[int | None, typer.Option(help="a printed count: say what gives it")] = None,
) -> None:
    """Count what is trained, linear by linear; or find which options give a count.

    Ends with 0; with --explain 1 if nothing gives the count; 3 if something was asked wrongly.
    """
    from rich.console import Console

    from fastlora.memory.forecast import Setup, count_trained
    from fastlora.planner import counts
    from fastlora.planner.models import resolve

    console = Console(highlight=False, soft_wrap=True)
    try:
        named = resolve(model)
        shape = named.shape
        if min(rank, bottleneck, virtual_tokens) < 1:
            raise ValueError("rank, bottleneck and virtual-tokens must be at least 1")
        if explain is not None:
            found = counts.explain(shape, explain)
            for line in found:
                console.print(line, markup=False)
            if not found:
                console.print(f"nothing that is tried trains exactly {explain:,} parameters of {model}", markup=False)
            raise typer.Exit(0 if found else 1)
        setup = Setup(
            shape, method, r=rank, targets=targets, dora=dora, bottleneck=bottleneck, virtual_tokens=virtual_tokens
        )
        total = count_trained(setup)
        if method in ("lora", "qlora"):
            for row in counts.rows(shape, rank, targets, dora):
                console.print(f"{row.values:>15,}  {row.name} = {row.formula}", markup=False)
    except ValueError as error:
        refuse(error)
    console.print(f"{total:>15,}  trained, {total / shape.parameters:.4%} of {shape.parameters:,} ({named.source})")
