"""The command line: `python -m bench SUBCOMMAND`.

A subcommand is a module with three names: `SUMMARY` (a line for the help), `add_arguments(parser)`
and `run(arguments) -> exit status`. To add one, write the module and enter it in `COMMANDS`. Only the module
asked for is imported; the help imports all.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {  # name -> module
    "kernels": "bench.compare.linear",
    "experts": "bench.compare.experts",
    "options": "bench.compare.options",
    "host": "bench.compare.host",
    "steps": "bench.compare.steps",
    "train": "bench.compare.train",
    "count": "bench.compare.count",
    "forecast": "bench.compare.forecast",
    "generate": "bench.compare.generate",
    "static": "bench.machine_code.static",
    "predict": "bench.compare.predict",
    "tune": "bench.tune.tune",
    "plot": "bench.report.plot",
    "report": "bench.report.page",
    "gpu": "bench.gpu.gpu",
    "readme": "bench.report.readme",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    Raises:
        SystemExit: 2 and a list of the subcommands where none or an unknown one is given; 2 and the reason where
            an argument is not usable, or a package that the subcommand needs is absent.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure fastlora.")
    if name not in COMMANDS:
        return _without_command(parser, words)
    module = _load(name)
    if isinstance(module, ImportError):
        parser.error(f"{name} cannot run here: {module}")
    own = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(own)
    arguments = own.parse_args(words[1:])
    try:
        return module.run(arguments)
    except ValueError as error:
        own.error(str(error))


def _without_command(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Print the help, or refuse the words."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        module = _load(name)
        summary = f"not here: {module}" if isinstance(module, ImportError) else module.SUMMARY
        commands.add_parser(name, help=summary)
    parser.parse_args(words)
    return 2


def _load(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(COMMANDS[name])
    except ImportError as error:
        return error
