"""Adapters of models that FSDP2 has spread over two gloo processes: saved, loaded and compiled as in one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from tests.support.models import llama

pytest.importorskip("peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)
processes = pytest.importorskip("tests.support.processes")
sharded = pytest.importorskip("tests.support.processes_sharded")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(directory with saved adapters, what two processes have found)."""
    directory = tmp_path_factory.mktemp("sharded")
    return directory, processes.run_two("tests.support.processes_sharded", directory / "results.pt")


@pytest.mark.parametrize("name", sharded.MODELS)
def test_the_files_are_those_of_one_process(results, name, tmp_path):
    directory, found = results
    fastlora.save_adapter(sharded.MODELS[name](), tmp_path)
    mine, single = (load_file(path / "adapter_model.safetensors") for path in (directory / name, tmp_path))
    assert mine.keys() == single.keys()
    assert all(torch.equal(mine[key], single[key]) for key in single)
    mine, single = (json.loads((path / "adapter_config.json").read_text()) for path in (directory / name, tmp_path))
    if "peft" in name:  # from a set, whose order differs between processes
        mine["target_modules"], single["target_modules"] = (sorted(each["target_modules"]) for each in (mine, single))
    assert mine == single
    assert sorted(path.name for path in (directory / name).iterdir()) == sorted(
        path.name for path in tmp_path.iterdir()
    )
    assert found["there", name, 0]


@pytest.mark.parametrize("units", [True, False], ids=["a unit for each layer", "one unit"])
@pytest.mark.parametrize("name", ["own", "nf4", "tokens", "experts"])
def test_loaded_into_a_sharded_model(results, name, units):
    before, after = results[1]["loaded"][name, units]
    expected = sharded.logits(sharded.MODELS[name]())
    torch.testing.assert_close(after, expected)
    assert (before - expected).norm() > 0.01 * expected.norm()


def test_what_cannot_be_done_to_a_sharded_model_says_so(results):
    bare, theirs, replaced, *merged, gathered = results[1]["refused"]
    assert bare == gathered == "the model is sharded, and without adapters: call load_adapter before fully_shard"
    assert theirs == "the model is sharded, and with peft's adapters: call load_adapter before fully_shard"
    assert "its weight is a DTensor, not a plain tensor" in replaced
    for text in merged:
        assert text.startswith("the model is sharded: save_adapter(model, directory), then load_adapter into the model")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_over_fsdp2(results, backend):
    """Both processes see the same batch, so the loss and the gradients are those of one process."""
    expected, found = sharded.step(sharded.own()), results[1]["compiled", backend]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("how", sharded.SPREAD)
@pytest.mark.parametrize("kind", sharded.HEADS)
def test_a_loss_that_is_sped_up(results, kind, how):
    model, found = sharded.HEADS[kind](), dict(results[1]["sped up", kind, how])
    (reason,) = found.pop("reason")
    assert ("FSDP gathers its head by itself" in reason) == (how == "head")
    torch.testing.assert_close(found.pop("logits"), sharded.logits(model))
    expected = sharded.step(model)
    torch.testing.assert_close(found.pop("evaluated"), expected["loss"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("name", ["own", "nf4", "tokens"])
def test_the_weights_that_others_read_are_whole(results, name):
    expected, found = sharded.weights(sharded.MODELS[name]()), results[1]["weights", name]
    assert found.keys() == expected.keys()
    assert sum("lora_" in key or key.endswith("trained_rows") for key in found) >= 12
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_eva_sees_the_data_of_all_processes(results):
    """Half of each batch in each process: ranks and vectors are those from whole batches in one process."""
    model = fastlora.replace_linear(sharded.spread(llama()), eva_dataloader=sharded.batches(), **sharded.EVA)
    expected, found = sharded.step(model), results[1]["eva"]
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: name + m)
