"""Rewards by name.

Other packages add rewards through entry points of the group `difrl.rewards`. Without any registration a reward is found by
its import path: `package.module.name` of a function that scores, of a class of rewards, or of a reward object.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from rewards.user_code import import_object

if TYPE_CHECKING:
    from rewards.base import Reward

GROUP = "difrl.rewards"
Factory = Callable[..., "Reward"]
F = TypeVar("F", bound=Factory)
T = TypeVar("T")
_ARGUMENTS = ("samples", "prompts", "metadata")


class Summary(NamedTuple):
    """One registered reward, as `list_rewards` returns it."""

    name: str
    summary: str
    """First line of its docstring."""
    needs: tuple[str, ...]


class Entry(NamedTuple):
    """One registered reward with its options, as `available` returns it."""

    name: str
    summary: str
    """First line of its docstring."""
    details: str
    """The rest of its docstring."""
    options: dict[str, str]
    """Option -> its type and default, as written in the source."""
    needs: tuple[str, ...]


class _Registered(NamedTuple, Generic[T]):
    factory: T
    needs: tuple[str, ...]


# The built-in rewards are imported when they are first used: a string is `module:name` in this package.
_REGISTRY: dict[str, _Registered[Factory | str]] = {
    "aesthetic": _Registered("aesthetic:Aesthetic", ("images",)),
    "clip_direction": _Registered("clip_direction:ClipDirection", ("images", "metadata")),
    "clip_score": _Registered("clip_score:ClipScore", ("images", "prompts")),
    "consistency": _Registered("consistency:Consistency", ("images", "metadata")),
    "exact_match": _Registered("text_match:ExactMatch", ("texts", "metadata")),
    "format": _Registered("text_form:Format", ("texts",)),
    "geneval": _Registered("geneval:geneval", ("images", "metadata")),
    "hpsv2": _Registered("hpsv2:HPSv2", ("images", "prompts")),
    "image_reward": _Registered("image_reward:ImageReward", ("images", "prompts")),
    "jpeg_compressibility": _Registered("jpeg:jpeg_compressibility", ("images",)),
    "jpeg_incompressibility": _Registered("jpeg:jpeg_incompressibility", ("images",)),
    "judge": _Registered("judge:judge", ("images", "prompts")),
    "length": _Registered("text_form:Length", ("texts",)),
    "math": _Registered("math_answers:MathAnswer", ("texts", "metadata")),
    "motion": _Registered("motion:Motion", ("videos", "metadata")),
    "ocr": _Registered("ocr:Ocr", ("images", "prompts")),
    "pickscore": _Registered("pickscore:PickScore", ("images", "prompts")),
    "regex_match": _Registered("text_match:RegexMatch", ("texts", "metadata")),
    "remote": _Registered("remote:Remote", ("prompts", "metadata")),
    "reward_model": _Registered("reward_model:RewardModel", ("texts", "prompts")),
    "sharpness": _Registered("sharpness:Sharpness", ("images",)),
    "vlm_judge": _Registered("vlm_judge:VlmJudge", ("images", "videos", "prompts")),
}


def register(name: str, needs: tuple[str, ...] | None = None) -> Callable[[F], F]:
    """Return a decorator that registers a class of rewards, or a function that returns a reward, as ``name``.

    The first line of its docstring is the summary, a sentence. Its arguments are the options. ``needs`` lists the inputs
    that the reward reads. Classes carry it as an attribute; a function has none, so pass it here.
    """

    def add(factory: F) -> F:
        known = _REGISTRY.get(name)
        if known is not None and known.factory is not factory:
            raise ValueError(f"two rewards are called '{name}': {known.factory!r} and {factory!r}; rename one")
        read = getattr(factory, "needs", None) if needs is None else needs
        if read is None:
            raise ValueError(f"the reward '{name}' has no needs: found {factory!r}; register it with needs=(…)")
        _REGISTRY[name] = _Registered(factory, read)
        return factory

    return add


def make(name: str, **options: Any) -> Reward:
    """Build the reward called ``name``: a registered one, one of an entry point, or an import path with dots.

    The path ``package.module.name`` (or ``package.module:name``) may lead to a class, which is built with the options; to
    a function ``(samples, prompts, metadata, **options)``, which then is the reward; or to a reward object.
    """
    if _is_path(name):
        return _import_reward(name, options)
    factory = _registered(name).factory
    _check_options(name, factory, options)
    return factory(**options)


def list_rewards() -> list[Summary]:
    """Return name, summary and needs of every reward, in the order of names, without importing the built-in ones."""
    listed = []
    for name in _names():
        factory, needs = _REGISTRY.get(name) or _registered(name)
        docstring = _read_docstring(factory) if isinstance(factory, str) else inspect.getdoc(factory) or ""
        listed.append(Summary(name, docstring.partition("\n")[0], needs))
    return listed


def available() -> list[Entry]:
    """Return every reward with its options, in the order of names. Imports all of them."""
    return [find(name) for name in _names()]


def find(name: str) -> Entry:
    """Return the reward of that name or import path with its options; ValueError if there is none."""
    if not _is_path(name):
        registered = _registered(name)
        return _describe(name, registered.factory, registered.needs)
    from rewards.base import Reward

    target = _import_target(name)
    if isinstance(target, type):
        return _describe(name, target, getattr(target, "needs", ()))
    if isinstance(target, Reward):
        return _describe(name, type(target), target.needs)._replace(options={})
    return _describe(name, target, (), len(_ARGUMENTS))


def _names() -> list[str]:
    return sorted({*_REGISTRY, *(point.name for point in entry_points(group=GROUP))})


def _is_path(name: str) -> bool:
    return "." in name or ":" in name


def _registered(name: str) -> _Registered[Factory]:
    """Return the reward of that name, imported; ValueError if there is none."""
    if name in _REGISTRY:
        factory, needs = _REGISTRY[name]
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = getattr(import_module(f"rewards.{module}"), attribute)
        return _Registered(factory, needs)
    for point in entry_points(group=GROUP):
        if point.name == name:
            plugin = point.load()
            return _Registered(plugin, getattr(plugin, "needs", ()))
    known = _names()
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else "write package.module.name for one of your own."
    raise ValueError(f"there is no reward '{name}'; {hint} Known rewards: {', '.join(known)}")


def _read_docstring(path: str) -> str:
    """Return the docstring of a built-in reward from its source: importing the module would take seconds."""
    module, _, attribute = path.partition(":")
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    definitions = (node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return next(ast.get_docstring(node) or "" for node in definitions if node.name == attribute)


def _describe(name: str, factory: Callable[..., Any], needs: tuple[str, ...], skipped: int = 0) -> Entry:
    """Return the entry of a class or function. Its first `skipped` parameters are not options."""
    parameters = list(inspect.signature(factory).parameters.values())[skipped:]
    summary, _, details = (inspect.getdoc(factory) or "").partition("\n")
    return Entry(name, summary, details.strip(), {p.name: _format_option(p) for p in parameters}, needs)


def _format_option(parameter: inspect.Parameter) -> str:
    """Return type and default as in the source, e.g. `float = 1.0`; empty without either."""
    annotation, words = parameter.annotation, []
    if annotation is not inspect.Parameter.empty:
        words.append(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation)))
    if parameter.default is not inspect.Parameter.empty:
        words.append(f"= {parameter.default!r}")
    return " ".join(words)


def _import_target(path: str) -> Any:
    """Import the class, the reward or the function at `path`; ValueError if there is none."""
    try:
        target = import_object(path)
    except ImportError as error:
        raise ValueError(
            f"cannot import the reward '{path}' (package.module.name): {error}; start from the folder that holds the "
            "module, or install it"
        ) from error
    if not callable(target):
        raise ValueError(
            f"the reward '{path}' is {type(target).__name__}, expected a function (samples, prompts, metadata) or a class"
        )
    return target


def _import_reward(path: str, options: dict[str, Any]) -> Reward:
    from rewards.base import Reward
    from rewards.functions import Function

    target = _import_target(path)
    if isinstance(target, type):
        _check_options(path, target, options)
        reward: Reward = target(**options)
        return reward
    if isinstance(target, Reward):
        if options:
            raise ValueError(
                f"the reward '{path}' is an object already and takes no options, found {', '.join(options)}"
            )
        return target
    _check_options(path, target, options, *_ARGUMENTS)
    return Function(path.replace(":", ".").rpartition(".")[2], target, options)


def _check_options(name: str, factory: Callable[..., Any], options: dict[str, Any], *arguments: str) -> None:
    """Raise ValueError for a misspelt or missing option; leave errors inside the factory as they are."""
    signature = inspect.signature(factory)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[len(arguments) :]) or "none"
        called = f"; it is called with ({', '.join(arguments)})" if arguments else ""
        raise ValueError(f"options of the reward '{name}': {error}{called}; it takes: {known}") from error
