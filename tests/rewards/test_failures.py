"""Tests of rewards that fail, hang or return nonsense, under each rule."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Failsafe, Late, RewardError, Scores, failures, score
from rewards.failures import PROBES, OnError


@dataclass
class Fragile:
    """A reward that returns the length of a text. It fails in its first calls, and on a batch with one of `bad`."""

    bad: frozenset[str] = frozenset()
    fails_first: int = 0
    name: str = "fragile"
    needs: tuple[str, ...] = ("texts",)
    calls: list[list[str]] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Fragile:
        return self

    def __call__(
        self, samples: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        assert len(samples) == len(prompts) == len(metadata)
        assert [f"p{text}" for text in samples] == list(prompts)
        self.calls.append(list(samples))
        if len(self.calls) <= self.fails_first:
            raise ConnectionError("no answer")
        if self.bad & set(samples):
            raise OSError("cannot read")
        return [None if text == "none" else math.nan if text == "nan" else float(len(text)) for text in samples]


def scored(reward: Any, texts: Sequence[str]) -> Scores:
    return score(reward, texts, [f"p{text}" for text in texts], [{}] * len(texts))


def test_raise_stops_with_the_rewards_name() -> None:
    with pytest.raises(RewardError, match="reward 'fragile' failed: OSError: cannot read"):
        scored(Failsafe(Fragile(frozenset({"b"}))), ["a", "b"])


def test_retry_repeats_the_call_after_growing_pauses() -> None:
    pauses: list[float] = []
    reward = Fragile(fails_first=2)
    found = scored(Failsafe(reward, "retry", retries=3, pause=0.5, sleep=pauses.append), ["a", "bb"])
    assert found.values.tolist() == [1.0, 2.0]
    assert pauses == [0.5, 1.0]
    assert len(reward.calls) == 3


def test_retry_ends_with_the_error() -> None:
    pauses: list[float] = []
    reward = Fragile(fails_first=10)
    with pytest.raises(RewardError, match="no answer"):
        scored(Failsafe(reward, "retry", retries=2, sleep=pauses.append), ["a"])
    assert pauses == [1.0, 2.0]
    assert len(reward.calls) == 3


def test_drop_excludes_the_rows_that_fail_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a", "bb", "broken", "dddd", "none", "nan", "ggggggg"]
    with caplog.at_level(logging.WARNING):
        found = scored(Failsafe(Fragile(frozenset({"broken"})), "drop"), texts)
    assert found.valid.tolist() == [True, True, False, True, False, False, True]
    assert found.values[found.valid].tolist() == [1.0, 2.0, 4.0, 7.0]
    assert "reward 'fragile' scored 4 of 7 samples" in caplog.text


@given(st.lists(st.sampled_from(["a", "bb", "bad"]), min_size=1, max_size=40))
def test_drop_loses_no_row_that_can_be_scored(texts: list[str]) -> None:
    """This holds for up to sixteen rows. Of more rows none is scored if sixteen random ones fail."""
    found = scored(Failsafe(Fragile(frozenset({"bad"})), "drop"), texts)
    good = [text != "bad" for text in texts]
    if len(texts) <= PROBES or found.valid.any():
        assert found.valid.tolist() == good
    assert all(found.values[i] == len(texts[i]) for i in found.valid.nonzero().flatten().tolist())


@pytest.mark.parametrize(("count", "every"), [(64, 8), (256, 16), (64, 2), (1024, 16)])
def test_drop_finds_rows_that_are_scattered(count: int, every: int) -> None:
    texts = ["bad" if i % every == 0 else "good" for i in range(count)]
    found = scored(Failsafe(Fragile(frozenset({"bad"})), "drop"), texts)
    assert found.valid.tolist() == [text == "good" for text in texts]


def test_drop_finds_one_row_in_few_calls() -> None:
    """The calls are the whole batch, one row that can be scored alone, and two halves at each of six levels."""
    reward = Fragile(frozenset({"bad"}))
    scored(Failsafe(reward, "drop"), ["good"] * 41 + ["bad"] + ["good"] * 22)
    assert len(reward.calls) == 1 + 1 + 2 * 6


def test_a_single_row_that_fails_is_tried_once() -> None:
    reward = Fragile(frozenset({"bad"}))
    assert not scored(Failsafe(reward, "drop"), ["bad"]).valid.any()
    assert reward.calls == [["bad"]]


def test_drop_gives_up_if_no_row_can_be_scored() -> None:
    """There are seventeen calls instead of 127."""
    reward = Fragile(fails_first=10**6)
    found = scored(Failsafe(reward, "drop"), ["a"] * 64)
    assert not found.valid.any()
    assert [len(call) for call in reward.calls] == [64] + [1] * PROBES


def test_images_are_halved_too() -> None:
    class Dark(Fragile):
        def __call__(self, samples: Any, prompts: Any, metadata: Any) -> Any:
            if float(samples.min()) < 0.1:
                raise ValueError("too dark")
            return samples.mean((1, 2, 3))

    images = torch.linspace(0.5, 1, 4)[:, None, None, None].expand(4, 3, 2, 2).clone()
    images[2] = 0.0
    found = score(Failsafe(Dark(), "drop"), images, [""] * 4, [{}] * 4)
    assert found.valid.tolist() == [True, True, False, True]
    torch.testing.assert_close(found.values[[0, 1, 3]], torch.linspace(0.5, 1, 4)[[0, 1, 3]])


@pytest.fixture
def hanging() -> Any:
    """A reward that waits until the test is over."""
    over = threading.Event()

    class Hanging(Fragile):
        def __call__(self, samples: Any, prompts: Any, metadata: Any) -> Any:
            self.calls.append(list(samples))
            over.wait(30)
            return [0.0] * len(samples)

    yield Hanging()
    over.set()


def test_a_call_that_is_late_has_failed(hanging: Fragile) -> None:
    with pytest.raises(Late, match=r"reward 'fragile' failed: no answer after 0.05 s"):
        scored(Failsafe(hanging, timeout=0.05), ["a"])


def test_after_a_time_limit_the_whole_call_is_dropped(hanging: Fragile) -> None:
    found = scored(Failsafe(hanging, "drop", timeout=0.05), ["a", "b", "c"])
    assert found.valid.tolist() == [False, False, False]
    assert len(hanging.calls) == 1


def test_after_a_time_limit_nothing_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further call would first wait for the first one to end."""
    waited: list[float] = []

    def late(call: Any, seconds: float, name: str, busy: Any) -> Scores:
        waited.append(seconds)
        raise Late(name, "no answer")

    monkeypatch.setattr(failures, "call_with_timeout", late)
    assert not scored(Failsafe(Fragile(), "drop", timeout=7.0), ["a", "b", "c"]).valid.any()
    assert waited == [7.0]


