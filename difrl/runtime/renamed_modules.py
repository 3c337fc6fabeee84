"""Import paths of release 0.1, for recipes such as `import: difrl.worlds.enumerable:TableReward`. Removed in release 0.3."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "difrl.worlds": "difrl.tasks",
    "difrl.worlds.enumerable": "difrl.tasks.exact.enumerable",
    "difrl.worlds.gaussian": "difrl.tasks.exact.gaussian",
}
"""Old module -> new module."""


class RenamedModules(MetaPathFinder, Loader):
    """Import hook for the modules of `RENAMED` under their old names, with a warning that gives the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=fullname == "difrl.worlds") if fullname in RENAMED else None

    def exec_module(self, module: ModuleType) -> None:
        new = RENAMED[module.__name__]
        vars(module).update({k: v for k, v in vars(import_module(new)).items() if not k.startswith("__")})
        if module.__name__ != "difrl.worlds":
            problem = f"{module.__name__} is now {new}; difrl 0.3 will not have the old path: change it in your recipe"
            # The line that imports is one of importlib, or of the reward registry: the old name is a better place.
            warnings.warn_explicit(problem, FutureWarning, module.__name__, 1)


def install_renamed_modules() -> None:
    """Install the import hook."""
    if not any(isinstance(finder, RenamedModules) for finder in sys.meta_path):
        sys.meta_path.append(RenamedModules())
