"""Whether a provider computes the right thing: the tests' tolerance rule, before anything is timed.

The oracle is `fastlora.reference` in fp64 on the same rounded inputs and the same NF4 codes; the baseline is the same
function in bf16 with the provider's adapter dtype. For an expanded weight the baseline is the exact weight rounded
once, which is what bitsandbytes gives. The rule itself is in `tests/support/numerics.py` and only there.
"""

import importlib.util
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare.layers import LoraLayer, Provider
from bench.measure.operands import DECODE_MAX_M, DEQUANTIZE, SCALING, Operands, error_line
from bench.measure.record import ROOT
from fastlora import reference

MAX_CHECK_WORK = 1 << 35  # M·K·N of the largest product worth computing in fp64 on a CPU
_FULL_RATE_FP64 = ((8, 0), (9, 0), (10, 0))
OUTPUTS = ("y", "dx", "d_lora_a", "d_lora_b")


def _load_rule() -> ModuleType:
    path = ROOT / "tests" / "support" / "numerics.py"
    spec = importlib.util.spec_from_file_location("bench_tolerance_rule", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"the tolerance rule is read from {path}, which cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_rule = _load_rule()


def max_check_work(device: torch.device) -> int:
    """M·K·N of the largest product worth computing in fp64 on a device: M = 8192 over 8192 x 28672 on an H200.

    Which kernel runs depends on M, so as many rows are judged as are timed where that does not take too long.
    """
    if device.type != "cuda":
        return MAX_CHECK_WORK
    return 1 << (41 if torch.cuda.get_device_capability(device) in _FULL_RATE_FP64 else 38)


class Judge:
    """Oracle and baselines for one problem and M, computed once for all providers.

    Args:
        operands: of a problem without dropout (masks differ between packages, so p = 0 is what can be compared).
        x: [M, K]. dy: [M, N]. As many rows are judged as `max_check_work` allows; none with `nf4_dequantize`.
    """

    def __init__(self, operands: Operands, x: Tensor, dy: Tensor) -> None:
        p = operands.problem
        rows = max(16, min(x.shape[0], max_check_work(p.device) // (p.K * p.N)))
        self.operands = operands
        self.x, self.dy = x[:rows].detach(), dy[:rows]
        self._oracle: tuple[Tensor, ...] = ()
        self._baselines: dict[torch.dtype | None, tuple[Tensor, ...]] = {}

    def judge(self, provider: Provider, layer: LoraLayer) -> tuple[float, str]:
        """The worst error in units of the error allowed, and what is wrong ("" where nothing is).

        A provider that raises is wrong by an infinite amount.
        """
        expected = self._expected(provider)
        try:
            results = self._results(provider, layer)
        except Exception as error:  # an error of a package under test is a result, not a failure of the bench
            return math.inf, error_line(error)
        worst, wrong = 0.0, []
        for ours, (what, baseline, oracle) in zip(results, expected, strict=True):
            worst = max(worst, share_of_limit(ours, baseline, oracle))
            try:
                _rule.assert_as_accurate(ours, baseline, oracle, what)
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0])
        return worst, "; ".join(wrong)

    def _expected(self, provider: Provider) -> list[tuple[str, Tensor, Tensor]]:
        """(name, baseline, oracle) of everything that the provider computes."""
        if self.operands.problem.kernel == DEQUANTIZE:
            oracle = self._expanded()
            return [("weight", oracle.to(self.operands.problem.dtype), oracle)]
        if provider.adapter_dtype is None:
            baseline = F.linear(self.x, self.operands.dense[0])
            return [("x W^T", baseline, F.linear(self.x.double(), self.operands.exact_weight))]
        if not self._oracle:
            self._oracle = self._reference(self.operands.exact_weight, torch.float64, torch.float64)
        everything = list(zip(OUTPUTS, self._baseline(provider.adapter_dtype), self._oracle, strict=True))
        expected = everything if "both" in provider.modes else everything[:1]
        return [*expected, ("decoded y", *everything[0][1:])] if self._decodes(provider) else expected

    def _results(self, provider: Provider, layer: LoraLayer) -> list[Tensor]:
        """The provider's own, in the same order."""
        if self.operands.problem.kernel == DEQUANTIZE:
            return [layer.forward(self.x)]
        if provider.adapter_dtype is None:
            return [layer.decode(self.x)]
        x = self.x.clone().requires_grad_(layer.grad)
        ours = layer.both(x, self.dy) if "both" in provider.modes else (layer.forward(x),)
        return [*ours, layer.decode(self.x)] if self._decodes(provider) else list(ours)

    def _decodes(self, provider: Provider) -> bool:
        return "decode" in provider.modes and self.x.shape[0] <= DECODE_MAX_M

    def _expanded(self) -> Tensor:
        """W, or W + scaling · B A, in fp64."""
        o = self.operands
        return o.exact_weight.addmm_(o.lora_b.double(), o.lora_a.double(), alpha=SCALING)

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
    """Error over the error that the rule allows: rms or largest, whichever is nearer its limit; above 1 is wrong."""
    if ours.shape != oracle.shape or not torch.isfinite(ours).all():
        return math.inf
    error, allowed = ours.double() - oracle, baseline.double() - oracle
    rms_limit = _rule.RMS_FACTOR * _rule.rms(allowed) + _rule.FLOOR * _rule.rms(oracle)
    max_limit = _rule.MAX_FACTOR * _rule.largest(allowed) + _rule.FLOOR * _rule.largest(oracle)
    return max(_rule.rms(error) / rms_limit, _rule.largest(error) / max_limit)
