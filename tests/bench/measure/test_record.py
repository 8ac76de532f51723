"""The CSV: its columns, and that what is there is appended to or refused."""

import csv

import pytest

from bench.measure.record import HEADER, Point, Recorder
from tests.bench.support import run_kernels


def test_the_columns_are_those_documented():
    assert HEADER == (
        "kernel,provider,mode,metric,unit,M,K,N,R,dtype,dropout,p50,p20,p80,share_of_floor,device,torch,triton,commit,"
        "timestamp"
    )


def test_an_existing_csv_is_appended_to_and_nothing_else_is_touched(tmp_path):
    path = tmp_path / "deep" / "k.csv"
    point = Point("nf4_linear", "torch", "both", "time", 16, 64, 96, 4, 1.25, 1.0, 2.0, 0.5)
    Recorder(path, "a, machine").write([point])
    first = path.read_text()
    Recorder(path, "a, machine").write([point, point])
    assert path.read_text().startswith(first)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert rows[2]["device"] == "a, machine"
    assert (rows[2]["unit"], rows[2]["p50"], rows[2]["share_of_floor"]) == ("ms", "1.25", "0.5")


@pytest.mark.parametrize(
    ("text", "says"),
    [("kernel,provider\nmine,1\n", "not this benchmark's header"), (HEADER + "\nnf4_lin", "middle of a row")],
)
def test_a_foreign_or_cut_csv_is_refused_and_left_alone(tmp_path, capsys, text, says):
    path = tmp_path / "k.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run_kernels(path)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert path.read_text() == text
