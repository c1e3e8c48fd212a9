"""The pages of docs/ build without a warning, and what README links to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_pages_build_without_a_warning(tmp_path):
    """Links between pages and to headings are among what Sphinx warns of."""
    command = (
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        ROOT / "docs",
        tmp_path,
    )
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.stem for path in tmp_path.glob("*.html")} >= {
        page.stem for page in (ROOT / "docs").glob("*.md")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_linked_is_there(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_a_newcomer_reads_the_readme_in_three_minutes():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(re.sub(r"(?ms)^```.*?^```|^\|.*?$", "", text).split()) <= 700
