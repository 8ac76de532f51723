"""`bench tune`: what it writes, what it refuses, and that a wrong kernel cannot win."""

import csv

import pytest
import torch

pytest.importorskip("triton")
from fastlora.kernels import choice

from bench.cli import main
from bench.tune import trials, tune
from bench.tune.trials import Trial, Truth, TuneCase

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run needs Triton's interpreter")
LINEAR = TuneCase("linear", 24, 128, 192, 16)


def run(path, *options: str) -> int:
    return main(["tune", "--dry-run", "--out", str(path), *options])


def rows(path) -> list[choice.TableRow]:
    return [row for row in choice.read(path) if row.source == "measured" and row.gpu == "interpreter"]


def test_a_dry_run_measures_every_operation_and_keeps_the_rows_of_other_gpus(tmp_path, capsys):
    path = tmp_path / "choice.csv"
    assert run(path) == 0
    found = {(row.op, row.m) for row in rows(path)}
    products = {(op, m) for op in choice.PRODUCTS for m in (1, 24)}
    assert found == products | {(op, 24) for op in choice.LOW_RANK}
    assert all(row.us and row.us > 0 for row in rows(path))
    assert [row for row in choice.read(path) if row.gpu != "interpreter"] == choice.read()
    shown = capsys.readouterr().out
    assert "7 rows written" in shown
    assert "0 cases left" in shown
    assert "linear 128x192: M* is" in shown


def test_a_second_run_skips_what_is_there_and_again_does_not(tmp_path, capsys):
    path = tmp_path / "choice.csv"
    options = ("--ops", "shrink", "--m", "24")
    for extra, says in (
        ((), "1 cases to measure, 0 in"),
        ((), "0 cases to measure, 1 in"),
        (("--again",), "1 cases to"),
    ):
        assert run(path, *options, *extra) == 0
        assert says in capsys.readouterr().out
        assert len(rows(path)) == 1


def test_no_case_is_begun_after_the_budget(tmp_path, capsys):
    assert run(tmp_path / "choice.csv", "--budget", "-1") == 0
    assert "7 cases left: run again" in capsys.readouterr().out
    assert not (tmp_path / "choice.csv").exists()


def trial(kernel: str, result: torch.Tensor, calls: list[str]) -> Trial:
    def call(serial: int) -> tuple[torch.Tensor, ...]:
        calls.append(kernel)
        return (result,)

    return Trial(kernel, None, call)


@pytest.fixture
def three_kernels(monkeypatch) -> list[str]:
    """One right kernel, one whose result is off by a percent, one that raises; the names of those timed."""
    exact = torch.randn(50, 40, dtype=torch.float64)
    calls: list[str] = []

    def failing(serial: int) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of resource: shared memory")

    found = [
        trial("off", exact.half() * 1.01, calls),
        Trial("failing", None, failing),
        trial("right", exact.half(), calls),
    ]
    truth = Truth(exact.flatten(), exact.half().flatten())
    monkeypatch.setattr(tune, "product_trials", lambda case, operands: (found, truth))
    monkeypatch.setattr(tune, "_TINY", tune._TINY._replace(most_trials=None))
    return calls


def test_a_wrong_or_failing_kernel_is_named_and_cannot_win(tmp_path, three_kernels, capsys):
    assert run(tmp_path / "choice.csv", "--ops", "linear", "--m", "24") == 0
    (row,) = rows(tmp_path / "choice.csv")
    assert row.kernel == "right"
    errors = capsys.readouterr().err
    assert "WRONG, not timed: linear 128x192 r=16 M=24, off" in errors
    assert "failing left out: RuntimeError: out of resource" in errors
    assert three_kernels.count("off") == 2  # called to compile, and to check


def test_a_case_without_a_right_kernel_gives_no_row_and_an_exit_status(tmp_path, monkeypatch, three_kernels, capsys):
    found, truth = tune.product_trials(LINEAR, None)
    monkeypatch.setattr(tune, "product_trials", lambda case, operands: (found[:2], truth))
    assert run(tmp_path / "choice.csv", "--ops", "linear", "--m", "24") == 1
    assert "linear 128x192 r=16 M=24: no kernel is right" in capsys.readouterr().err
    assert not (tmp_path / "choice.csv").exists()


def test_a_decode_kernel_is_a_row_without_dropout(tmp_path, monkeypatch, three_kernels):
    found, truth = tune.product_trials(LINEAR, None)
    decode = Trial("decode", None, found[2].call)
    monkeypatch.setattr(tune, "product_trials", lambda case, operands: ([decode], truth))
    assert run(tmp_path / "choice.csv", "--ops", "linear", "--m", "8") == 0
    (row,) = rows(tmp_path / "choice.csv")
    assert (row.kernel, row.dropout, row.m) == ("decode", False, 8)


@pytest.mark.parametrize("mode", ["narrow", "split"])
@pytest.mark.parametrize("op", choice.LOW_RANK)
def test_the_truth_about_low_rank_kernels(op, mode):
    case = TuneCase(op, 24, 0 if op == "dy" else 128, 128 if op == "dy" else 0, 8, mode)
    found, truth = trials.low_rank_trials(case, torch.device("cpu"), torch.float16)
    assert len(found) == len(set(map(str, found))) > 8
    result = found[1].result()
    assert truth.fault(result) == ""
    assert truth.fault(result * 1.01) != ""


def test_cases_come_in_the_order_of_their_worth():
    cases = tune._FULL.cases(16)
    assert len(cases) == len(set(cases)) == 2 * 8 * 11 + 3 * 2 * 3 * 2
    assert cases[:2] == [TuneCase(op, 1, 4096, 14336, 16) for op in choice.PRODUCTS]
    tokens = [case.m for case in cases if (case.op, case.k, case.n) == ("linear", 4096, 14336)]
    assert tokens == list(tune._FULL.tokens)
    assert cases.index(TuneCase("x", 8192, 4096, 0, 16, "split")) < cases.index(TuneCase("linear", 64, 4096, 14336, 16))


def test_the_crossover_is_the_largest_m_where_dequantizing_was_not_the_fastest():
    def row(m: int, kernel: str) -> choice.TableRow:
        return choice.TableRow("a", "linear", m, 64, 128, 16, None, kernel, None, 1.0, "measured")

    rows = [row(1, "decode"), row(64, "fused"), row(256, "fused"), row(512, "dequantize")]
    assert list(tune.crossovers(rows)) == ["linear 64x128: M* is 256 or more, below 512"]
    assert list(tune.crossovers(rows[:3])) == ["linear 64x128: M* is 256 or more"]
    assert list(tune.crossovers(rows[3:])) == ["linear 64x128: M* is 0 or more, below 512"]


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--m", "0"], "at least 1"), (["--shapes", "4096"], "such as 4096x14336"), (["--r", "0"], "at least 1")],
)
def test_options_that_cannot_be_used_are_named(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit):
        run(tmp_path / "choice.csv", *options)
    assert says in capsys.readouterr().err


def test_no_gpu_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--out", str(tmp_path / "choice.csv")])
    assert "finds no CUDA device here; --dry-run" in capsys.readouterr().err


def test_a_foreign_table_is_refused_and_left_alone(tmp_path, capsys):
    path = tmp_path / "choice.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        run(path)
    assert "first line must be gpu,op" in capsys.readouterr().err
    assert list(csv.reader(path.open())) == [["a", "b"], ["1", "2"]]
