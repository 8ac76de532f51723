"""The command line: `python -m bench SUBCOMMAND`.

A subcommand is a module with three names: `SUMMARY` (a line for the help), `add_arguments(parser)`
and `run(arguments) -> exit status`. To add one, write the module and enter it in `_MODULES`.
"""

import argparse
from collections.abc import Sequence

from bench import kernels, readme, static

_MODULES = {"kernels": kernels, "static": static, "readme": readme}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    Raises:
        SystemExit: 2 and a list of the subcommands where none or an unknown one is given; 2 and the reason where
            an argument is not usable.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure fastlora.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_MODULES))
    parsers = {}
    for name, module in _MODULES.items():
        parsers[name] = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(parsers[name])
    arguments = parser.parse_args(argv)
    try:
        return _MODULES[arguments.command].run(arguments)
    except ValueError as error:
        parsers[arguments.command].error(str(error))
