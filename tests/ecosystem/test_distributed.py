"""DDP and FSDP2 by accelerate, two processes over gloo: models train as with plain peft in one process.

Under FSDP2 a layer's parameters are DTensors until the unit that holds them is called, and plain tensors while it runs.
A layer must read them then, step back where they are not gathered, and keep nothing from one step to the next.
The oracle is plain peft in fp64 in one process, the baseline plain peft in the dtypes under test.
"""

import pytest
import torch

import fastlora
from fastlora.layers.lora_linear import LoRALinear
from fastlora.layers.nf4_linear import NF4Linear
from tests.support.models import llama, randomize
from tests.support.numerics import assert_as_accurate

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("bitsandbytes")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)
processes = pytest.importorskip("tests.support.processes")
LAYERS = 6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case gave in two processes."""
    out = tmp_path_factory.mktemp("distributed") / "results.pt"
    return processes.run_two("tests.support.processes", out)


_in_one_process = {}


def in_one_process(name, make):
    """Losses and trained parameters of a model in this process only; made once."""
    if name not in _in_one_process:
        _in_one_process[name] = processes.train(make())
    return _in_one_process[name]


def dequantized_peft():
    """Plain peft in fp64 over the weights that `own_nf4` computes with."""
    model, own = llama().double(), processes.own_nf4()
    for name, module in own.named_modules():
        base = module.base_layer if isinstance(module, LoRALinear) else module
        if isinstance(base, NF4Linear) and not name.endswith("base_layer"):
            model.get_submodule(name).weight.data = base.weight.dequantize(torch.float32).double()
    return randomize(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=32, target_modules=processes.TARGETS)))


def check(found, baseline, oracle):
    assert_as_accurate(found["losses"], baseline["losses"], oracle["losses"], "losses")
    true = {name.removeprefix("base_model.model."): value for name, value in oracle["trained"].items()}
    base = {name.removeprefix("base_model.model."): value for name, value in baseline["trained"].items()}
    ours = {name.removeprefix("base_model.model."): value for name, value in found["trained"].items()}
    assert ours.keys() == true.keys()
    for name, value in ours.items():
        assert_as_accurate(value, base[name], true[name].double(), name)


@pytest.mark.parametrize("name", [name for name, case in processes.CASES.items() if case.mixed_precision == "no"])
def test_two_processes_train_as_plain_peft_in_one(results, name):
    found = results[name]
    assert found["kind"].startswith("FSDP" if name.startswith("fsdp2") else "DistributedDataParallel")
    assert found["losses"][0] != found["losses"][-1]
    if name.endswith("qlora"):
        check(found, in_one_process("qlora", processes.plain_qlora), in_one_process("nf4, oracle", dequantized_peft))
        return
    if name.endswith("own"):
        oracle = in_one_process("own, oracle", lambda: processes.plain_peft(torch.float64, lora_alpha=32))
        check(found, in_one_process("own", processes.own), oracle)
        return
    if name.endswith("own nf4"):
        check(found, in_one_process("own nf4", processes.own_nf4), in_one_process("nf4, oracle", dequantized_peft))
        return
    use_dora = "dora" in name
    baseline = in_one_process(f"peft {use_dora}", lambda: processes.plain_peft(use_dora=use_dora))
    oracle = in_one_process(f"oracle {use_dora}", lambda: processes.plain_peft(torch.float64, use_dora=use_dora))
    check(found, baseline, oracle)


def test_mixed_precision_under_fsdp2(results):
    """A small matrix in bf16 is one sample of the model's rounding, so the rule applies to all adapters together."""
    oracle = in_one_process("oracle False", lambda: processes.plain_peft(torch.float64))
    runs = results["fsdp2, bf16"], results["fsdp2, bf16, plain peft"], oracle
    assert runs[0]["trained"].keys() == runs[1]["trained"].keys() == oracle["trained"].keys()
    assert_as_accurate(*(torch.cat([value.flatten() for value in run["trained"].values()]) for run in runs))
    torch.testing.assert_close(runs[0]["losses"], oracle["losses"], rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_every_call_is_sped_up_while_its_parameters_are_gathered(results):
    for name, found in results.items():
        if "own" in name or "plain peft" in name:
            continue
        calls = processes.STEPS * LAYERS * (2 if "checkpointing" in name else 1)
        if "nn.Linear" in name:
            assert found["calls"] == (0, calls, {"the base layer has hooks or a forward of its own"}), name
        else:
            assert found["calls"] == (calls, 0, set()), name


def test_the_report_of_a_sharded_model(results):
    """Between calls the weights are DTensors; the report goes by what happened when the layers were called."""
    rows = results["fsdp2"]["report"].rows
    assert sum(row.replaced for row in rows) == LAYERS
    assert {row.kind for row in rows if row.replaced} == {"Linear(Linear)"}
    assert f"{LAYERS * processes.STEPS} calls sped up, 0 stepped back" in results["fsdp2"]["report"].summary()
    left = results["fsdp2, a unit for each nn.Linear"]["report"]
    assert not left.replaced
    assert "the base layer has hooks or a forward of its own" in {row.reason for row in left.rows}
    assert sum(row.replaced for row in results["fsdp2, own nf4"]["report"].rows) == 14


def test_a_layer_whose_class_fsdp_has_changed_is_still_known():
    """`fully_shard` gives a unit a class of its own: it stays sped up, and `restore` says what to do."""
    linear = pytest.importorskip("fastlora.peft_layers.linear")

    model = processes.sped_up_peft()
    layer = next(module for module in model.modules() if isinstance(module, linear.SpedUpLinear))
    layer.__class__ = type("FSDPLinear", (type(layer),), {})
    assert linear.standing_reason(layer) == ""
    assert len(fastlora.report(model).replaced) == LAYERS
    with pytest.raises(ValueError, match="call restore before the model is sharded"):
        fastlora.restore(model)


def test_nf4_weights_cannot_be_loaded_by_one_process_for_the_others():
    """accelerate's cpu_ram_efficient_loading moves the model to the meta device and shares parameters, not buffers."""
    with pytest.raises(RuntimeError, match=r"weight is NF4 on the meta device .* set cpu_ram_efficient_loading=False"):
        processes.own_nf4().to("meta").state_dict()
