"""`fastlora analyze`: what an adapter has learned, layer by layer, and which smaller rank would hold it."""

import json as json_of
from pathlib import Path
from typing import Annotated

import typer

from fastlora.commands.usage import refuse


def analyze(
    adapter: Annotated[Path, typer.Argument(help="a folder with adapter_config.json and adapter_model.safetensors")],
    truncate: Annotated[int | None, typer.Option(help="write the adapter cut to this rank, into --out")] = None,
    out: Annotated[Path | None, typer.Option(help="a new folder for the cut adapter")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a heat map: FILE.png or FILE.svg")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show singular values, effective ranks and norms of an adapter's updates, and what a smaller rank keeps.

    Ends with 0, or 3 if something was asked wrongly.
    """
    from rich.console import Console
    from rich.table import Table

    from fastlora.planner import analyze as analysis

    console = Console(highlight=False, soft_wrap=True)
    try:
        if (truncate is None) != (out is None):
            raise ValueError("truncate, out: give both or neither")
        found = analysis.analyze(adapter)
        if truncate is not None and out is not None:
            analysis.truncate(adapter, out, truncate)
        if plot:
            analysis.draw(found, plot)
    except (ValueError, OSError) as error:
        refuse(error)
    most = max(update.r for update in found.updates)
    ranks = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    if json:
        layers = [
            {"name": u.name, "r": u.r, "scaling": u.scaling, "norm": u.norm, "effective_rank": u.effective_rank,
             "singular_values": u.values} for u in found.updates
        ]  # fmt: skip
        typer.echo(json_of.dumps({"layers": layers, "kept": {r: found.kept(r) for r in ranks}}, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("layer", "left"),
        ("r", "right"),
        ("effective", "right"),
        ("90% in", "right"),
        ("norm", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for update in found.updates:
        most_of_it = next((r for r in range(1, update.r + 1) if update.kept(r) >= 0.9), update.r)
        row = (update.name, str(update.r), f"{update.effective_rank:.1f}", str(most_of_it), f"{update.norm:.3g}")
        table.add_row(*row)
    console.print(table)
    for r in ranks:
        console.print(f"rank {r} keeps {found.kept(r):.2%} of the squared norm")
    if found.refused:
        console.print(f"it cannot be cut: {found.refused}", markup=False)
    if out:
        console.print(f"wrote {out}, rank {truncate}", markup=False)