def test_a_time_limit_in_the_search_ends_it() -> None:
    """The rows that were scored before it are valid."""
    over = threading.Event()

    class Hanging(Fragile):
        def __call__(self, samples: Any, prompts: Any, metadata: Any) -> Any:
            if list(samples) == ["hangs"]:
                over.wait(30)
            return super().__call__(samples, prompts, metadata)

    reward = Hanging(frozenset({"bad", "hangs"}))
    found = scored(
        Failsafe(reward, "drop", timeout=0.3), ["good", "good", "good", "bad", "good", "hangs", "good", "good"]
    )
    over.set()
    assert 0 < int(found.valid.sum()) < 6
    assert not found.valid[[3, 5]].any()


def test_no_call_starts_while_a_late_one_continues(hanging: Fragile) -> None:
    """Each attempt waits as long as a call may take, and its error has the reason."""
    reward = Failsafe(hanging, "retry", timeout=0.05, retries=2, sleep=lambda seconds: None)
    with pytest.raises(Late, match="an earlier call that was too late is still running"):
        scored(reward, ["a"])
    assert len(hanging.calls) == 1


def test_the_next_call_starts_once_a_late_one_has_ended() -> None:
    class Slow(Fragile):
        def __call__(self, samples: Any, prompts: Any, metadata: Any) -> Any:
            if not self.calls:
                threading.Event().wait(0.3)
            return super().__call__(samples, prompts, metadata)

    reward = Slow()
    found = scored(Failsafe(reward, "retry", timeout=0.2, retries=4, sleep=lambda seconds: None), ["a"])
    assert found.values.tolist() == [1.0]
    assert len(reward.calls) == 2


@pytest.mark.parametrize("rule", ["raise", "retry", "drop"])
def test_with_time_enough_nothing_changes(rule: OnError) -> None:
    found = scored(Failsafe(Fragile(), rule, timeout=30.0), ["a", "none"])
    assert found.values.tolist() == [1.0, 0.0]
    assert found.valid.tolist() == [True, False]


def test_an_error_in_the_thread_is_the_callers() -> None:
    with pytest.raises(RewardError, match="cannot read"):
        scored(Failsafe(Fragile(frozenset({"a"})), timeout=30.0), ["a"])


def test_it_has_the_name_of_the_reward() -> None:
    reward = Failsafe(Fragile())
    assert (reward.name, reward.needs, reward.to("cpu")) == ("fragile", ("texts",), reward)


def test_an_empty_batch() -> None:
    assert scored(Failsafe(Fragile(), "drop"), []).values.shape == (0,)
