"""What this machine can do: versions, devices, the code that runs on each and why, and what would help."""

import importlib.metadata
import platform
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastlora
from fastlora import distribution
from fastlora.kernels import choice
from fastlora.native import cpu
from fastlora.ops.backend import backend, compiled_decode

# Distribution -> what it is needed for, and the extra of fastlora-kernels that installs it.
PACKAGES = {
    "torch": "everything",
    "triton": "kernels on NVIDIA GPUs",
    "transformers": "fastlora train (fastlora-kernels[train])",
    "accelerate": "fastlora train (fastlora-kernels[train])",
    "datasets": "dataset_name in a recipe (fastlora-kernels[train])",
    "peft": "LoraConfig, and models that peft has wrapped (fastlora-kernels[train])",
    "bitsandbytes": "models already in bitsandbytes' 4 bits (fastlora-kernels[bnb])",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, whether that is the best there is, and advice."""

    what: str
    found: str
    good: bool = True
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order shown."""

    versions: list[Finding] = field(default_factory=list)
    devices: list[Finding] = field(default_factory=list)
    backends: list[Finding] = field(default_factory=list)

    @property
    def advice(self) -> list[str]:
        """What would help, each thing once."""
        every = [*self.versions, *self.devices, *self.backends]
        return list(dict.fromkeys(finding.advice for finding in every if finding.advice))


def diagnose() -> Diagnosis:
    """Look at this machine. Changes nothing, and raises nothing for a missing device or package."""
    return Diagnosis(_versions(), _devices(), _backends())


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis as three tables and a list of what to do."""
    for title in ("versions", "devices", "backends"):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for finding in getattr(diagnosis, title):
            mark = "[green]✓[/]" if finding.good else "[yellow]–[/]"
            table.add_row(mark, Text(finding.what), Text(finding.found))  # as they are: brackets are no markup
        console.print(table)
        console.print()
    if diagnosis.advice:
        console.print("[bold]what would help[/]")
        for line in diagnosis.advice:
            console.print(f"  • {line}", highlight=False, markup=False)
    else:
        console.print("nothing to do: every backend that this machine can have is live")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None; it is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    findings = [Finding("python", platform.python_version()), *_ourselves()]
    for package, purpose in PACKAGES.items():
        version = version_of(package)
        advice = "" if version else f"pip install {package}: needed for {purpose}"
        findings.append(Finding(package, version or f"not installed; for {purpose}", version is not None, advice))
    return findings


def _ourselves() -> list[Finding]:
    """This distribution, and others that have its import name."""
    installed = version_of(distribution.NAME)
    folder = Path(fastlora.__file__).parent
    ours = Finding(
        distribution.NAME, f"{installed or f'{fastlora.__version__}, not installed'}, imported from {folder}"
    )
    owners = {*importlib.metadata.packages_distributions().get(distribution.IMPORT, ())}
    others = sorted(name for name in owners if name and name != distribution.NAME)
    rivals = [f"{name} {version_of(name)}" for name in others] or distribution.rivals()
    advice = [distribution.advice(rival) for rival in rivals]
    return [ours, *(Finding("import name", text, False, text) for text in advice)]


def _devices() -> list[Finding]:
    cores = torch.get_num_threads()
    isa = torch.backends.cpu.get_cpu_capability()
    findings = [Finding("cpu", f"{platform.machine()}, {isa}, torch uses {cores} threads")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        findings.append(Finding(f"cuda:{index}", found))
    if torch.cuda.is_available():
        return findings
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        advice = "this machine has a GPU driver, but torch is a CPU build: install the CUDA build from pytorch.org"
        return [*findings, Finding("cuda", "no: torch is a CPU build", False, advice)]
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
    return [*findings, Finding("cuda", f"no NVIDIA GPU is visible ({built})", False)]


def _backends() -> list[Finding]:
    findings = []
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        findings.append(_backend_of(device))
    loaded, reason = cpu.status()
    findings.append(Finding("C++ library", reason, loaded, "" if loaded else reason))
    if version_of("triton") is None:
        advice = "pip install triton" if platform.system() == "Linux" else ""
        findings.append(Finding("Triton", "not installed", False, advice))
    elif not torch.cuda.is_available():
        findings.append(Finding("Triton", "idle: its kernels need an NVIDIA GPU", False))
    else:
        findings.append(Finding("Triton", f"live, version {version_of('triton')}"))
    return [*findings, *_cuda_kernels()]


def _cuda_kernels() -> list[Finding]:
    """The compiled decode kernel, and the rows of the table of choices that apply to each GPU."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not devices:
        return [Finding("compiled decode", "idle: it needs an NVIDIA GPU", False)]
    live, reason = compiled_decode(devices[0])
    findings = [Finding("compiled decode", f"live: {reason}" if live else reason, live, "" if live else reason)]
    for device in devices:
        measured, rows = choice.describe(device)
        findings.append(Finding(f"choice of kernels, {device}", rows, measured, "" if measured else rows))
    return findings


def _backend_of(device: str) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the slow path, which is told below
            name, reason = backend(torch.device(device))
    except ValueError as error:  # FASTLORA_BACKEND names what cannot run here
        return Finding(device, str(error), False, str(error))
    return Finding(
        device, f"{name}: {reason}", name != "torch", reason.removeprefix("slow path: ") if name == "torch" else ""
    )
