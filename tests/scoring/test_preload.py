"""Rewards load their models before the model under training is loaded, and before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from difrl.config.load import ConfigError
from difrl.reporting.terminal import SilentDisplay
from difrl.training import run as running
from difrl.training.cost.estimate import estimate
from rewards import RewardError
from tests.recipes import recipe
from tests.texts import prompt_file, shown_recipe


class WithoutWeights:
    """A reward whose model cannot be loaded."""

    name, needs = "without", ("texts",)

    def to(self, device: object) -> WithoutWeights:
        return self

    def preload(self) -> None:
        raise OSError("the weights are gone")

    def __call__(self, *arguments: Any) -> Any:
        raise AssertionError("called")


@pytest.mark.parametrize("section", ["rewards", "watch"])
def test_a_run_ends_before_it_loads_its_model(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    """`difrl check` loads nothing, so it does not find this."""
    config = shown_recipe(
        lm,
        tmp_path / "run",
        prompt_file(tmp_path),
        **{section: [{"import": "tests.scoring.test_preload:WithoutWeights"}]},
    )
    estimate(config)
    monkeypatch.setattr(running, "load_policy", lambda *arguments, **named: pytest.fail("the model was loaded"))
    with pytest.raises(RewardError, match="reward 'without' failed: OSError: the weights are gone"):
        running.train(config, display=SilentDisplay())


def test_a_missing_folder_of_a_reward_is_found_by_the_check(sd3: Path) -> None:
    config = recipe(sd3, rewards=[{"name": "clip_score", "options": {"model": "/no/such"}}])
    with pytest.raises(ConfigError, match=r"rewards\.0 \(clip_score\): .*model: there is no file or folder '/no/such'"):
        estimate(config)
