"""Which module names a user means, by peft's rules; functions of strings only.

"all-linear" means every linear layer except the output head; a list means the modules whose name is an entry
or ends in "." + an entry; a string is a regular expression for the whole name.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastlora.layers.quoted import shown

ALL_LINEAR = "all-linear"


def means(entry: str, name: str) -> bool:
    """Whether an entry of a list is this name, or its end after a dot."""
    return name == entry or name.endswith(f".{entry}")


def within(name: str, head: str | None) -> bool:
    """Whether a module is `head`, or inside it."""
    return head is not None and (name == head or name.startswith(head + "."))


def nearest(wanted: str, names: Collection[str]) -> str:
    """The hint "; nearest: ..." with the names most like `wanted`, compared whole and by last part; "" without any."""
    names = list(names)
    by_end = {name.rsplit(".", 1)[-1] for name in names}
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], sorted(by_end), n=3, cutoff=0.4)
    close += [name for name in difflib.get_close_matches(wanted, names, n=1, cutoff=0.6) if name not in close]
    found = close or sorted(by_end)[:8]
    return f"; nearest: {', '.join(found)}" if found else ""


def fits_pattern(pattern: str, name: str) -> bool:
    """Whether a regular expression fits a name, or its end after a dot: peft's rule for rank_pattern, alpha_pattern."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def matches(wanted: str | Collection[str] | None, name: str) -> bool:
    """Whether a name is meant by a list of entries, or by a regular expression for the whole name."""
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(means(entry, name) for entry in wanted)


def check_names(option: str, value: str | Collection[str] | None) -> None:
    """Raise ValueError unless the option holds a regular expression, a collection of strings, or None."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{option}={shown(value)} is not a regular expression: {error}") from error
    elif value is not None:
        if not isinstance(value, Collection):
            raise ValueError(f"{option} must be a string or a list of strings, not {shown(value)}")
        odd = [entry for entry in value if not isinstance(entry, str)]
        if odd:
            raise ValueError(f"{option} must hold strings only; got {shown(odd[0])}")


def check_patterns(option: str, value: Any) -> None:
    """Raise ValueError unless the option holds a mapping whose keys are regular expressions."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{option} must be a mapping of patterns for names to numbers, not {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{option} must have strings as keys; got {shown(key)}")
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{option}: {shown(key)} is not a regular expression: {error}") from error
