"""What a message quotes of what it was given: on one line, at a sane length."""

import reprlib
from typing import Any

LONGEST = 200  # characters of anything that a message quotes
_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = LONGEST // 2
_QUOTED.maxlong = 40
_QUOTED.maxlist = _QUOTED.maxset = _QUOTED.maxfrozenset = _QUOTED.maxtuple = 12


def shown(value: Any) -> str:
    """A value as a message quotes it: its `repr`, cut to a sane length and depth; sets in order."""
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
