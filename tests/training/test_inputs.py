"""Text files that a user hands over."""

from pathlib import Path

import pytest

from fastlora.training.inputs import read_text


def test_text_is_read_with_its_line_ends_as_one(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa\r\nb\n\xc3\xa9")
    assert read_text(tmp_path / "t") == "a\nb\né"
    with pytest.raises(ValueError, match=r"none: no such file$"):
        read_text(tmp_path / "none")
