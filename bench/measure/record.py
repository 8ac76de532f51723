"""The benchmark CSV: one row a measured point, appended to, never overwritten.

    metric        unit       p50 holds
    time          ms         median of the calls, with p20 and p80. On a CUDA device the modes forward, backward and
                             both time the kernels only, their launches hidden; in `decode` each call starts on an
                             idle device, so that launches and Python count
    peak_memory   MB         most memory held during one call, above what was held before it (1 MB = 1e6 bytes)
    error         limit      worst error of the result and the gradients, in units of the error allowed; above 1 is
                             wrong, and such a provider has no other row
    launches      launches   kernels, copies and fills that one call puts on a CUDA device
    host          us         CPU time of one call by the calling thread's clock, at a size with next to no arithmetic;
                             in mode `step`, wall time until a whole step is queued
    tokens_per_s  tokens/s   tokens of a whole training step
    loss_fall     nats       how far a loss fell in the steps that the mode names

A provider called NAME-graph is NAME's decode calls replayed from a CUDA graph: only the kernels, in order. One called
predicted-NAME or counted-NAME was computed, not measured, and is kept in a file of its own. The latter's peak_memory is
all that is held, weights included.

`share_of_floor` is the floor's time over this row's; `bench.measure.floors` says what the floor is. Rows of
`nf4_dequantize` have M = 0, and R = 0 where nothing is merged. Rows of kernel `copy` and `matmul` hold the machine's
own speed: a copy of M x K values (bytes moved: 4 M K) and a bf16 product (FLOP: 2 M N K).
"""

import csv
import io
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

HEADER = (
    "kernel,provider,mode,metric,unit,M,K,N,R,dtype,dropout,p50,p20,p80,share_of_floor,"
    "device,torch,triton,commit,timestamp"
)
COLUMNS = HEADER.split(",")
UNITS = {
    "time": "ms",
    "peak_memory": "MB",
    "error": "limit",
    "launches": "launches",
    "host": "us",
    "tokens_per_s": "tokens/s",
    "loss_fall": "nats",
}
GRAPH = "-graph"
ROOT = Path(__file__).parents[2]  # of the checkout
RESULTS = ROOT / "bench" / "results"
PREDICTED, COUNTED = "predicted-", "counted-"


@dataclass(frozen=True)
class Point:
    """What was measured; the Recorder adds where and with what."""

    kernel: str
    provider: str
    mode: str
    metric: str
    M: int
    K: int
    N: int
    R: int
    p50: float
    p20: float | None = None
    p80: float | None = None
    share_of_floor: float | None = None
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def case(self) -> str:
        """What was measured, for a line of output."""
        return f"{self.kernel} {self.K}x{self.N} M={self.M} r={self.R} p={self.dropout:g} {self.mode}"

    @property
    def unit(self) -> str:
        """The unit of p50, p20 and p80."""
        return UNITS[self.metric]


class Recorder:
    """Appends points to a CSV file, each group as it is measured, so that an interrupted run keeps what it has.

    Args:
        path: the file. A new one gets the header; one with the same header is appended to.
        device: name of the machine measured.
    Raises:
        ValueError: the file exists and is not a benchmark CSV, or ends in the middle of a row. It is not changed.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self._facts = {
            "device": device,
            "torch": torch.__version__,
            "triton": triton_version(),
            "commit": commit(),
        }
        if path.exists() and path.stat().st_size:
            text = path.read_text()
            if text.splitlines()[0] != HEADER:
                raise ValueError(f"{path} exists and its first line is not this benchmark's header: name another file")
            if not text.endswith("\n"):
                raise ValueError(
                    f"{path} ends in the middle of a row: complete or remove that row, or name another file"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(HEADER + "\n")

    def write(self, points: Iterable[Point]) -> None:
        """Append the points in one write."""
        with self.path.open("a") as file:
            file.write(lines(points, self._facts | {"timestamp": timestamp()}))


def lines(points: Iterable[Point], facts: dict[str, str]) -> str:
    """The points as lines of the CSV; `facts` fills the columns that a point does not have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    for point in points:
        row = asdict(point) | {"unit": point.unit} | facts
        writer.writerow({name: _cell(row[name]) for name in COLUMNS})
    return text.getvalue()


def timestamp() -> str:
    """Now, as the CSV has it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def commit() -> str:
    """Short hash of the source measured, with `-dirty` where files differ from it; `unknown` outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
