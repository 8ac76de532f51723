"""Whether a provider computes the right thing: the tests' tolerance rule, before anything is timed.

The oracle is `fastlora.reference` in fp64 on the same rounded inputs and the same NF4 codes; the baseline is the same
function in bf16 with the provider's adapter dtype. The rule itself has one home, `tests/numerics.py`.
"""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.providers import SCALING, LoraLayer, Operands, Provider
from fastlora import reference

MAX_CHECK_WORK = 1 << 35  # M·K·N of the largest product worth computing in fp64
OUTPUTS = ("y", "dx", "d_lora_a", "d_lora_b")


def _load_rule() -> ModuleType:
    path = Path(__file__).parents[1] / "tests" / "numerics.py"
    spec = importlib.util.spec_from_file_location("bench_tolerance_rule", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"the tolerance rule is read from {path}, which cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_rule = _load_rule()


class Judge:
    """Oracle and baselines for one problem and M, computed once for all providers.

    Args:
        operands: of a problem without dropout (masks differ between packages, so p = 0 is what can be compared).
        x: [M, K]. dy: [M, N]. Only so many rows are judged as `MAX_CHECK_WORK` allows.
    """

    def __init__(self, operands: Operands, x: Tensor, dy: Tensor) -> None:
        p = operands.problem
        rows = max(16, min(x.shape[0], MAX_CHECK_WORK // (p.K * p.N)))
        self.operands = operands
        self.x, self.dy = x[:rows].detach(), dy[:rows]
        self._oracle = self._reference(operands.exact_weight, torch.float64, torch.float64)
        self._baselines: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def judge(self, provider: Provider, layer: LoraLayer) -> tuple[float, str]:
        """The worst error in units of the error allowed, and what is wrong ("" where nothing is).

        A provider that raises is wrong by an infinite amount.
        """
        assert provider.adapter_dtype is not None
        x = self.x.clone().requires_grad_(layer.grad)
        try:
            ours = layer.both(x, self.dy) if "both" in provider.modes else (layer.forward(x),)
        except Exception as error:  # whatever a package under test does wrong is a finding, not our failure
            return math.inf, f"{type(error).__name__}: {error}"
        worst, wrong = 0.0, []
        baselines = self._baseline(provider.adapter_dtype)
        for what, tensor, baseline, oracle in zip(OUTPUTS, ours, baselines, self._oracle, strict=False):
            worst = max(worst, share_of_limit(tensor, baseline, oracle))
            try:
                _rule.assert_as_accurate(tensor, baseline, oracle, what)
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
        return worst, "; ".join(wrong)

    def _baseline(self, adapter_dtype: torch.dtype) -> tuple[Tensor, ...]:
        if adapter_dtype not in self._baselines:
            weight = self.operands.dense[0]
            self._baselines[adapter_dtype] = self._reference(weight, weight.dtype, adapter_dtype)
        return self._baselines[adapter_dtype]

    def _reference(self, weight: Tensor, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = self.x.to(dtype, copy=True).requires_grad_()
        a, b = (t.to(adapter_dtype, copy=True).requires_grad_() for t in (self.operands.lora_a, self.operands.lora_b))
        y = reference.lora_linear(x, weight, a, b, SCALING)
        return y.detach(), *torch.autograd.grad(y, (x, a, b), self.dy.to(dtype))


def share_of_limit(ours: Tensor, baseline: Tensor, oracle: Tensor) -> float:
    """Error over the error that the rule allows, rms or largest, whichever is nearer its limit; above 1 is wrong."""
    if ours.shape != oracle.shape or not torch.isfinite(ours).all():
        return math.inf
    error, allowed = ours.double() - oracle, baseline.double() - oracle
    rms_limit = _rule.RMS_FACTOR * _rule.rms(allowed) + _rule.FLOOR * _rule.rms(oracle)
    max_limit = _rule.MAX_FACTOR * _rule.largest(allowed) + _rule.FLOOR * _rule.largest(oracle)
    return max(_rule.rms(error) / rms_limit, _rule.largest(error) / max_limit)
