"""Each room of difrl imports only rooms below it, and difrl/core only torch and the standard library."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from difrl.runtime.paths import PACKAGE

CORE = PACKAGE / "core"
MODULES = {
    ".".join(["difrl", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Name of every module of difrl -> its file."""


def read_floors() -> list[list[str]]:
    """Return the rooms from top to bottom, those side by side in one list: the contract of import-linter."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (one for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    return [floor.split(" | ") for floor in contract["layers"]]


FLOOR_OF = {room: number for number, floor in enumerate(reversed(read_floors())) for room in floor}


def imported_modules(name: str) -> set[str]:
    """Return the modules of difrl that a module imports: at once, in functions, and for types alone."""
    path, found = MODULES[name], set()
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name`: the name may be a module.
            found |= {inner if (inner := f"{module}.{alias.name}") in MODULES else module for alias in node.names}
    return {module for module in found if module in MODULES} - {name}


def room_of(name: str) -> str:
    return name.split(".")[1]


def imports(source: str, package: str) -> Iterator[str]:
    """Yield absolute names of the modules that `source` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def test_every_room_is_on_a_floor() -> None:
    """A room is a folder or a file at the top of difrl. There are at most twelve beside the command line."""
    rooms = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.name != "py.typed"}
    assert rooms - {"assets", "configs"} == set(FLOOR_OF) - {"__main__"}
    assert len(rooms - {"cli"}) <= 12


def test_a_room_imports_only_rooms_below_it() -> None:
    upward = [
        f"{MODULES[name].relative_to(PACKAGE.parent)} imports {module}"
        for name in MODULES.keys() - {"difrl"}
        for module in imported_modules(name) - {"difrl"}
        if room_of(module) != room_of(name) and FLOOR_OF[room_of(module)] >= FLOOR_OF[room_of(name)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()  # CycleError has the circle


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
    """Yield absolute names of the modules that are imported together with `source`: at its top level, outside of blocks."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.unparse(node), "samplers")


def test_importing_samplers_costs_no_more_than_torch() -> None:
    """transformers takes seconds to import, so the functions that need it import it."""
    files = sorted((PACKAGE.parent / "samplers").glob("*.py"))
    assert files, "no Python files in samplers"
    for path in files:
        for module in at_import(path.read_text(encoding="utf-8")):
            top = module.split(".")[0]
            assert top in {"torch", "samplers"} or top in sys.stdlib_module_names, f"{path.name} imports {module}"
    assert list(at_import("import a\nif 1:\n import b\ndef f():\n import c")) == ["a"]
