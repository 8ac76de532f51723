"""What `python -m bench gpu` runs: the processes of each phase on a CUDA machine, and toy versions without a GPU."""

import importlib.util
import os
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
_TESTS = ("pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.gpu.failures",
          "--continue-on-collection-errors")  # fmt: skip
_MOST_WORKERS = 12
_SANITIZERS = ("memcheck", "racecheck", "initcheck")
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
        least_s: seconds it may take even where its share of what is left is less.
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
    least_s: float = 0.0


_STATUS = Step(
    ("-c", "from fastlora.native import cpu, cuda; print(cpu.status(), cuda.status(), sep='\\n')"),
    program=sys.executable,
)


def on_gpu(out: Path, arch: int) -> list[Phase]:
    """What runs on a CUDA machine of an architecture such as 90, the most important first.

    What needs no GPU (static, report) and what is long (profile, experts, options) runs only where asked for by name.
    """
    known = [other for other in ARCHITECTURES if other <= arch]
    build = Step(("fastlora.native",), {"FASTLORA_CUDA_ARCHS": str(max(known))})
    tests = Step((*_TESTS, *_in_parallel()), {"TORCHINDUCTOR_COMPILE_THREADS": "1"})  # a pool of them ends minutes late
    measured = ("--out", str(out / "steps.csv"), "--profile", str(out / "step-kernels.csv"), "--limit", SECONDS)
    steps = Step(("bench", "steps", "--device", "cuda", *measured))
    whole = ("--model", "0.6b", "--steps", "10", "--no-exact", "--checkpointing", "full")
    train = Step(("bench", "train", "--device", "cuda", *whole, "--out", str(out / "train.csv")))
    host = Step(("bench", "host", "--device", "cuda", "--rounds", "9", "--calls", "40", "--out", str(out / "host.csv")))
    many = ("--shapes", "4096x4096", "4096x12288", "12288x4096", "--m", "4096", "16384", "--dropout", "0")
    small_m = ("--shapes", "4096x14336", "--m", "1", "16", "64", "256", "--kernels", "nf4_linear", "--dropout", "0")
    tune = Step(("bench", "tune", "--out", str(TABLE), "--budget", SECONDS))
    static = Step(("bench", "static", "--arch", str(max(known)), "--out", str(out / "static.csv")))
    experts = Step(("bench", "experts", "--device", "cuda", "--out", str(out / "experts.csv")))
    options = Step(("bench", "options", "--device", "cuda", "--out", str(out / "options.csv")))
    return [
        Phase("install", 0.3, (Step(("bench.compare.peers", "--install")),)),
        Phase("build", 0.5, (build, _STATUS), least_s=60),
        Phase("checks", 0.5, (Step(("bench.gpu.each_kind",)),), least_s=60),
        Phase("steps", 2.0, (steps,), _no_transformers, least_s=75),
        Phase("train", 1.0, (train,), _no_transformers),
        Phase("tests", 2.5, (tests,), _no_pytest),
        Phase("many", 1.5, (_kernels(out, "cuda", *many, "--no-launches", "--limit", SECONDS),)),
        Phase("tune", 4.0, (tune,), keep=(TABLE,)),
        Phase("tuned", 1.0, (_kernels(out, "cuda", *small_m, "--no-memory", "--limit", SECONDS),)),
        Phase("kernels", 3.0, (_kernels(out, "cuda", "--limit", SECONDS),)),
        Phase("host", 1.0, (host,)),
        Phase("sanitizers", 2.0, tuple(map(_sanitized, _SANITIZERS)), _no_sanitizer),
        Phase("static", 1.5, (static,), optional=True),
        Phase("report", 0.5, _report_steps(out), optional=True),
        Phase("profile", 2.0, (_profile(out),), _no_ncu, optional=True),
        Phase("experts", 1.0, (experts,), optional=True),
        Phase("options", 1.0, (options,), optional=True),
    ]


def rehearsed(out: Path) -> list[Phase]:
    """The same phases without a GPU: the interpreter, one architecture, tiny shapes; nothing is installed."""
    interpreted, compiled = {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}
    rehearsal = ("-p", "bench.gpu.rehearsal", str(ROOT / "tests" / "gpu"), *_in_parallel(spare=0))
    tests = Step((*_TESTS, *rehearsal), interpreted | {"FASTLORA_BACKEND": "triton"})
    steps = Step(("bench", "steps", "--device", "cpu", "--quick", "--models", "qwen3-8b-4", "--tokens", "24", "--limit",
                  SECONDS, "--out", str(out / "steps.csv")))  # fmt: skip
    once = ("--model", "tiny", "--steps", "1", "--length", "16", "--providers", "fastlora", "--no-exact")
    train = Step(("bench", "train", "--device", "cpu", *once, "--out", str(out / "train.csv")))
    few = ("--rounds", "2", "--calls", "2", "--out", str(out / "host.csv"))
    host = Step(("bench", "host", "--device", "cuda", *few), compiled)
    tiny: tuple[str, ...] = ("--shapes", "256x192", "--m", "1", "5", "--r", "4", "--kernels", "nf4_linear")
    tiny += ("--repeats", "2", "--budget", "0.01", "--no-memory")
    tiny += ("--providers", "torch", "fastlora-fp32", "fastlora-bf16")
    tune = Step(("bench", "tune", "--dry-run", "--out", str(out / "choice.csv")), interpreted)
    static = ("bench", "static", "--arch", "90", "--kernel", "lora_x_r16", "--out", str(out / "static.csv"))
    return [
        Phase("install", 0.5, (Step(("bench.compare.peers",)),)),
        Phase("build", 0.5, (_STATUS,)),
        Phase("checks", 0.5, (Step(("bench.gpu.each_kind",), interpreted),)),
        Phase("steps", 1.0, (steps,), _no_transformers),
        Phase("train", 0.5, (train,), _no_transformers),
        Phase("tests", 1.0, (tests,), _no_pytest),
        Phase("many", 1.0, (_kernels(out, "cpu", *tiny),)),
        Phase("tune", 2.0, (tune,)),
        Phase("tuned", 1.0, (_kernels(out, "cpu", *tiny),)),
        Phase("kernels", 1.0, (_kernels(out, "cpu", *tiny),)),
        Phase("host", 1.0, (host,)),
        Phase("sanitizers", 0.5, (Step(("bench.gpu.each_kind",), interpreted),)),
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


def _sanitized(tool: str) -> Step:
    """One linear of each kind under one of compute-sanitizer's tools."""
    fails = "0" if tool == "initcheck" else "1"  # it does not see all of cuBLAS's stores
    options = ("--tool", tool, "--error-exitcode", fails, "--print-limit", "20")
    program = [sys.executable, "-m", "bench.gpu.each_kind"]
    return Step((*options, *program), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, _sanitizer() or "compute-sanitizer")


def _sanitizer() -> str | None:
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(folder))


def _in_parallel(spare: int = 2) -> tuple[str, ...]:
    """As many workers as there are cores, some less: Triton compiles on the CPU what the tests run."""
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - spare))
    return ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()


def _no_pytest() -> str:
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed here"


def _no_transformers() -> str:
    absent = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    return f"not installed here: {', '.join(absent)}" if absent else ""


def _no_sanitizer() -> str:
    return "" if _sanitizer() else "compute-sanitizer is neither on the PATH nor with CUDA"


def _no_ncu() -> str:
    return "" if shutil.which("ncu") else "ncu is not on the PATH"
