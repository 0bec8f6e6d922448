"""The report of a run that was trained, as Chromium shows it."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.config import Config
from hybridlm.report.page import write_report
from hybridlm.train.loop import train
from tests.report.document import chart_of, line_of, parse

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on PATH")


@pytest.fixture(scope="module")
def run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps, and its report."""
    directory = tmp_path_factory.mktemp("report") / "run"
    config = replace(tiny_config, eval=replace(tiny_config.eval, sample_prompts=("a",), sample_tokens=8))
    assert train(config, directory) == 0
    write_report([directory], directory / "report.html")
    return directory


def test_a_trained_run_has_every_part(run: Path) -> None:
    document = parse((run / "report.html").read_text())
    titles = [heading.text for heading in document.all("h2")]
    parts = ["What was trained", "Loss", "Evaluations", "Samples", "Optimisation", "Speed", "Where the time went"]
    assert [title for title in titles if title in parts] == parts
    assert "Other metrics" not in titles
    loss = line_of(chart_of(document, "Loss"), "training")
    (line,) = loss.all("polyline")
    assert len(line.attributes["points"].split()) == 12
    rows = document.one("figure", "shares").one("table").rows()
    assert {row[0] for row in rows[1:]} == {"embedding", "GeGLU", "Attention", "RGLRU", "norm"}


def chromium(page: Path, work: Path, *options: str) -> str:
    """What headless Chromium prints of a page."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
        f"--user-data-dir={work / 'profile'}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def measured(run: Path, work: Path, script: str, *options: str) -> str:
    """What `script` finds in a frame of 390 pixels, the width of a phone, that shows the report."""
    frame = work / "frame.html"
    frame.write_text(
        f'<iframe src="{(run / "report.html").as_uri()}" style="width:390px;height:800px;border:0"></iframe>'
        "<script>const frame = document.querySelector('iframe'); frame.onload = () => {"
        "const page = frame.contentDocument, view = frame.contentWindow;"
        f"document.title = 'found ' + ({script});}};</script>"
    )
    found = re.search("<title>found (.*?)</title>", chromium(frame, work, "--dump-dom", *options))
    assert found is not None
    return found[1]


@needs_chromium
def test_nothing_is_wider_than_a_phone(run: Path, tmp_path: Path) -> None:
    widths = measured(run, tmp_path, "view.innerWidth + ' ' + page.documentElement.scrollWidth")
    view, content = map(int, widths.split())
    assert view == 390 and content <= view


@needs_chromium
@pytest.mark.parametrize(("scheme", "paper"), [(1, "rgb(255, 255, 255)"), (0, "rgb(18, 21, 26)")])
def test_the_page_is_as_light_as_the_reader_has_it(run: Path, tmp_path: Path, scheme: int, paper: str) -> None:
    script = "view.getComputedStyle(page.body).backgroundColor"
    assert measured(run, tmp_path, script, f"--blink-settings=preferredColorScheme={scheme}") == paper


@needs_chromium
def test_the_pointer_reads_values(run: Path, tmp_path: Path) -> None:
    script = (
        "(() => { const figure = page.querySelector('figure.chart'), svg = figure.querySelector('svg');"
        "const box = svg.getBoundingClientRect();"
        "const clientX = box.left + box.width * 46 / 480;"
        "svg.dispatchEvent(new view.PointerEvent('pointermove', {clientX}));"
        "return figure.querySelector('.at').textContent + ' ' + figure.querySelector('.value').textContent; })()"
    )
    first = parse((run / "report.html").read_text()).one("figure", "chart").one("table").rows()[1]
    name, step, value = measured(run, tmp_path, script).split()
    assert (name, step) == ("step", "1") and float(value) == pytest.approx(float(first[1]), rel=1e-2)


@needs_chromium
def test_a_screenshot_can_be_taken(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    chromium(run / "report.html", tmp_path, f"--screenshot={picture}", "--window-size=1200,1600")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
