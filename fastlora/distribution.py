"""What this package is installed as, and who else claims its import name.

On PyPI the name `fastlora` belongs to another project, so this one is the distribution `fastlora-kernels`, imported as
`fastlora`. Where both are installed, the order of the path decides which one Python imports.
"""

import sys
import warnings
from pathlib import Path

NAME = "fastlora-kernels"
IMPORT = "fastlora"


def install_line(extra: str = "") -> str:
    """The command that installs this distribution, with an extra on request."""
    return f"pip install '{NAME}[{extra}]'" if extra else f"pip install {NAME}"


def rivals() -> list[str]:
    """Files that another distribution `fastlora` has in folders of installed packages: its module, its metadata.

    It only lists these folders. Whoever owns the name without being called so, `fastlora doctor` finds, in the metadata
    of all that is installed, which takes a hundred times as long.
    """
    found = []
    for folder in map(Path, dict.fromkeys(sys.path)):
        if folder.name in ("site-packages", "dist-packages") and folder.is_dir():
            found += [*folder.glob("fastlora-*.dist-info"), *folder.glob("fastlora.py")]
    return [str(path) for path in found]


def advice(rival: str) -> str:
    """What to do about another owner of the import name."""
    return (
        f"{rival}: another distribution has the import name `fastlora`, and the order of the path decides which one "
        f"Python imports. Run `pip uninstall fastlora`, then `{install_line()}` again"
    )


def warn_of_rivals() -> None:
    """Warn where another distribution claims the import name."""
    if found := rivals():
        warnings.warn(f"{advice(', '.join(found))}. This is {NAME} in {Path(__file__).parent}", stacklevel=3)
