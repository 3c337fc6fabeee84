"""The documentation is consistent: links and paths lead somewhere, tables are whole, recipes can be read."""

from __future__ import annotations

import ast
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


SOURCES = [
    path for name in ("difrl", "samplers", "rewards", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")
]
ELSEWHERE = {"difrl/configs", "evaluate_images.py"}
"""A folder of the wheel, and a file of GenEval's repository."""


def mentioned_paths(text: str) -> set[str]:
    """Return the paths that begin with a folder of the repository, and the names of Python files, but no placeholders."""
    paths = re.findall(r"(?<![\w/.:-])(?:difrl|tests|benchmarks|configs|samplers|rewards|docs)/[\w/.-]*", text)
    names = re.findall(r"(?<![\w/.-])\w+\.py\b", text)
    found = {path.rstrip("./-") for path in [*paths, *names]} - ELSEWHERE
    return {path for path in found if not re.search(r"[A-Z]{3}|^my_", path)}


def prose_of(source: str) -> str:
    """Return docstrings, strings that document a field, and comments."""
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return "\n".join([*strings, *re.findall(r"# .*", source)])


def assert_paths_exist(text: str, folder: Path) -> None:
    """A path begins at the top of the repository or at `folder`, where .md may be left out. A name alone is that of a module."""
    names = {path.name for path in SOURCES}
    missing = {
        path
        for path in mentioned_paths(text)
        if path not in names
        and not any(place.exists() for place in (ROOT / path, folder / path, folder / f"{path}.md"))
    }
    assert not missing


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml", *sorted((ROOT / "configs").rglob("*.yaml"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_paths_on_pages_exist(page: Path) -> None:
    assert_paths_exist(text_of(page), page.parent)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.relative_to(ROOT).as_posix())
def test_paths_in_docstrings_exist(source: Path) -> None:
    assert_paths_exist(prose_of(text_of(source)), source.parent)


def test_mentioned_paths_are_found() -> None:
    text = "see difrl/core/base.py, (docs/a.md), `tests/b`, c.py; not my_rewards.py, https://x.org/docs/d or configs/NAME.yaml"
    assert mentioned_paths(text) == {"difrl/core/base.py", "docs/a.md", "tests/b", "c.py"}
    assert prose_of('"""M"""\nx = "no"  # C\ny = 1\n"""F"""') == "M\nF\n# C"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, by GitHub's rule."""
    headings = [line.lstrip("#").strip().lower() for line in text_of(page).splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def tables(text: str) -> Iterator[list[str]]:
    """Yield the tables of a page: adjacent lines that begin with a bar."""
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
    """Each has a line of dashes, without which it is not rendered, and equally many cells in every row."""
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
