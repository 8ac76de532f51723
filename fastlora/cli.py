"""The `fastlora` command. Heavy imports wait inside the commands, so that `--help` answers at once."""

import os
import shlex
import signal
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("the fastlora command needs its extra: pip install 'fastlora[train]'") from error

from fastlora import __version__

app = typer.Typer(
    name="fastlora",
    help="LoRA and QLoRA fine-tuning at the cost of the bare matrix product.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="a YAML file, or the name of a built-in recipe; none: the demo")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key; may be repeated")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in output_dir")] = False,
) -> None:
    """Fine-tune a model as a recipe says; without one, the demo: a small model that ships with fastlora.

    Ctrl-C saves a checkpoint and stops; the same command with --resume continues.
    """
    from rich.console import Console

    from fastlora import recipe as recipes

    console = Console()
    try:
        if recipe is None:
            from fastlora import demo

            result = demo.run(overrides or [], resume, console)
        else:
            loaded = recipes.load(recipe, overrides or [])
            from fastlora.train import train as run

            result = run(loaded, resume, console=console)
    except (ValueError, FloatingPointError) as error:
        _fail(str(error))
    if result.interrupted is not None:
        set_again = [word for override in overrides or [] for word in ("--set", override)]
        words = ["fastlora", "train", *([recipe] if recipe else []), *set_again, "--resume"]
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            console.print(f"continue with: {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(128 + signal.Signals[result.interrupted])


@app.command()
def keys() -> None:
    """List the keys of a recipe, with defaults and meaning."""
    from rich.console import Console
    from rich.table import Table

    from fastlora.recipe import describe

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("key", "default", "meaning"):
        table.add_column(heading, no_wrap=heading != "meaning")
    for name, default, meaning in describe():
        table.add_row(name, default, meaning)
    Console().print(table)


@app.command()
def doctor() -> None:
    """Show versions, devices, which backends are live, why the others are not, and what would help."""
    from rich.console import Console

    from fastlora import doctor as clinic

    clinic.show(clinic.diagnose(), Console())


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def main() -> None:
    """The entry point of the `fastlora` script."""
    app()
