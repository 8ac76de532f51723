"""One run in one directory at a time.

The lock is the kernel's, on `run.lock`, so it ends with the process that holds it, however that ends.
`run.holder.json` says who holds it, for messages: host, process and the time of the start. Both files are gone after a
run; a note without a lock is that of a run which was killed.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from fastlora.files import atomic
from fastlora.layers.quoted import clipped, reason

LOCK, NOTE = "run.lock", "run.holder.json"


@contextlib.contextmanager
def held(directory: Path, say: Callable[[str], object] = lambda text: None) -> Iterator[None]:
    """Hold the lock of a run's directory, which is made if missing, and removed again if it stays empty.

    Args:
        say: is told of a run that was killed while it held the lock.
    Raises:
        ValueError: another run holds it (the message says which), or the directory cannot be written.
    """
    name, lock, note = clipped(str(directory)), FileLock(directory / LOCK), directory / NOTE
    made = False
    try:
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        killed = _holder(note)
        atomic.write_text(note, _mine())
    except Timeout as error:
        raise ValueError(
            f"output_dir: {name} is in use by another run ({_holder(note) or 'which has left no note'}): wait for its "
            "end, stop it, or give another output_dir"
        ) from error
    except (OSError, ValueError) as error:
        _leave(directory, lock, made)
        raise ValueError(f"output_dir: cannot write in {name} ({reason(error)}): mend that, or give another") from error
    try:
        if killed:
            say(f"the last run in {name} was killed ({killed}); its lock has ended with it")
        yield
    finally:
        _leave(directory, lock, made)


def _leave(directory: Path, lock: BaseFileLock, made: bool) -> None:
    """Take the lock's files away, and a directory that was made and holds nothing else."""
    if lock.is_locked:
        for name in (NOTE, LOCK):
            with contextlib.suppress(OSError):  # what a run came to must not depend on this
                (directory / name).unlink(missing_ok=True)
    lock.release()
    if made:
        with contextlib.suppress(OSError):  # it holds something
            directory.rmdir()


def _mine() -> str:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})


def _holder(note: Path) -> str:
    """Who left a note; "" without a readable one."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return clipped(f"process {found['pid']} on {found['host']} since {found['since']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
