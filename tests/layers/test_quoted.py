"""What messages quote: cut, on one line, printable; and what an error says of itself."""

import errno
import os
from typing import Any

import pytest

from fastlora.layers.quoted import LONGEST, clipped, reason, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        (["q_proj", 1], "['q_proj', 1]"),
        (None, "None"),
        pytest.param(16**9000, "a huge int", id="huge int"),
        pytest.param([16**9000], "a huge list", id="list of a huge int"),
    ],
)
def test_a_value_is_shown_as_it_is_or_said_to_be_huge(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("text", ["x" * 10**6, "a\n" * 10**6, "\x1b[31m" * 10**6, "\ud800" * 999, "é字" * 999])
def test_a_text_is_cut_to_one_printable_line(text: str) -> None:
    cut = clipped(text)
    assert cut.isprintable()
    assert len(cut) == LONGEST + len("...")
    assert clipped("a  b\tc\n") == "a b c"


def test_an_error_always_says_something() -> None:
    assert reason(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")) == "No space left on device"
    assert reason(EOFError()) == "EOFError"
    assert reason(KeyError("a\nb")) == "'a\\nb'"
