"""The `fastlora` command, as the distribution fastlora-kernels installs it; the package is imported as `fastlora`.

It is not in the package, because another distribution may own that name: then this says so.
"""

import importlib.util
from pathlib import Path


def main() -> None:
    """The entry point of the `fastlora` script.

    Raises:
        SystemExit: `import fastlora` gives another project's package.
    """
    spec = importlib.util.find_spec("fastlora")
    found = spec and spec.origin
    if not found or not Path(found).with_name("cli.py").is_file():
        raise SystemExit(
            f"`import fastlora` gives {found or 'a folder without a package'}, not fastlora-kernels: another package "
            "or folder has the name. Run `pip uninstall fastlora`, then `pip install fastlora-kernels` again"
        )
    from fastlora import cli

    cli.main()
