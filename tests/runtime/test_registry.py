"""Extension points: a name gives the object that a call or an installed package registered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from difrl.runtime.errors import UserError
from difrl.runtime.registry import Registry


@pytest.fixture
def shapes() -> Registry[object]:
    return Registry[object]("shape", "difrl.test_shapes")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with an entry point, as pip would install it."""
    (tmp_path / "their_shapes.py").write_text("round = object()\n")
    info = tmp_path / "their_shapes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-shapes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[difrl.test_shapes]\nround = their_shapes:round\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_shapes", raising=False)


def test_what_was_registered_is_found(shapes: Registry[object]) -> None:
    square = object()
    assert shapes.register("square", square) is square
    assert shapes["square"] is square
    assert shapes.register("square", square) is square, "the same object twice is not a conflict"


def test_a_name_is_taken_once(shapes: Registry[object]) -> None:
    shapes.register("square", object())
    with pytest.raises(ValueError, match="two shape extensions are called 'square'"):
        shapes.register("square", object())


@pytest.mark.usefixtures("installed")
def test_an_installed_package_adds_one(shapes: Registry[object]) -> None:
    assert shapes.names() == ["round"]
    found = shapes["round"]
    assert found is sys.modules["their_shapes"].round
    assert shapes["round"] is found


def test_an_unknown_name_brings_the_nearest(shapes: Registry[object]) -> None:
    shapes.register("square", object())
    with pytest.raises(
        LookupError, match=r"no shape 'sqare'; did you mean 'square'\? known: square\. .* difrl\.test_shapes"
    ):
        shapes["sqare"]


@pytest.mark.usefixtures("installed")
def test_a_package_that_cannot_be_loaded_is_named(shapes: Registry[object], tmp_path: Path) -> None:
    (tmp_path / "their_shapes.py").write_text("import a_module_that_is_missing\n")
    with pytest.raises(
        UserError, match=r"the shape 'round' of their-shapes cannot be loaded from their_shapes:round: .*missing"
    ):
        shapes["round"]
