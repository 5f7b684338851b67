"""The documentation builds as a site, asks nobody for anything, and knows every answer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc="(https?:)?//""")
    links = re.compile(
        r"""<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*href="(https?:)?//"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text()
        assert not loads.search(text), page
        assert not links.search(text), page


def test_every_question_is_in_the_reference(site: Path) -> None:
    questions = yaml.safe_load((ROOT / "copier.yml").read_text())
    page = (site / "answers/index.html").read_text()
    asked = [n for n, q in questions.items() if isinstance(q, dict) and "help" in q and n[0] != "_"]
    assert len(asked) > 15
    for name in asked:
        assert f"<code>{name}</code>" in page, name


def test_every_picture_has_words_and_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for words, path in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            assert words, page
            assert (ROOT / "docs" / path).is_file(), (page, path)
