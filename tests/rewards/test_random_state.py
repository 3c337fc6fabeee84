"""Building at the first use does not move the global random states, and what is built is the same in every process."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from difrl.runtime.paths import PACKAGE
from difrl.scoring import diversity
from difrl.scoring.diversity import judge_features
from rewards.aesthetic import Aesthetic, AestheticHead
from rewards.clip import TransformersClip
from rewards.judge import JudgeNetwork
from rewards.random_state import FirstCall, get_random_state, preserved_random_state, set_random_state
from rewards.reward_model import RewardModel
from tests.rewards.test_reward_model import bert
from tests.tiny_clip import tiny_clip


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def draw() -> tuple[Any, ...]:
    return torch.rand(2).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()


def test_a_block_leaves_the_random_states_as_they_were_even_if_it_fails() -> None:
    seed(1)
    draw()  # numpy and Python now hold the second of a pair of normals
    before = get_random_state()
    expected = draw()
    set_random_state(before)
    with pytest.raises(KeyError), preserved_random_state():
        {}[repr(draw())]
    assert draw() == expected


class Lazy:
    """Builds a random weight at its first call, and draws at every call if `moody`."""

    def __init__(self, moody: bool) -> None:
        self.moody, self.calls = moody, 0
        self.weight: float | None = None

    def __call__(self) -> tuple[float, Any]:
        self.calls += 1
        if self.weight is None:
            self.weight = torch.rand(1).item() + np.random.rand() + random.random()
        return self.weight, draw() if self.moody else None


@pytest.mark.parametrize("moody", [False, True])
def test_an_interrupted_sequence_of_calls_goes_on_as_it_would_have(moody: bool) -> None:
    """Three calls in one process, and one in a second process that restores the states after two of the first."""
    first, whole = FirstCall(), Lazy(moody)
    seed(2)
    calls = [(get_random_state(), first(whole)) for _ in range(3)]
    states, expected = calls[2]
    set_random_state(states)
    assert FirstCall()(Lazy(moody)) == expected
    assert torch.equal(get_random_state()["torch"], states["torch"]) is not moody


def test_only_a_first_call_that_draws_is_repeated() -> None:
    def calls(moody: bool, built: bool) -> int:
        lazy = Lazy(moody)
        lazy.weight = 1.0 if built else None
        first = FirstCall()
        first(lazy)
        first(lazy)
        return lazy.calls

    assert [calls(False, True), calls(False, False), calls(True, True), calls(True, False)] == [2, 3, 3, 3]


def test_a_function_that_never_drew_gets_the_states_of_before() -> None:
    seed(3)
    expected = draw()
    seed(3)
    FirstCall()(lambda: None)
    assert draw() == expected


def test_a_first_call_that_fails_leaves_the_states_and_the_next_is_the_first() -> None:
    lazy = Lazy(True)

    def failing() -> Any:
        found = lazy()
        if lazy.calls == 1:
            raise KeyError
        return found

    first = FirstCall()
    seed(4)
    expected = draw()
    seed(4)
    with pytest.raises(KeyError):
        first(failing)
    assert first(failing)[1] == expected


def prepare_aesthetic(folder: Path) -> Callable[[], object]:
    path = folder / "head.safetensors"
    save_file(AestheticHead(4).state_dict(), path)
    return partial(Aesthetic(str(folder), str(path))._load_head, 4)


def prepare_reward_model(folder: Path) -> Callable[[], object]:
    reward = RewardModel(model=str(bert(folder, num_labels=1)))
    return lambda: reward._classifier


BUILDERS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "judge": lambda folder: partial(JudgeNetwork.load, PACKAGE / "assets" / "judge"),
    "diversity by the judge": lambda folder: partial(judge_features, torch.zeros(1, 3, 32, 32)),
    "aesthetic": prepare_aesthetic,
    "reward model": prepare_reward_model,
    "clip": lambda folder: partial(TransformersClip, str(tiny_clip(folder))),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_parts_of_difrl_are_built_without_drawing(name: str, tmp_path: Path) -> None:
    diversity._load_judge.cache_clear()
    build = BUILDERS[name](tmp_path)
    seed(5)
    expected = draw()
    seed(5)
    build()
    assert draw() == expected
