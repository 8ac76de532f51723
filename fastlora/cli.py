"""The table of commands: `fastlora COMMAND`, one file each in `commands/`.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("the fastlora command needs the extra `train`: pip install 'fastlora[train]'") from error

from fastlora.commands.doctor import doctor
from fastlora.commands.keys import keys
from fastlora.commands.train import train
from fastlora.commands.version import version

app = typer.Typer(
    name="fastlora",
    help="LoRA and QLoRA fine-tuning at the cost of the bare matrix product.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
for command in (train, keys, doctor, version):
    app.command()(command)


def main() -> None:
    """The entry point of the `fastlora` script."""
    app()
