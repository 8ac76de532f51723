"""Every C entry with random operands, under AddressSanitizer and UndefinedBehaviorSanitizer: tests/support/fuzz.cpp.

FASTLORA_FUZZ_CASES says how many cases; `make nightly` runs 10,000. A failure prints the number of its case, which
`fuzz NUMBER 1` repeats.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastlora.native import build
from tests.support.emulation import compile_sources

FUZZ = Path(__file__).parents[1] / "support" / "fuzz.cpp"
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
FLAGS = f"-std=c++17 -O1 -g1 -ffp-contract=off -D_GLIBCXX_ASSERTIONS {SANITIZERS}"
# Fresh memory is NaN, so that what is read before it is written shows in a result.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "malloc_fill_byte=255:max_malloc_fill_size=1073741824"}

pytestmark = pytest.mark.slow


def link(folder: Path) -> subprocess.CompletedProcess[str]:
    objects = map(str, sorted(folder.glob("*.o")))
    command = [*build.find_compiler(), *SANITIZERS.split(), *objects, "-o", str(folder / "fuzz"), "-pthread", "-ldl"]
    return subprocess.run(command, capture_output=True, text=True)


def run(folder: Path, cases: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(folder / "fuzz"), "1", str(cases)], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = tmp_path_factory.mktemp("probe")
    (probe / "empty.cpp").write_text("int main() {}")
    compile_sources(probe, probe, [probe / "empty.cpp"], FLAGS)
    if (linked := link(probe)).returncode != 0:
        pytest.skip(f"the compiler has no sanitizers: {linked.stderr[-200:]}")
    folder, csrc = tmp_path_factory.mktemp("sanitized"), build.source_dir()
    compile_sources(folder, csrc, [*csrc.glob("cpu/*.cpp"), *csrc.glob("cuda/*.cu"), FUZZ], FLAGS)
    linked = link(folder)
    assert linked.returncode == 0, linked.stderr[-3000:]
    return folder


def test_random_calls_read_and_write_only_what_is_theirs(objects: Path) -> None:
    cases = int(os.environ.get("FASTLORA_FUZZ_CASES", 300))
    done = run(objects, cases)
    assert done.returncode == 0, done.stderr[done.stderr.rindex("case ") :]
    assert done.stdout == f"{cases} cases\n"


def test_no_entry_is_left_out() -> None:
    """Each function of the two headers that takes operands is called."""
    called = set(re.findall(r"\w+", FUZZ.read_text()))
    for header in ("fastlora_cpu.h", "fastlora_cuda.h"):
        declared = re.findall(r"FASTLORA_EXPORT [^(]*?(\w+)\(([^)]*)\);", (build.source_dir() / header).read_text())
        entries = {name for name, parameters in declared if "*" in parameters}
        assert entries
        assert entries <= called


MUTATIONS = {
    "NaN becomes an index": (
        "std::max(-1.0f, std::min(1.0f, (absmax[b] - offset) * inverse))",
        "std::clamp((absmax[b] - offset) * inverse, -1.0f, 1.0f)",
        "outside the range of representable values",
    ),
    "a read beyond a row": ("std::min<int64_t>(kPanel, cols - index * kPanel)", "kPanel", "heap-buffer-overflow"),
    "memory that nobody wrote": (
        "std::fill(out + r * stride + cols,",
        "std::fill(out + (r + 1) * stride,",
        "not finite",
    ),
    "rows left out": ("ceil_div(weight->rows, kMergeRows)", "weight->rows / kMergeRows", "not written"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_fuzzer_can_fail(objects: Path, name: str, tmp_path: Path) -> None:
    right, wrong, message = MUTATIONS[name]
    shutil.copytree(build.source_dir(), tmp_path / "csrc")
    source = tmp_path / "csrc" / "cpu" / "api.cpp"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    for unchanged in objects.glob("*.o"):
        shutil.copy(unchanged, tmp_path)
    compile_sources(tmp_path, tmp_path / "csrc", [source], FLAGS)
    assert link(tmp_path).returncode == 0
    done = run(tmp_path, 300)
    assert done.returncode != 0
    assert message in done.stderr
