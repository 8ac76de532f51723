"""Writing a file so that a crash or a full disk leaves the old one or the new one, never half of it."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give the errors of writing `path` its name: the system's of a write have none, safetensors' are no OSError."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    except OSError as error:
        known = error.filename is not None and not Path(str(error.filename)).name.startswith(_prefix(path))
        if error.errno is None or known:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def moved_into(path: Path) -> Iterator[Path]:
    """A scratch file next to `path`: it replaces `path` if all goes well, and is deleted otherwise.

    Raises:
        OSError: it cannot be written; the error names `path`, which is as it was.
    """
    with named(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
        os.close(handle)
        scratch = Path(name)
        try:
            yield scratch
            sync(scratch)
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


def append_line(path: Path, line: str) -> None:
    """Add one line of UTF-8 to `path`, or nothing where it does not fit on the disk.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    with named(path), path.open("ab", buffering=0) as file:
        size, left = file.tell(), f"{line}\n".encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.truncate(file.fileno(), size)
            raise


def _prefix(path: Path) -> str:
    return f".{path.name}."


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
