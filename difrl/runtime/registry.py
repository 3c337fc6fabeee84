"""Extension points: objects by name, registered by a call or found through an entry point of an installed package."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from difrl.runtime.errors import UserError
from difrl.runtime.suggestions import did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind. Entry points are loaded when their name is first looked up."""

    def __init__(self, noun: str, group: str) -> None:
        """`noun` is the word of messages ("objective"), `group` the entry-point group ("difrl.objectives")."""
        self.noun, self.group = noun, group
        self._registered: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Make `item` known as `name`. Raise ValueError if another object has that name."""
        known = self._registered.setdefault(name, item)
        if known is not item:
            raise ValueError(f"two {self.noun} extensions are called '{name}': {known!r} and {item!r}; rename one")
        return item

    def names(self) -> list[str]:
        """Return every known name: first those that were registered, in their order, then those of entry points."""
        return list(dict.fromkeys([*self._registered, *sorted(entry_points(group=self.group).names)]))

    def __getitem__(self, name: str) -> T:
        """Return the object of that name.

        Raise LookupError, with the nearest name, if there is none, and UserError if its package cannot be loaded.
        """
        if name not in self._registered:
            found = entry_points(group=self.group, name=name)
            if not found:
                hint = did_you_mean(name, self.names(), "did you mean '{}'? ")
                raise LookupError(
                    f"there is no {self.noun} '{name}'; {hint}known: {', '.join(self.names())}. Another package can add one "
                    f"through the entry-point group {self.group} (docs/extending.md)"
                )
            for point in found:
                self.register(name, self._load(point))
        return self._registered[name]

    def _load(self, point: EntryPoint) -> T:
        try:
            item: T = point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "an unknown package"
            raise UserError(
                f"the {self.noun} '{point.name}' of {package} cannot be loaded from {point.value}: {error!r}; repair or "
                "uninstall that package"
            ) from error
        return item
