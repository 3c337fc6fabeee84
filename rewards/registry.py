"""Rewards by name. Open to other packages by entry points of the group `difrl.rewards`, and to anybody by import path:
`package.module.name` of a function that scores, of a class of rewards, or of a reward."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

from rewards.base import Reward
from rewards.functions import Function

GROUP = "difrl.rewards"
Factory = Callable[..., Reward]
F = TypeVar("F", bound=Factory)
_ARGUMENTS = ("samples", "prompts", "metadata")


class Entry(NamedTuple):
    """One registered reward, as `available` lists it."""

    name: str
    summary: str  # a sentence
    details: str  # what its docstring says after that
    options: dict[str, str]  # option -> its type and default, as written
    needs: tuple[str, ...]


class _Registered(NamedTuple):
    factory: Factory
    needs: tuple[str, ...]


_REGISTRY: dict[str, _Registered] = {}


def register(name: str, needs: tuple[str, ...] | None = None) -> Callable[[F], F]:
    """Decorator: make a class of rewards, or a function that returns a reward, known by ``name``.

    Its docstring's first line is the description, a sentence, and its arguments are the options. ``needs`` is what the
    reward reads: a class says so itself; for a function it is given here, so that `available` need not build the reward.
    """

    def add(factory: F) -> F:
        known = _REGISTRY.get(name)
        if known is not None and known.factory is not factory:
            raise ValueError(f"two rewards are called '{name}': {known.factory!r} and {factory!r}; rename one")
        read = getattr(factory, "needs", None) if needs is None else needs
        if read is None:
            raise ValueError(
                f"what does the reward '{name}' read? {factory!r} has no needs: register it with needs=(…)"
            )
        _REGISTRY[name] = _Registered(factory, read)
        return factory

    return add


def make(name: str, **options: Any) -> Reward:
    """The reward called ``name``: registered, from an entry point, or imported where ``name`` is a path with dots.

    The path ``package.module.name`` (or ``package.module:name``) may lead to a class, which is built with the options; to
    a function ``(samples, prompts, metadata, **options)``, which is then the reward; or to a reward.
    """
    if "." in name or ":" in name:
        return _imported(name, options)
    factory = _registered(name)
    _check_options(name, factory, options)
    return factory(**options)


def available() -> list[Entry]:
    """Every registered reward, by name, those of entry points included."""
    plugins = {point.name: point.load() for point in entry_points(group=GROUP)}
    entries = [_describe(name, plugin, getattr(plugin, "needs", ())) for name, plugin in plugins.items()]
    entries += [_describe(name, item.factory, item.needs) for name, item in _REGISTRY.items() if name not in plugins]
    return sorted(entries)


def find(name: str) -> Entry:
    """The reward of that name, as `available` lists it, or at that import path; ValueError if there is none."""
    if "." in name or ":" in name:
        return _found(name)
    _registered(name)
    return next(entry for entry in available() if entry.name == name)


def _found(path: str) -> Entry:
    """What an import path leads to; a function says by itself neither its needs nor which arguments are options."""
    target = _target(path)
    if isinstance(target, type):
        return _describe(path, target, getattr(target, "needs", ()))
    if isinstance(target, Reward):
        return _describe(path, type(target), target.needs)._replace(options={})
    return _describe(path, target, (), len(_ARGUMENTS))


def _describe(name: str, factory: Callable[..., Any], needs: tuple[str, ...], arguments: int = 0) -> Entry:
    """An entry; the first so many parameters are no options."""
    parameters = list(inspect.signature(factory).parameters.values())[arguments:]
    summary, _, details = (inspect.getdoc(factory) or "").partition("\n")
    return Entry(name, summary, details.strip(), {p.name: _option(p) for p in parameters}, needs)


def _option(parameter: inspect.Parameter) -> str:
    kind, default = parameter.annotation, parameter.default
    words = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    said = [words] if kind is not inspect.Parameter.empty else []
    return " ".join([*said, f"= {default!r}"] if default is not inspect.Parameter.empty else said)


def _registered(name: str) -> Factory:
    if name in _REGISTRY:
        return _REGISTRY[name].factory
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name in plugins:
        factory: Factory = plugins[name].load()
        return factory
    known = sorted({*_REGISTRY, *plugins})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else "write package.module.name for one of your own."
    raise ValueError(f"there is no reward '{name}'; {hint} Known rewards: {', '.join(known)}")


def _target(path: str) -> Any:
    """The class, the reward or the function that an import path leads to."""
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        target = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import the reward '{path}' (package.module.name): {error}; start from the folder that holds the "
            "module, or install it"
        ) from error
    if not callable(target):
        raise ValueError(
            f"the reward '{path}' is {type(target).__name__}, expected a function (samples, prompts, metadata) or a class"
        )
    return target


def _imported(path: str, options: dict[str, Any]) -> Reward:
    target = _target(path)
    if isinstance(target, type):
        _check_options(path, target, options)
        return target(**options)
    if isinstance(target, Reward):
        if options:
            raise ValueError(f"the reward '{path}' is made already and takes no options, found {', '.join(options)}")
        return target
    _check_options(path, target, options, *_ARGUMENTS)
    return Function(path.replace(":", ".").rpartition(".")[2], target, options)


def _check_options(name: str, factory: Callable[..., Any], options: dict[str, Any], *arguments: str) -> None:
    """Name the misspelt or missing option; leave errors inside the factory as they are."""
    parameters = inspect.signature(factory).parameters
    try:
        inspect.signature(factory).bind(*arguments, **options)
    except TypeError as error:
        known = ", ".join(list(parameters)[len(arguments) :]) or "none"
        called = f"; it is called with ({', '.join(arguments)})" if arguments else ""
        raise ValueError(f"options of the reward '{name}': {error}{called}; it takes: {known}") from error
