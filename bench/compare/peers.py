"""Which of the packages to compare with are installed; `--install` tries to get the others.

`python -m bench.compare.peers`. Packages are only installed into a virtual environment, and torch, triton and numpy
stay as they are. Without a network pip says so at once, and the bench goes on with what there is.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = ("peft", "bitsandbytes", "unsloth", "lorafusion")
INSTALLABLE = ("peft", "bitsandbytes", "unsloth")  # lorafusion is not on PyPI
KEPT = ("torch", "triton", "numpy")


def absent() -> list[str]:
    """The packages of the comparison that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def install(names: list[str]) -> int:
    """pip's exit status; packages in `KEPT` are pinned to what is here."""
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in KEPT if importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        quick = ("--quiet", "--retries", "0", "--timeout", "10", "--disable-pip-version-check")
        command = [sys.executable, "-m", "pip", "install", *quick, "--constraint", str(constraints), *names]
        return subprocess.run(command, check=False).returncode


def main(arguments: list[str]) -> int:
    """Print what is absent, and try to install it where asked to; the exit status is 0 either way."""
    wanted = [name for name in absent() if name in INSTALLABLE]
    if "--install" in arguments and wanted:
        if sys.prefix == sys.base_prefix:
            print("not in a virtual environment: nothing is installed")
        else:
            install(wanted)
    print(f"absent: {', '.join(absent()) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
