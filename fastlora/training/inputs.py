"""What a user hands over: text files, read with clear errors, and values quoted in messages at a sane length."""

import gzip
import reprlib
import zlib
from pathlib import Path
from typing import Any

LONGEST = 200  # characters of anything that a message quotes
_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = LONGEST // 2
_QUOTED.maxlong = 40


def shown(value: Any) -> str:
    """A value as a message quotes it: its `repr`, cut to a sane length and depth."""
    try:
        return clipped(_QUOTED.repr(value))
    except ValueError:  # Python does not write out integers of thousands of digits
        return f"a huge {type(value).__name__}"


def clipped(text: str) -> str:
    """A text on one line without control characters, cut to `LONGEST`."""
    line = " ".join(text[: 2 * LONGEST].split())
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def reason(error: BaseException) -> str:
    """What an error says, on one line: the system's words for an OSError, its kind where it says nothing."""
    text = getattr(error, "strerror", None) or str(error)
    return clipped(text) or type(error).__name__


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; one named `.gz` is decompressed.

    Raises:
        ValueError: there is no such file, or it cannot be read; the message names it and says why.
    """
    name = clipped(str(path))
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 (byte {error.start}): save it as UTF-8 text") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{name}: cannot be read ({reason(error)})") from error
