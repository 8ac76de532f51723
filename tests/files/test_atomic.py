"""Atomic writes: the new file or the old one, with the permissions that a plain write gives, and nothing left over."""

import errno

import pytest
import torch
from safetensors.torch import save_file

from fastlora.files.atomic import append_line, moved_into, write_text
from tests.support.full_disk import no_file_beyond


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


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(bytes(2000)), lambda path: save_file({"a": torch.zeros(2000)}, path)]
)
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path, write):
    path = tmp_path / "a.bin"
    write_text(path, "old")
    with no_file_beyond(1000), pytest.raises(OSError, match="too large") as error, moved_into(path) as scratch:
        write(scratch)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, moved_into(tmp_path / "outer"):  # noqa: SIM117
        with moved_into(tmp_path / "none" / "inner"):
            pass
    assert error.value.filename == str(tmp_path / "none" / "inner")


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "a" * 600)
    with no_file_beyond(1000), pytest.raises(OSError, match="too large") as error:
        append_line(path, "b" * 600)
    assert error.value.filename == str(path)
    assert path.read_text() == "a" * 600 + "\n"
    append_line(path, "é")
    assert path.read_text(encoding="utf-8").splitlines()[1] == "é"
