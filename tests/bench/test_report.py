"""Pictures and page: drawn from the CSV alone, predicted rows kept apart, nothing asked of the network."""

import base64
import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.cli import main
from bench.measure import rows
from bench.measure.record import HEADER, PREDICTED, Point, lines
from bench.report import cases, goals

pytest.importorskip("matplotlib")

FACTS = {
    "device": "NVIDIA Test",
    "torch": "2.11",
    "triton": "3.6",
    "commit": "abc",
    "timestamp": "2026-01-01T00:00:00Z",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def point(provider: str, ms: float, mode: str = "both", m: int = 8192, **facts) -> Point:
    facts = {"kernel": "nf4_linear", "K": 4096, "N": 4096, "R": 16, "share_of_floor": 0.7 / ms} | facts
    metric = facts.pop("metric", "time")
    return Point(provider=provider, mode=mode, metric=metric, M=m, p50=ms, **facts)


def a_run() -> list[Point]:
    """A run in which peft with bf16 adapters is quicker at M = 256, and bitsandbytes is wrong."""
    points = [
        Point("copy", "torch", "forward", "time", 32768, 8192, 0, 0, 0.25, 0.24, 0.26),
        Point("matmul", "torch", "forward", "time", 8192, 8192, 8192, 0, 1.41, 1.40, 1.42),
    ]
    for m, scale in ((8192, 1.0), (256, 0.1)):
        for name, ms in (("torch", 0.70), ("fastlora-fp32", 0.80), ("fastlora-bf16", 0.77), ("peft-fp32", 1.30)):
            points.append(point(name, ms * scale, m=m))
        points.append(point("peft-bf16", 1.05 if m == 8192 else 0.07, m=m))
    for name in ("torch", "fastlora-bf16", "peft-eval"):
        for suffix, ms in (("", 0.06), ("-graph", 0.01 if name.startswith("fast") else 0.03)):
            points.append(point(name + suffix, ms, "decode", 1, N=14336, share_of_floor=0.007 / ms))
    points.append(point("bitsandbytes", 0.02, "forward", 0, kernel="nf4_dequantize", R=0, share_of_floor=0.45))
    points.append(point("fastlora-bf16", 0.01, "forward", 0, kernel="nf4_dequantize", R=0, share_of_floor=0.95))
    points.append(point("fastlora-bf16", 0.91, metric="error", share_of_floor=None))
    points.append(point("bitsandbytes", 7.5, "decode", 1, metric="error", share_of_floor=None))
    points.append(point("fastlora-bf16", 8, metric="launches", share_of_floor=None))
    return points


def write(path: Path, points: list[Point], **facts: str) -> Path:
    path.write_text(HEADER + "\n" + lines(points, FACTS | facts))
    return path


class Page(HTMLParser):
    """What a page refers to, and how many cells its tables have."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                (self.images if tag == "img" else self.references).append(value)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    predicted = [point(PREDICTED + "fastlora", 0.5), point(PREDICTED + "torch", 0.4)]
    write(folder / "kernels.csv", a_run())
    write(folder / "predicted.csv", predicted, device="NVIDIA Elsewhere")
    out = folder / "report.html"
    options = [str(folder / "kernels.csv"), "--predicted", str(folder / "predicted.csv"), "--out", str(out)]
    assert main(["report", *options]) == 0
    return out


def test_the_page_stands_alone(report):
    text = report.read_text()
    page = Page(text)
    assert page.references == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.images) >= 4
    for image in page.images:
        assert image.startswith("data:image/svg+xml;base64,")
        svg = base64.b64decode(image.split(",", 1)[1]).decode()
        assert "<svg" in svg
        assert not re.search(r'(href|src)="(?!#)', svg)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert page.tags.count("table") >= 6
    assert page.tags.count("tr") > 25


def test_the_page_hides_nothing(report):
    text = report.read_text()
    measured, predicted = text.split('<section id="predicted">')
    assert "NVIDIA Test" in measured
    assert "4295.0 GB/s" in measured
    slower = measured.split("Where a peer is faster")[1].split("<h3>")[0]
    assert "1 of 7 comparisons" in slower
    assert "<td>256</td>" in slower
    assert "peft-bf16" in slower
    assert "0.91" in slower
    wrong = measured.split("Wrong, and so not timed")[1].split("<h3>")[0]
    assert "bitsandbytes" in wrong
    assert "7.5" in wrong
    assert '<span class="met">met</span>' in measured
    assert "not measured" in measured
    assert "NVIDIA Elsewhere" in predicted
    assert "predicted fastlora" in predicted
    assert "Elsewhere" not in measured
    assert "<img" not in predicted


def test_a_browser_shows_the_page_whole(report, tmp_path):
    """Tables, decoded pictures and no request, as a headless browser sees them; else the parser's tests stand."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None and importlib.util.find_spec("playwright") is None:
        pytest.skip("no headless browser here (chromium, chrome or playwright): the page is checked by a parser alone")
    probe = (
        "<script>window.addEventListener('load', () => { document.documentElement.dataset.seen = JSON.stringify({"
        "images: [...document.images].map(i => i.complete && i.naturalWidth > 0),"
        "rows: document.querySelectorAll('tbody tr').length,"
        "asked: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),"
        "wide: document.documentElement.scrollWidth - document.documentElement.clientWidth}) })</script>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text().replace("</body>", probe + "</body>"))
    if browser is not None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
        command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    else:
        dom = _by_playwright(probed)
    seen = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert len(seen["images"]) >= 4
    assert all(seen["images"])
    assert seen["rows"] > 25
    assert seen["asked"] == []
    assert seen["wide"] <= 0


def _by_playwright(page: Path) -> str:
    from playwright.sync_api import Error, sync_playwright

    try:
        with sync_playwright() as tools:
            browser = tools.chromium.launch()
            tab = browser.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_function("document.documentElement.dataset.seen !== undefined")
            return tab.content()
    except Error as error:
        pytest.skip(f"playwright has no browser here: {error}")


def test_pictures_come_from_the_csv_alone_and_are_the_same_again(tmp_path, capsys):
    path = write(tmp_path / "kernels.csv", a_run())
    for folder in ("one", "two"):
        assert main(["plot", str(path), "--out", str(tmp_path / folder)]) == 0
    names = {file.name for file in (tmp_path / "one").iterdir()}
    for stem in ("speedup_both", "share_of_floor_both", "share_of_floor_decode", "roofline", "dequantize"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert len(content) > 3000
    assert "speedup_both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([point(PREDICTED + "torch", 0.5)], "predicted rows are not mixed"),
        ([point("torch", 0.5), point(PREDICTED + "torch", 0.5)], "predicted rows are not mixed"),
        ([], "holds no rows"),
        ([point("torch", 0.5, metric="error")], "no times of a linear kernel"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, points, says):
    path = write(tmp_path / "kernels.csv", points)
    with pytest.raises(SystemExit):
        main(["plot", str(path), "--out", str(tmp_path / "plots")])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_report_refuses_a_file_that_mixes(tmp_path, capsys):
    path = write(tmp_path / "kernels.csv", [point("torch", 0.5), point(PREDICTED + "torch", 0.5)])
    with pytest.raises(SystemExit):
        main(["report", str(path)])
    assert "mixes predicted rows with measured ones" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "none.csv")])
    assert "does not exist" in capsys.readouterr().err


