"""The table of commands: `fastlora COMMAND`, one file each in `commands/`.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

from typing import Annotated

from fastlora.distribution import install_line

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(f"the fastlora command needs the extra `train`: {install_line('train')}") from error

from fastlora.commands.analyze import analyze
from fastlora.commands.compare import compare
from fastlora.commands.doctor import doctor
from fastlora.commands.forecast import forecast
from fastlora.commands.inspect import inspect
from fastlora.commands.keys import keys
from fastlora.commands.params import params
from fastlora.commands.recommend import recommend
from fastlora.commands.search import search
from fastlora.commands.train import train
from fastlora.commands.version import version

app = typer.Typer(
    name="fastlora",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
for command in (train, forecast, recommend, params, inspect, analyze, compare, search, keys, doctor, version):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA and QLoRA fine-tuning at the cost of the bare matrix product."""


def main() -> None:
    """The entry point of the `fastlora` script."""
    app()
