"""`bench readme`: both tables go between their markers, and what is around them stays."""

import shutil

import pytest

from bench.cli import main
from bench.measure.record import ROOT
from bench.report import readme


def run(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    options = ("--readme", str(page), "--picture", str(tmp_path / "picture.png"))
    assert main(["readme", *options]) == 0
    return page.read_text()


def test_the_readme_is_what_the_files_say(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    assert run(tmp_path, (ROOT / "README.md").read_text()) == (ROOT / "README.md").read_text()


def test_a_readme_without_markers_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", page)
    text = page.read_text().replace(readme.STEPS_END, "")
    page.write_text(text)
    with pytest.raises(SystemExit):
        main(["readme", "--readme", str(page)])
    assert f"lacks the marker {readme.STEPS_END}" in capsys.readouterr().err
    assert page.read_text() == text