def test_the_newest_row_of_a_case_counts(tmp_path):
    old = write(tmp_path / "old.csv", [point("torch", 2.0), point("torch", 3.0, m=1)])
    new = write(tmp_path / "new.csv", [point("torch", 1.0)], timestamp="2026-02-01T00:00:00Z")
    for paths in ([old, new], [new, old]):
        assert {row.M: row.p50 for row in rows.read(paths)} == {8192: 1.0, 1: 3.0}
    with pytest.raises(ValueError, match=r"line 2: could not convert"):
        rows.read([write(tmp_path / "bad.csv", [point("torch", 1.0, dropout="much")])])
    other = write(tmp_path / "other.csv", [point("torch", 1.0)], device="NVIDIA Other")
    with pytest.raises(ValueError, match="there are NVIDIA Other, NVIDIA Test"):
        rows.measured_on_one_device(rows.read([old, other]), "Nobody's")


def test_each_peer_is_compared_with_its_like():
    names = ["fastlora-fp32", "fastlora-bf16", "fastlora-bf16-graph"]
    assert cases.match("peft-fp32", names) == "fastlora-fp32"
    assert cases.match("peft-bf16", names) == "fastlora-bf16"
    assert cases.match("unsloth", names) == "fastlora-bf16"
    assert cases.match("peft-eval-graph", names) == "fastlora-bf16-graph"
    for name in ("torch", "torch-graph", "fastlora-fp32"):
        assert cases.match(name, names) is None
    assert cases.match("peft-fp32", ["fastlora-bf16"]) is None


def verdict_of(points: list[Point], beginning: str) -> str:
    """The one verdict on a goal whose text begins so."""
    (found,) = [line for line in goals.verdict(points, "NVIDIA Test") if line.split(": ", 1)[1].startswith(beginning)]
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
