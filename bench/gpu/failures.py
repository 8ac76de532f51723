"""A plugin of pytest's: each test that fails is written, with its traceback, to the file FASTLORA_FAILURES at once.

pytest itself shows tracebacks at the end, which a run that is cut short never reaches.
"""

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("FASTLORA_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
