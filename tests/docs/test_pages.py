"""Pages tell the truth about the repository: files they name exist, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_architecture import ALLOWED

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:megatron_omega|tests|docs|examples|tools|ds_configs|benchmarks)/[\w./-]+\.\w+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCED.sub("", page.read_text()))
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


def missing_files(page: Path) -> list[str]:
    return [name for name in NAMED.findall(page.read_text()) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_leads_nowhere_wrong(page: Path) -> None:
    assert dead_links(page) == []
    assert missing_files(page) == []


def test_a_dead_link_and_a_missing_file_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[here](#a-page) [there](#nowhere) [away](gone.md) `megatron_omega/gone.py`\n")
    assert dead_links(page) == ["#nowhere", "gone.md"]
    assert missing_files(page) == ["megatron_omega/gone.py"]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target: page.name for page in PAGES for target in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert len(named) > 8 and named.keys() <= targets, {name: named[name] for name in named.keys() - targets}


def test_ten_common_changes_name_their_files() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = [line for line in text.partition("## Where to change what")[2].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    assert all(NAMED.search(row) for row in rows)


def test_every_page_is_on_the_index() -> None:
    listed = set(LINK.findall((ROOT / "docs/index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} == listed


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == listed


def test_the_picture_of_the_house_has_every_room() -> None:
    (picture,) = re.findall(r"megatron_omega/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    drawn = set(re.findall(r"(\w+)(?:/|\.py)", picture))
    assert drawn == set(ALLOWED)
