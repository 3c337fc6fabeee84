from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch

from rewards import Judge, Scores, available, find, list_rewards, make, register, registry, score
from rewards.base import all_valid


class Length:
    """Characters of the text.

    scale: of a character.
    """

    name = "length"
    needs: tuple[str, ...] = ("texts",)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def to(self, device: torch.device | str) -> Length:
        return self

    def __call__(self, samples: Any, prompts: Any, metadata: Any) -> Scores:
        return all_valid(self.scale * torch.tensor([len(text) for text in samples]))


def letters(texts: Any, prompts: Any, metadata: Any, *, letter: str = "a") -> list[float | None]:
    return [float(text.count(letter)) if text else None for text in texts]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_rewards")
    module.__dict__.update(Length=Length, letters=letters, made=Length(3.0), number=3, short=lambda texts: [1.0])
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def test_the_built_in_rewards_are_listed_with_their_needs() -> None:
    entries = {entry.name: entry for entry in available()}
    assert {"geneval", "jpeg_compressibility", "jpeg_incompressibility", "judge", "ocr"} <= set(entries)
    assert entries["geneval"].needs == ("images", "metadata")
    assert entries["geneval"].options["exact"] == "bool = False"
    assert entries["ocr"].needs == ("images", "prompts")
    assert all(entry.summary.endswith(".") and entry.needs for entry in entries.values())


def test_the_list_agrees_with_the_rewards_themselves() -> None:
    """The list reads docstrings from the source and has the needs of built-in rewards in a table."""
    assert list_rewards() == [(entry.name, entry.summary, entry.needs) for entry in available()]
    for name, registered in registry._REGISTRY.items():
        factory = registry._registered(name).factory
        assert getattr(factory, "needs", registered.needs) == registered.needs, name
    assert find("judge").needs == Judge.needs


@pytest.mark.parametrize("name", ["geneval", "jpeg_compressibility", "jpeg_incompressibility", "ocr"])
def test_listed_rewards_can_be_made(name: str) -> None:
    reward = make(name)
    (entry,) = (entry for entry in available() if entry.name == name)
    assert (reward.name, reward.needs) == (entry.name, entry.needs)
    assert reward.to("cpu") is reward


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="no reward 'genevall'; did you mean 'geneval'"):
        make("genevall")
    with pytest.raises(ValueError, match=r"package.module.name.*Known rewards: .*judge"):
        make("zzz")


def test_an_unknown_option_gets_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'geneval'.*'partiall'.*it takes: detector, color_model, partial, exact"):
        make("geneval", partiall=True)


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})
    register("length")(Length)
    register("length")(Length)
    with pytest.raises(ValueError, match="two rewards are called 'length'"):
        register("length", needs=("texts",))(lambda: Length())


def test_a_class_has_its_options_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})
    assert register("length")(Length) is Length
    entry = registry.find("length")
    assert entry == (
        "length",
        "Characters of the text.",
        "scale: of a character.",
        {"scale": "float = 1.0"},
        ("texts",),
    )
    assert make("length", scale=2.0)(["abc"], [""], [{}]).values.tolist() == [6.0]
    with pytest.raises(ValueError, match=r"'length'.*'scal'.*it takes: scale$"):
        make("length", scal=2.0)


def test_the_needs_of_a_function_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})
    register("long", needs=("texts", "prompts"))(lambda: Length())
    assert registry.find("long").needs == ("texts", "prompts")
    with pytest.raises(ValueError, match=r"the reward 'short' has no needs.*register it with needs="):
        register("short")(lambda: Length())
    with pytest.raises(ValueError, match="no reward 'short'"):
        registry.find("short")


@pytest.mark.parametrize("path", ["my_rewards:Length", "my_rewards.Length"])
def test_a_class_by_import_path_is_built_with_the_options(plugin: None, path: str) -> None:
    assert make(path, scale=2.0)(["abc"], [""], [{}]).values.tolist() == [6.0]


def test_a_function_by_import_path_is_the_reward(plugin: None) -> None:
    reward = make("my_rewards.letters", letter="b")
    scores = score(reward, ["abba", "", "c"], [""] * 3, [{}] * 3)
    assert scores.values.tolist() == [2.0, 0.0, 0.0]
    assert scores.valid.tolist() == [True, False, True]
    assert reward.name == "letters"
    assert reward.to("cpu") is reward


def test_a_reward_by_import_path_is_taken_as_it_is(plugin: None) -> None:
    assert make("my_rewards.made")(["ab"], [""], [{}]).values.tolist() == [6.0]
    with pytest.raises(ValueError, match="is an object already and takes no options, found scale"):
        make("my_rewards.made", scale=1.0)


def test_the_object_of_an_import_path_is_described(plugin: None) -> None:
    """The options are those of its signature, without the arguments of a call. A reward object has no options."""
    described = registry.find("my_rewards:Length")
    assert described.name == "my_rewards:Length"
    assert (described.summary, described.details) == ("Characters of the text.", "scale: of a character.")
    assert (described.options, described.needs) == ({"scale": "float = 1.0"}, ("texts",))
    assert registry.find("my_rewards.made") == described._replace(name="my_rewards.made", options={})
    assert registry.find("my_rewards.letters") == ("my_rewards.letters", "", "", {"letter": "str = 'a'"}, ())
    with pytest.raises(ValueError, match="cannot import the reward 'my_rewards:Longth'"):
        registry.find("my_rewards:Longth")


def test_types_that_nobody_wrote_are_left_out(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["my_rewards"], "letters", lambda texts, prompts, metadata, letter, most=3: [])
    assert registry.find("my_rewards.letters").options == {"letter": "", "most": "= 3"}


def test_options_of_an_imported_reward_are_checked_at_once(plugin: None) -> None:
    with pytest.raises(
        ValueError, match=r"'my_rewards.letters'.*unexpected keyword argument 'lettre'.*it takes: letter"
    ):
        make("my_rewards.letters", lettre="b")
    with pytest.raises(
        ValueError, match=r"too many positional arguments; it is called with \(samples, prompts, metadata\)"
    ):
        make("my_rewards.short")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards:Longth", "cannot import the reward 'my_rewards:Longth'"),
        ("no_such_package:Reward", "No module named 'no_such_package'"),
        ("my_rewards:number", "is int, expected a function"),
        ("my_rewards.", "cannot import the reward 'my_rewards.'"),
    ],
)
def test_an_import_path_that_leads_nowhere(plugin: None, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(path)


def test_entry_points_are_known_by_name(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("characters", "my_rewards:Length", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    assert make("characters", scale=3.0)(["ab"], [""], [{}]).values.tolist() == [6.0]
    (entry,) = (entry for entry in available() if entry.name == "characters")
    assert entry.needs == ("texts",)
    assert entry.summary == "Characters of the text."
    assert ("characters", "Characters of the text.", ("texts",)) in list_rewards()
