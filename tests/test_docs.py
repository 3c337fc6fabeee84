"""The pages of the documentation hold together: links lead somewhere, tables are whole, recipes can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from textwrap import dedent

import pytest

from difrl.config.load import read_config
from difrl.runtime.paths import PACKAGE
from rewards import available

ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, by GitHub's rule."""
    headings = [line.lstrip("#").strip().lower() for line in text_of(page).splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def tables(text: str) -> Iterator[list[str]]:
    """Lines that begin with a bar, those together that no other line parts."""
    for is_row, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_row:
            yield list(lines)


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in [link for link in links if not link.startswith(("http:", "https:"))]:
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_tables_are_whole(page: Path) -> None:
    """Each has its line of dashes, without which nobody sees a table, and as many cells in every row."""
    for head, *rest in tables(text_of(page)):
        assert rest, head
        assert re.fullmatch(r"[|\s:-]+", rest[0]), head
        assert {cells(row) for row in rest} == {cells(head)}, head


def test_every_reward_has_its_row() -> None:
    rows = [row for table in tables(text_of(ROOT / "docs/rewards.md")) for row in table]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {entry.name for entry in available()} - listed == set()


def test_the_recipe_of_the_readme_can_be_read(tmp_path: Path) -> None:
    found = re.search(r"(?:^    .*\n)+", text_of(ROOT / "README.md").partition("## Your model, your reward")[2], re.M)
    assert found is not None
    (tmp_path / "recipe.yaml").write_text(dedent(found.group()), encoding="utf-8")
    config = read_config(tmp_path / "recipe.yaml")
    assert [reward.label for reward in [*config.rewards, *config.watch]] == ["pickscore", "ocr", "hpsv2"]
