"""Every shipped recipe of a shipped image model takes a step through the real trainer, at its predicted cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from difrl.config.load import load_mapping, read_config
from difrl.config.presets.images import IMAGE_PRESETS
from difrl.inference.preference_pairs import make_pairs
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.paths import assets, recipes
from difrl.scoring import Scorer
from difrl.training.cost.estimate import estimate
from difrl.training.trainer import Trainer
from tests.recipes import load_training_prompts

NAMES = [
    name
    for name, path in recipes().items()
    if (said := load_mapping(path)).get("algorithm") in IMAGE_PRESETS and said["model"]["path"] in assets()
]
# A dense reward: with so few samples no group of a yes-or-no one may differ.
REWARDS = ("rewards=[{name: jpeg_compressibility}]", "watch=[]")
# One step, since the estimate for a window that moves is a mean over the run. Groups of four make branches of two.
SMALL = (*REWARDS, "train.steps=1")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """Return overrides for recipes that train on such rows: a few pairs, made by the command in the recipe's header."""
    folder = tmp_path_factory.mktemp("pairs")
    drawn = ("data.group_size=2", "data.prompts_per_step=4", "rollout.steps=2")
    make_pairs(read_config(recipes()["awm"], [*REWARDS, *drawn]), folder, 4)
    return {"prompts": ("data.group_size=4",), "pairs": (f"data.train={folder / 'pairs.jsonl'}",)}


@pytest.mark.parametrize("name", NAMES)
def test_takes_a_step_and_spends_the_evaluations_of_its_estimate(name: str, rows: dict[str, tuple[str, ...]]) -> None:
    shipped = read_config(recipes()[name])
    small = (*SMALL, *rows[shipped.data.rows], f"data.prompts_per_step={shipped.train.updates_per_step}")
    config = read_config(recipes()[name], small)
    policy = load_diffusion_policy(config)
    assert isinstance(policy, DiffusionPolicy)
    scorer = Scorer.build(config.rewards, config.watch, "cpu")
    trainer = Trainer(config, policy, scorer, load_training_prompts(config), DistributedContext())
    before = {key: value.detach().clone() for key, value in policy.parameters.items()}
    row = trainer.step(0)
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] > 0
    assert any(not value.equal(before[key]) for key, value in policy.parameters.items())
    assert row["nfe"] == estimate(config).evaluations.step


def test_a_recipe_is_named_after_its_method_and_writes_where_its_name_says() -> None:
    for name in NAMES:
        assert read_config(recipes()[name]).output_dir == Path("runs") / name
