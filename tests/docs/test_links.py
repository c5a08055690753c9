"""Links of README, guides and the other pages lead to files that are there, and anchors to headings that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page):
    """Anchors of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken(page):
    """Links of a page that lead nowhere; those to the web are not followed."""
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://") and (not target.exists() or (anchor and anchor not in anchors(target))):
            found.append(link)
    return found


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "anytime.md", "method.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_the_search_finds_broken_links(tmp_path):
    page = tmp_path / "page.md"
    text = (
        "# One `x`: two\n[a](#one-x-two) [b](page.md#one-x-two) [c](https://x.y) [d](#two) [e](none.md) ![f](none.png)"
    )
    page.write_text(text)
    assert broken(page) == ["#two", "none.md", "none.png"]
