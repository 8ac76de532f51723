"""What several tests of training share."""

from pathlib import Path

import pytest

from tests.support.runs import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with data, which no test changes."""
    return make_base(tmp_path_factory.mktemp("base"))
