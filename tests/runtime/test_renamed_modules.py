"""Import paths of release 0.1 lead to the same classes, with a warning that gives the new path."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("difrl.worlds.enumerable", "difrl.tasks.exact.enumerable", "TableReward"),
        ("difrl.worlds.gaussian", "difrl.tasks.exact.gaussian", "LinearReward"),
    ],
)
def test_an_old_path_leads_to_the_new_class(old: str, new: str, name: str) -> None:
    """A process of its own, because an import warns once."""
    source = f"from {old} import {name} as old; from {new} import {name} as new; assert old is new"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"FutureWarning: {old} is now {new}" in done.stderr


def test_other_modules_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__("difrl.worlds.nothing")
