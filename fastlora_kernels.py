"""The `fastlora` command, as the distribution fastlora-kernels installs it; the package is imported as `fastlora`.

It is not in the package, because another distribution may own that name: then this says so.
"""

import importlib.util
from pathlib import Path


def main() -> None:
    """The entry point of the `fastlora` script.

    Raises:
        SystemExit: `import fastlora` gives another package.
    """
    ours = Path(__file__).resolve().with_name("fastlora") / "__init__.py"
    spec = importlib.util.find_spec("fastlora")
    found = spec and spec.origin
    if not found or Path(found).resolve() != ours:
        raise SystemExit(
            f"`import fastlora` gives {found or 'a folder without a package'} and not {ours}: another distribution has "
            "the name, or a folder. Run `pip uninstall fastlora`, then `pip install fastlora-kernels` again"
        )
    from fastlora import cli

    cli.main()
