"""Pictures and page: drawn only from the CSV, predicted rows kept apart, nothing asked of the network."""

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
from bench.measure.record import PREDICTED
from tests.bench.support import a_run, point, write_csv

pytest.importorskip("matplotlib")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


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
    write_csv(folder / "kernels.csv", a_run())
    write_csv(folder / "predicted.csv", predicted, device="NVIDIA Elsewhere")
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
        pytest.skip("no headless browser here (chromium, chrome or playwright): only a parser checks the page")
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
    path = write_csv(tmp_path / "kernels.csv", a_run())
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
    path = write_csv(tmp_path / "kernels.csv", points)
    with pytest.raises(SystemExit):
        main(["plot", str(path), "--out", str(tmp_path / "plots")])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_report_refuses_a_file_that_mixes(tmp_path, capsys):
    path = write_csv(tmp_path / "kernels.csv", [point("torch", 0.5), point(PREDICTED + "torch", 0.5)])
    with pytest.raises(SystemExit):
        main(["report", str(path)])
    assert "mixes predicted rows with measured ones" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "none.csv")])
    assert "does not exist" in capsys.readouterr().err
