"""What several tests of training share."""

import tempfile
from pathlib import Path

import pytest

from tests.support.runs import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with data, which no test changes."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def rescues(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run that cannot write saves its adapter: the system's folder for temporary files."""
    folder = tmp_path_factory.mktemp("system")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
