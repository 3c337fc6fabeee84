"""The example packages of docs/extending.md, installed as pip would do it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from difrl.runtime.paths import PACKAGE
from difrl.runtime.registry import Registry


def install(module: str, registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the code under `# MODULE.py` and the entry points of the registry's group, for the time of a test."""
    page = (PACKAGE.parent / "docs/extending.md").read_text()
    code = re.search(rf"    # {module}\.py\n(?:(?:    .*)?\n)+", page)
    points = re.search(
        rf'    \[project\.entry-points\."{re.escape(registry.group)}"\]\n((?:    \w+ = "{module}:.*"\n)+)', page
    )
    assert code is not None
    assert points is not None
    (info := folder / f"{module}-1.0.dist-info").mkdir(parents=True)
    (folder / f"{module}.py").write_text(dedent(code.group()))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.group}]\n" + dedent(points[1]).replace('"', ""))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
