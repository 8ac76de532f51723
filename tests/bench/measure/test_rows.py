"""Reading the CSV: the newest row of a case counts."""

import pytest

from bench.measure import rows
from tests.bench.support import point, write_csv


def test_the_newest_row_of_a_case_counts(tmp_path):
    old = write_csv(tmp_path / "old.csv", [point("torch", 2.0), point("torch", 3.0, m=1)])
    new = write_csv(tmp_path / "new.csv", [point("torch", 1.0)], timestamp="2026-02-01T00:00:00Z")
    for paths in ([old, new], [new, old]):
        assert {row.M: row.p50 for row in rows.read(paths)} == {8192: 1.0, 1: 3.0}
    with pytest.raises(ValueError, match=r"line 2: could not convert"):
        rows.read([write_csv(tmp_path / "bad.csv", [point("torch", 1.0, dropout="much")])])
    other = write_csv(tmp_path / "other.csv", [point("torch", 1.0)], device="NVIDIA Other")
    with pytest.raises(ValueError, match="there are NVIDIA Other, NVIDIA Test"):
        rows.measured_on_one_device(rows.read([old, other]), "Nobody's")
