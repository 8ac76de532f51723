"""Goals: met, missed or not measured; and which of our rows is compared with which peer."""

from bench.measure.record import Point
from bench.report import cases, goals
from tests.bench.support import a_run, point


def test_each_peer_is_compared_with_its_like():
    names = ["fastlora-fp32", "fastlora-bf16", "fastlora-bf16-graph"]
    assert cases.match("peft-fp32", names) == "fastlora-fp32"
    assert cases.match("peft-bf16", names) == "fastlora-bf16"
    assert cases.match("unsloth", names) == "fastlora-bf16"
    assert cases.match("peft-eval-graph", names) == "fastlora-bf16-graph"
    for name in ("torch", "torch-graph", "fastlora-fp32"):
        assert cases.match(name, names) is None
    assert cases.match("peft-fp32", ["fastlora-bf16"]) is None


def verdict_of(points: list[Point], beginning: str, device: str = "NVIDIA Test") -> str:
    """The one verdict on a goal whose text begins so."""
    (found,) = [line for line in goals.verdict(points, device) if line.split(": ", 1)[1].startswith(beginning)]
    return found


def test_goals_are_met_missed_or_not_measured():
    run = a_run()
    bare = "forward+backward over two bare products, 4096x4096, M=8192, p=0:"
    assert verdict_of(run, bare).startswith("missed")  # fp32: 0.80 / 0.70
    assert "fp32 1.14, bf16 1.10" in verdict_of(run, bare)
    better = [p for p in run if p.provider != "fastlora-fp32"]
    assert verdict_of(better, bare).startswith("met")
    assert verdict_of(run, "decode over its floor").endswith("(bf16 1.43)")
    assert verdict_of(run, "times as fast as peft + bitsandbytes").startswith("missed")  # eager: 1.00
    assert "replayed 3.00, eager 1.00" in verdict_of(run, "times as fast as peft + bitsandbytes")
    assert verdict_of(run, "times as fast as unsloth").startswith("not measured")
    assert verdict_of(run, "never less accurate").startswith("met")
    assert verdict_of([point("fastlora-fp32", 1.2, metric="error")], "never less accurate").startswith("missed")
    expanding = [
        point("fastlora-bf16", 0.036, "forward", 0, kernel="nf4_dequantize", R=0, N=14336),
        point("torch", 0.044, "forward", 256, N=14336),
        point("fastlora-bf16", 0.05, "forward", 256, N=14336),
    ]
    assert verdict_of(expanding, "times as fast as expanding").startswith("met")
    assert all(line.startswith("not measured") for line in goals.verdict([], "AMD EPYC (2 threads)"))
    assert len(goals.verdict([], "AMD EPYC (2 threads)")) == len(goals.CPU_GOALS)


def test_goals_for_every_case_name_those_that_miss_or_the_worst():
    slow = [
        point("peft-fp32", 10, m=1024),
        point("fastlora-fp32", 9, m=1024),
        point("peft-bf16", 10, m=1024),
        point("fastlora-bf16", 20, m=1024),
    ]
    assert verdict_of(slow, "peft's time over ours, every case").startswith("missed")
    assert "nf4_linear 4096x4096 M=1024 r=16 both, bf16 adapters 0.50" in verdict_of(slow, "peft's time over ours, e")
    assert verdict_of(slow, "peft's time over ours, nf4_linear").startswith("missed")
    assert verdict_of(slow, "peft's time over ours, bf16_linear").startswith("not measured")
    assert verdict_of(slow, "MB of peak memory").startswith("not measured")
    assert verdict_of(slow, "error over").startswith("not measured")
    many = [*slow, *(point(name, 1, m=m) for m in (1, 16) for name in ("peft-fp32", "fastlora-fp32"))]
    assert "(1 of 4: 0.50 nf4_linear" in verdict_of(many, "peft's time over ours, every case")
    assert verdict_of(many[4:] + slow[:2], "peft's time over ours, every case").startswith("met")
    assert "worst of 4: 1.00" in verdict_of(
        [*many[4:], *slow[:2], point("peft-bf16", 3), point("fastlora-bf16", 2)], "peft's time over ours, every case"
    )

    fast = [
        point("peft-fp32", 13, m=1024),
        point("fastlora-fp32", 10, m=1024),
        point("peft-fp32", 50, metric="peak_memory"),
    ]
    met = [*fast, point("fastlora-fp32", 50.1, metric="peak_memory")]
    assert "both, fp32 adapters 1.30" in verdict_of(met, "peft's time over ours, nf4_linear")
    assert verdict_of(met, "MB of peak memory").startswith("met")
    above = verdict_of([*fast, point("fastlora-fp32", 60, metric="peak_memory")], "MB of peak memory")
    assert above.startswith("missed")
    assert "60.0 MB against 50.0" in above
