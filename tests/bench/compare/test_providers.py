"""The providers: what each needs, shares and computes."""

import os
import sys

import pytest
import torch

from bench.compare import packages, providers
from bench.compare.accuracy import Judge
from bench.compare.providers import find_providers
from bench.measure.operands import Problem, draw_inputs, make_operands
from tests.bench.support import CPU


def test_nf4_providers_share_one_set_of_codes():
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    operands = make_operands(Problem("nf4_linear", 64, 96, 4, CPU), packed_copies=2)
    peft, ours = (find_providers([name])[0].build(operands) for name in ("peft-fp32", "fastlora-fp32"))
    for packed, theirs, mine in zip(operands.packed, peft, ours, strict=True):
        assert theirs.call.base_layer.weight.data_ptr() == packed.codes.data_ptr()
        assert mine.call.base_layer.codes.data_ptr() == packed.codes.data_ptr()
    assert operands.packed[0].codes.data_ptr() != operands.packed[1].codes.data_ptr()


def test_backward_alone_and_both_give_the_same_gradients():
    operands = make_operands(Problem("nf4_linear", 128, 96, 8, CPU))
    x, dy = torch.randn(16, 128, dtype=torch.bfloat16, requires_grad=True), torch.randn(16, 96, dtype=torch.bfloat16)
    for name in ("torch", "fastlora-bf16", "fastlora-fp32"):
        layer = find_providers([name])[0].build(operands)[0]
        inputs = x if layer.grad else x.detach()
        y, *gradients = layer.both(inputs, dy)
        alone = layer.backward(layer.forward(inputs), inputs, dy)
        assert torch.equal(layer.decode(inputs), y)
        assert len(alone) == len(gradients) == (1 if name == "torch" else 3)
        for one, other in zip(alone, gradients, strict=True):
            assert torch.equal(one, other)


def test_peers_that_need_cuda_say_so_and_import_nothing(monkeypatch):
    monkeypatch.setattr(packages, "_unsloth", lambda: pytest.fail("imported without a CUDA device"))
    problem = Problem("nf4_linear", 128, 96, 4, torch.device("cpu"))
    for name, fits in (("unsloth", packages._unsloth_fits), ("lorafusion", find_providers(["lorafusion"])[0].fits)):
        assert fits(problem) == f"{name} needs a CUDA device"


def test_a_package_is_imported_without_its_own_init_and_leaves_no_trace_where_it_fails(tmp_path, monkeypatch):
    package = tmp_path / "unsloth"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this would patch transformers')\n")
    (package / "kernels" / "__init__.py").write_text(
        "import os\nos.environ['LEFT_BEHIND'] = '1'\nimport no_such_module\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    packages._unsloth.cache_clear()
    try:
        kernels_module, reason = packages._unsloth()
    finally:
        packages._unsloth.cache_clear()
    assert kernels_module is None
    assert reason == "unsloth cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"
    assert "unsloth" not in sys.modules
    assert "LEFT_BEHIND" not in os.environ


@pytest.mark.parametrize("kernel", ["bf16_linear", "nf4_linear", "nf4_dequantize"])
def test_what_is_compiled_is_right(kernel):
    """The functions handed to torch.compile, run uncompiled: compiling them for a CPU takes minutes."""
    (provider,) = find_providers(["compile"])
    operands = make_operands(Problem(kernel, 64, 48, 4, torch.device("cpu")))
    layer = provider.build(operands)[0]
    with torch.compiler.set_stance("force_eager"):
        judge = Judge(operands, *draw_inputs(operands.problem, 0 if kernel == "nf4_dequantize" else 32, grad=True))
        assert judge.judge(provider, layer)[1] == ""
        if kernel != "nf4_dequantize":
            x = torch.ones(64, 64, dtype=torch.bfloat16)
            layers = provider.build(operands.with_dropout(0.5))
            assert not torch.equal(layers[0].decode(x), layers[0].decode(x))


def test_every_provider_is_known_by_one_name():
    names = [provider.name for provider in providers.PROVIDERS]
    assert len(names) == len(set(names))
    assert not any(name.endswith("-graph") or name.startswith("predicted-") for name in names)
