"""Writing a file so that a crash leaves the old one or the new one, never half of it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def moved_into(path: Path) -> Iterator[Path]:
    """A scratch file next to `path`: it replaces `path` if all goes well, and is deleted otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)  # mkstemp's files are for their owner only
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the contents of `path` by this text, in UTF-8."""
    with moved_into(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
