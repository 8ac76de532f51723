"""What the planner's commands share: options of the same meaning, and how a wrong question ends."""

from typing import Annotated, NoReturn

import typer

USAGE_ERROR = 3  # 1 and 2 are answers of some of them

Model = Annotated[str, typer.Argument(help="a folder with config.json, a hub name, or a name such as llama-3-8b")]
Rank = Annotated[int, typer.Option(help="of LoRA")]
Targets = Annotated[str, typer.Option(help="linears to adapt, with commas between them")]
Dora = Annotated[bool, typer.Option(help="DoRA")]
Bottleneck = Annotated[int, typer.Option(help="features inside a Houlsby adapter")]
VirtualTokens = Annotated[int, typer.Option(help="of prefix and prompt tuning")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="of every run")]


def refuse(error: BaseException) -> NoReturn:
    """Say what was asked wrongly, and end."""
    from rich.console import Console

    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(USAGE_ERROR) from error
