"""What `python -m bench gpu` runs: the processes of each phase on a CUDA machine, and toy versions without a GPU."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.machine_code.specimen import ARCHITECTURES
from bench.measure.record import ROOT

TABLE = ROOT / "kernels" / "choice.csv"
_COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
_TESTS = ("pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_MARGIN_S = 12.0  # a process that has its own limit may take so much longer
SECONDS = "{seconds}"  # replaced in a command line by the time it has


@dataclass(frozen=True)
class Step:
    """One process: the words after `python -m`, or after `program` where given; `env` adds to the environment."""

    words: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    program: str = ""

    def command(self, seconds: float) -> list[str]:
        """The command line of a process that may take so many seconds."""
        own_limit = f"{max(1.0, seconds - _MARGIN_S):.0f}"
        words = [own_limit if word == SECONDS else word for word in self.words]
        return [self.program, *words] if self.program else [sys.executable, "-m", *words]


@dataclass(frozen=True)
class Phase:
    """Processes run one after the other.

    Args:
        share: how much of the time it may take, relative to the other phases.
        skip: says why it cannot run; "" where it can.
        keep: files copied to the results when it ends, even if it fails.
        optional: runs only where asked for by name.
    """

    name: str
    share: float
    steps: tuple[Step, ...]
    skip: Callable[[], str] = lambda: ""
    keep: tuple[Path, ...] = ()
    optional: bool = False


_STATUS = Step(
    ("-c", "from fastlora.native import cpu, cuda; print(cpu.status(), cuda.status(), sep='\\n')"),
    program=sys.executable,
)


def on_gpu(out: Path, arch: int) -> list[Phase]:
    """What runs on a CUDA machine of an architecture such as 90, the most important first."""
    known = [other for other in ARCHITECTURES if other <= arch]
    tests = Step((*_TESTS, *_in_parallel()))
    small_m = ("--shapes", "4096x14336", "--m", "1", "16", "64", "256", "--kernels", "nf4_linear", "--dropout", "0")
    tune = Step(("bench", "tune", "--out", str(TABLE), "--budget", SECONDS))
    static = Step(("bench", "static", "--arch", str(max(known)), "--out", str(out / "static.csv")))
    experts = Step(("bench", "experts", "--device", "cuda", "--out", str(out / "experts.csv")))
    options = Step(("bench", "options", "--device", "cuda", "--out", str(out / "options.csv")))
    return [
        Phase("install", 0.5, (Step(("bench.compare.peers", "--install")),)),
        Phase("build", 1.5, (Step(("fastlora.native",), {"FASTLORA_CUDA_ARCHS": str(max(known))}), _STATUS)),
        Phase("tests", 3.0, (tests,), _no_pytest),
        Phase("kernels", 3.0, (_kernels(out, "cuda", "--limit", SECONDS),)),
        Phase("tune", 2.0, (tune,), keep=(TABLE,)),
        Phase("tuned", 1.0, (_kernels(out, "cuda", *small_m, "--no-memory", "--limit", SECONDS),)),
        Phase("static", 1.5, (static,)),
        Phase("report", 0.5, _report_steps(out)),
        Phase("profile", 2.0, (_profile(out),), _no_ncu, optional=True),
        Phase("experts", 1.0, (experts,), optional=True),
        Phase("options", 1.0, (options,), optional=True),
    ]


def rehearsed(out: Path) -> list[Phase]:
    """The same phases without a GPU: the interpreter, one architecture, tiny shapes; nothing is installed."""
    interpreted, compiled = {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}
    tests = Step((*_TESTS, str(ROOT / "tests" / "gpu")), interpreted)
    tiny: tuple[str, ...] = ("--shapes", "256x192", "--m", "1", "5", "--r", "4", "--kernels", "nf4_linear")
    tiny += ("--repeats", "2", "--budget", "0.01", "--no-memory")
    tiny += ("--providers", "torch", "fastlora-fp32", "fastlora-bf16")
    tune = Step(("bench", "tune", "--dry-run", "--out", str(out / "choice.csv")), interpreted)
    static = ("bench", "static", "--arch", "90", "--kernel", "lora_x_r16", "--out", str(out / "static.csv"))
    return [
        Phase("install", 0.5, (Step(("bench.compare.peers",)),)),
        Phase("build", 0.5, (_STATUS,)),
        Phase("tests", 1.0, (tests,), _no_pytest),
        Phase("kernels", 1.0, (_kernels(out, "cpu", *tiny),)),
        Phase("tune", 2.0, (tune,)),
        Phase("tuned", 1.0, (_kernels(out, "cpu", *tiny),)),
        Phase("static", 1.0, (Step(static, compiled),)),
        Phase("report", 1.0, _report_steps(out)),
    ]


def _kernels(out: Path, device: str, *options: str) -> Step:
    return Step(("bench", "kernels", "--device", device, "--out", str(out / "kernels.csv"), *options))


def _report_steps(out: Path) -> tuple[Step, ...]:
    kernels = str(out / "kernels.csv")
    return (
        Step(("bench", "plot", "--csv", kernels, "--out", str(out / "plots"))),
        Step(("bench", "report", "--csv", kernels, "--out", str(out / "report.html"))),
    )


def _profile(out: Path) -> Step:
    """ncu over fastlora only, few tokens and many; the clocks are left as they are."""
    log = ("--csv", "--log-file", str(out / "profile.csv"))
    counters = ("--clock-control", "none", *log, "--metrics", ",".join(_COUNTERS))
    only = ("--kernel-name", "regex:nf4|lora|decode|fused", "--launch-count", "40")
    shape = ("--shapes", "4096x14336", "--m", "1", "256", "8192", "--kernels", "nf4_linear", "--dropout", "0")
    once = ("--providers", "fastlora-bf16", "--repeats", "1", "--budget", "0", "--no-memory", "--no-launches")
    bench = ("bench", "kernels", "--device", "cuda", "--out", str(out / "profiled.csv"), *shape, *once)
    return Step((*counters, *only, sys.executable, "-m", *bench), program="ncu")


def _in_parallel() -> tuple[str, ...]:
    return ("-n", "4") if importlib.util.find_spec("xdist") else ()


def _no_pytest() -> str:
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed here"


def _no_ncu() -> str:
    return "" if shutil.which("ncu") else "ncu is not on the PATH"
