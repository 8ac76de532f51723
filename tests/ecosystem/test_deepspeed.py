"""DeepSpeed ZeRO-2 and ZeRO-3 on two CPU processes: the numbers of one process.

ZeRO-3 gathers parameters by hooks on every module. A sped-up layer of peft's would read its base, A and B without
calling them, so it steps back to peft's forward, which calls them. fastlora's own layers cause the gathering when they
read their parameters. DeepSpeed compiles its communication at first use, which takes a minute.
"""

import importlib.util

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install deepspeed", allow_module_level=True)
processes = pytest.importorskip("tests.support.processes")
CALLS = 6 * processes.STEPS
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case gave in two processes."""
    out = tmp_path_factory.mktemp("deepspeed") / "results.pt"
    return processes.run_two("tests.support.processes_deepspeed", out, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize(
    ("name", "make", "calls"),
    [
        ("zero 2", processes.plain_peft, (CALLS, 0, set())),
        ("zero 3", processes.plain_peft, (0, CALLS, {"the base layer has hooks or a forward of its own"})),
        ("zero 2, own nf4", processes.own_nf4, (0, 0, set())),
        ("zero 3, own nf4", processes.own_nf4, (0, 0, set())),
        ("zero 3, own", processes.own, (0, 0, set())),
    ],
)
def test_zero_trains_as_one_process_does(results, name, make, calls):
    found, expected = results[name], processes.train(make())
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)
    assert found["trained"].keys() == expected["trained"].keys()
    for key, value in found["trained"].items():
        torch.testing.assert_close(value, expected["trained"][key], rtol=1e-5, atol=1e-6)
    assert found["losses"][0] != found["losses"][-1]
    assert found["calls"] == calls
