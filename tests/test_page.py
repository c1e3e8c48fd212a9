"""The page of --report: what it says, that it is well-formed, and that it fits screens of three widths."""

import html as markup
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import Result
from runs import beginner

from marlin_convert.plot import Point, curves

Cli = Callable[..., Result]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Elements(HTMLParser):
    """The texts inside of every kind of element; ValueError where tags do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def pages(tinypy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Those of a conversion and of its verification."""

    directory = tmp_path_factory.mktemp("pages")
    made, verified = directory / "made.html", directory / "verified.html"
    sizes = ("--samples", 4, "--sequence-length", 128, "-q")
    with beginner(tmp_path_factory.mktemp("said")) as begin:
        for words in (
            ("quantize", tinypy, "-o", directory / "out", "--report", made, *sizes),
            ("verify", directory / "out", "--source", tinypy, "--report", verified, *sizes),
        ):
            done = begin(*words, directory=directory, environment=dict(os.environ))
            assert done.returncode == 0, done.stderr
    return made, verified


def test_the_page_of_a_conversion(pages):
    page = pages[0].read_text()
    found = Elements(page)
    assert found.texts["h1"] == ["tinypy-4m in marlin, 4 bits, group size 128"]
    assert "Not verified yet" in found.texts["h2"]
    assert any(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", said) for said in found.texts["dd"])
    assert any("MB before" in said for said in found.texts["dd"])
    assert "model.layers.3.mlp.down_proj" in page and page.count("<circle") == 4 + 28
    # nothing is loaded from anywhere
    assert not re.search(r"https?://|src=|@import|url\(", page)


def test_the_page_of_a_verification_is_of_both(pages):
    page = pages[1].read_text()
    found = Elements(page)
    assert "Verified" in found.texts["h2"]
    paragraph = next(said for said in found.texts["p"] if "perplexity" in said)
    assert re.search(r"On 4 x 128 tokens .* means of 508 tokens", paragraph)
    assert page.count("<circle") == 2 * 4 + 28 and "text not seen" in page


def test_a_page_needs_a_conversion(cli, tinypy, tmp_path):
    done = cli("verify", tinypy, "--checks", "files", "--report", tmp_path / "page.html")
    assert done.exit_code == 1 and "no manifest" in done.stderr and not list(tmp_path.iterdir())
    assert "checking" not in done.stderr and not done.stdout


def test_names_of_lines_do_not_lie_on_one_another():
    lines = {f"line {n}": [Point(0, 1.0, "a"), Point(1, 0.001 * n, "<b>")] for n in range(12)}
    svg = curves(lines, "an axis")
    heights = sorted(float(y) for y in re.findall(r"<text x=742.0 y=([\d.]+) text-anchor=start", svg))
    assert len(heights) == 12
    assert min(b - a for a, b in pairwise(heights)) >= 15.9
    assert heights[-1] <= 340 and "&lt;b&gt;" in svg and "<b>" not in svg


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_screen(width, pages, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    # a window cannot be as narrow as a telephone: the page is in a frame, and says there what it measures
    said = (
        "document.querySelectorAll('th button')[3].click();parent.document.title=JSON.stringify({"
        "inner:innerWidth,whole:document.documentElement.scrollWidth,"
        "errors:[...document.querySelectorAll('td:nth-child(4)')].map(e=>+e.textContent)})"
    )
    inside = markup.escape(f"{pages[1].read_text()}<script>{said}</script>")
    page = tmp_path / "page.html"
    page.write_text(
        f'<title></title><iframe width={width} height=900 frameborder=0 srcdoc="{inside}"></iframe>'
    )
    words = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
    done = subprocess.run([browser, *words, page.as_uri()], capture_output=True, text=True, timeout=120)
    if done.returncode or "<title>" not in done.stdout:
        pytest.skip(f"{browser} does not start here: {done.stderr[-200:]}")
    found = re.search(r"<title>(.*)</title>", done.stdout)
    assert found
    measured = json.loads(found[1])
    assert width - 20 <= measured["inner"] <= width and measured["whole"] <= measured["inner"]
    assert len(measured["errors"]) == 28 and measured["errors"] == sorted(measured["errors"])
