"""The hint that the rewards of the first steps give nothing to learn from: given where it is due, and only there."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.reporting.terminal import PlainDisplay
from difrl.training import no_signal
from difrl.training import run as running
from difrl.training.no_signal import SignalWatch
from rewards import Scores
from tests.fakes import Ones
from tests.recipes import recipe, text_recipe


def hints(rows: Iterable[tuple[float, float]], **sections: Any) -> list[tuple[int, str]]:
    """Return the hints of a run with steps (share of groups without spread, mean reward), 64 samples each, by step."""
    data = {"prompts_per_step": 8, "group_size": 8}
    watch = SignalWatch(recipe("tiny-sd3", **{"rewards": [{"name": "geneval"}], "data": data, **sections}))
    found = []
    for step, (idle, reward) in enumerate(rows, 1):
        label = watch.config.rewards[0].label
        metrics = {"groups/zero_std": idle, f"reward/{label}": reward, f"shaped/{label}": reward, "reward/mean": reward}
        if hint := watch.observe(metrics):
            found.append((step, hint))
    return found


def test_equal_rewards_are_named_after_five_steps() -> None:
    ((step, hint),) = hints([(1.0, 0.5)] * 20)
    assert step == 5
    assert "every sample has the same reward (reward/geneval 0.500)" in hint
    assert "first 5 steps (320 samples)" in hint
    assert "difrl rewards geneval" in hint


def test_a_sparse_reward_gets_the_time_of_256_samples() -> None:
    few = {"prompts_per_step": 2, "group_size": 4}
    assert [step for step, _ in hints([(1.0, 0.0)] * 40, data=few)] == [32]
    assert hints([(1.0, 0.0)] * 4) == []
    for first_success in range(1, 6):  # its group has a spread
        assert hints([(1.0, 0.0)] * (first_success - 1) + [(0.9, 1 / 64)] + [(1.0, 0.0)] * 50) == []


def test_rewards_that_differ_only_between_prompts_have_another_cause() -> None:
    rows = [(1.0, reward) for reward in (0.1, 0.4, 0.2, 0.3, 0.2)]
    ((_, hint),) = hints(rows)
    assert "never within a group" in hint
    assert "data.group_size (now 8)" in hint
    assert hints(rows, advantage={"baseline": "none", "std": "none"}) == []  # samples are not compared


def test_a_run_that_does_not_learn_from_its_rewards_gets_none() -> None:
    watch = SignalWatch(
        text_recipe(
            "tiny-lm",
            rewards=[{"name": "math", "weight": 0.0}],
            teachers={"teacher": {"path": "tiny-lm"}},
            anchors=[{"to": "teacher", "coefficient": 1.0, "divergence": "k1", "place": "decision"}],
        )
    )
    assert not any(watch.observe({"groups/zero_std": 1.0, "reward/math": 0.0}) for _ in range(100))
    assert hints([(1.0, math.nan)] * 20) == []


class Zeros(Ones):
    """A reward that cannot tell texts apart."""

    def __call__(self, samples: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        return Scores(torch.zeros(len(samples)), torch.ones(len(samples)).bool())


def test_the_shape_of_a_reward_counts() -> None:
    """A clip at 0 makes rewards equal that are not."""
    shaped = [{"name": "geneval", "shape": {"kind": "clip", "low": -1.0, "high": 0.0}}]
    ((_, hint),) = hints([(1.0, 0.0)] * 5, rewards=shaped)
    assert "shaped/geneval 0.000" in hint


def test_a_run_shows_the_hint_once_also_if_it_is_resumed(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(no_signal, "SAMPLES", 1)
    (tmp_path / "prompts.txt").write_text("1+1=\n2+2=\n3+3=\n4+4=\n")
    texts = []
    for steps in (4, 7):
        config = text_recipe(
            lm,
            tmp_path / "run",
            data={"train": str(tmp_path / "prompts.txt"), "evaluation": None},
            train={"steps": steps},
            rewards=[{"import": "tests.training.test_no_signal:Zeros"}],
            checkpoint={"every": 1},
            eval={"every": 0},
        )
        stream = io.StringIO()
        running.train(config, resume=True, display=PlainDisplay(stream))
        texts.append(stream.getvalue())
    assert [text.count("no signal to learn from in the first 5 steps") for text in texts] == [0, 1]
    assert texts[1].index("step 5/7") < texts[1].index("no signal") < texts[1].index("step 6/7")
