"""The command line of the bench."""

import pytest

from bench.cli import COMMANDS, main
from bench.compare import linear


def test_an_unknown_subcommand_lists_those_there_are(capsys):
    for arguments in ([], ["kernel"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert all(name in shown for name in COMMANDS)


def test_a_subcommand_that_cannot_be_imported_leaves_the_others_alone(capsys, monkeypatch):
    monkeypatch.setattr("bench.cli.COMMANDS", {"kernels": "bench.compare.linear", "absent": "bench.absent"})
    with pytest.raises(SystemExit) as stopped:
        main(["absent"])
    assert stopped.value.code == 2
    assert "absent cannot run here: No module named 'bench.absent'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert linear.SUMMARY.split(":")[0] in shown
    assert "not here" in shown
