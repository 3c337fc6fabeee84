"""difrl/core is tensors only: it imports the standard library, torch and itself. Nothing else."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from difrl.runtime.paths import PACKAGE

CORE = PACKAGE / "core"


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of the modules that `source` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def allowed(module: str) -> bool:
    if module == "difrl.core" or module.startswith("difrl.core."):
        return True
    top = module.split(".")[0]
    return top == "torch" or top in sys.stdlib_module_names


def package_of(path: Path) -> str:
    return ".".join(["difrl", *path.relative_to(PACKAGE).parent.parts])


def test_core_imports_torch_and_the_standard_library_only() -> None:
    files = sorted(CORE.rglob("*.py"))
    assert files, f"no Python files in {CORE}"
    for path in files:
        for module in imports(path.read_text(encoding="utf-8"), package_of(path)):
            assert allowed(module), f"{path.relative_to(PACKAGE.parent)} imports {module}"


def test_the_check_sees_every_way_to_import() -> None:
    source = "import numpy\nfrom ..config import Run\nfrom . import reduce\nif 1:\n from difrl import data\n"
    found = list(imports(source, "difrl.core"))
    assert found == ["numpy", "difrl.config", "difrl.core", "difrl"]
    assert [allowed(module) for module in found] == [False, False, True, False]


def at_import(source: str) -> Iterator[str]:
    """Absolute names of the modules that are imported as soon as `source` is: at its top level, not in a block there."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.unparse(node), "samplers")


def test_importing_samplers_costs_no_more_than_torch() -> None:
    """transformers takes seconds; it is imported by the calls that need it."""
    files = sorted((PACKAGE.parent / "samplers").glob("*.py"))
    assert files, "no Python files in samplers"
    for path in files:
        for module in at_import(path.read_text(encoding="utf-8")):
            top = module.split(".")[0]
            assert top in {"torch", "samplers"} or top in sys.stdlib_module_names, f"{path.name} imports {module}"
    assert list(at_import("import a\nif 1:\n import b\ndef f():\n import c")) == ["a"]
