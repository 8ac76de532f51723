"""Atomic writes: the new file or the old one, with the permissions that a plain write gives, and nothing left over."""

import pytest

from fastlora.files.atomic import moved_into, write_text


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new, é")
    assert path.read_text(encoding="utf-8") == "new, é"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.txt", "plain"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk full"), moved_into(path) as scratch:  # noqa: PT012
        scratch.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
