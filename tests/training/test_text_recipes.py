"""Every shipped recipe of a language model takes steps through the real trainer, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.config.load import load_mapping, read_config
from difrl.config.presets.distillation import DISTILLATION
from difrl.config.presets.preferences import PREFERENCES
from difrl.config.presets.texts import TEXT_PRESETS
from difrl.data.rollout import Rollout
from difrl.policies.base import Policy
from difrl.policies.load import load_policy
from difrl.policies.logprob_check import FirstUpdateError
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.paths import recipes
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.recipes import load_training_prompts
from tests.samplers.causal import tiny_qwen2
from tests.tiny_models import characters_tokenizer

METHODS = {**TEXT_PRESETS, **PREFERENCES, **DISTILLATION}
NAMES = [name for name, path in recipes().items() if load_mapping(path).get("algorithm") in METHODS]
CHARACTERS = ("<pad>", "<eos>", *"0123456789+-=;")
TRAINED_ON = {"prompts": "arithmetic:train", "pairs": "data/arithmetic-pairs/pairs.jsonl"}
"""By data.rows: the built-in task, and what the command in a recipe's head makes of it."""

Task = Mapping[str, tuple[str, ...]]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Overrides for the inputs of a recipe: a random model of single characters, a few sums, their pairs and solved samples, and
    a teacher with other weights, because equal weights would give no gradient."""
    folder = tmp_path_factory.mktemp("task")
    for name, seed in (("student", 0), ("teacher", 1)):
        characters_tokenizer(CHARACTERS).save_pretrained(folder / name)
        tiny_qwen2(len(CHARACTERS), seed=seed).save_pretrained(folder / name)
    sums = [(f"{a}+{a + 3}=", str(2 * a + 3)) for a in range(8)]
    (folder / "sums.txt").write_text("".join(f"{prompt}\n" for prompt, _ in sums))
    pairs = lines(folder / "pairs.jsonl", [{"prompt": p, "chosen": right, "rejected": "-99"} for p, right in sums])
    solved = lines(folder / "samples.jsonl", [{"prompt": p, "text": right, "reward": 1.0} for p, right in sums])
    return {
        "each": (f"model.path={folder / 'student'}", "data.evaluation=null"),
        "prompts": (f"data.train={folder / 'sums.txt'}", "data.group_size=4"),
        "pairs": (f"data.train={pairs}",),
        "teachers": (f"teachers.teacher.path={folder / 'teacher'}",),
        "rehearsal": (f"rehearsal.train={solved}", "rehearsal.prompts_per_step=4"),
    }


def trainer_of(name: str, task: Task, *more: str) -> Trainer:
    shipped = read_config(recipes()[name])
    # Without a baseline the reward is the advantage, and NSR learns from those below 0 alone.
    offset = 0.5 if shipped.advantage.baseline == "none" else 0.0
    weight = shipped.rewards[0].weight  # 0 where a reward is only reported
    reward = f'rewards=[{{import: "tests.graded_texts:Graded", weight: {weight}, options: {{offset: {offset}}}}}]'
    size = (f"data.prompts_per_step={shipped.train.updates_per_step * 2}", "train.steps=2")
    read = [key for key in ("teachers", "rehearsal") if getattr(shipped, key)]
    given = [override for key in ("each", shipped.data.rows, *read) for override in task[key]]
    judged = ["collect.by=Graded"] if shipped.collect.by else []
    config = read_config(recipes()[name], [*given, reward, *judged, *size, "generation.max_new_tokens=5", *more])
    scorer = Scorer.build(config.rewards, config.watch, "cpu")
    return Trainer(config, load_policy(config), scorer, load_training_prompts(config), DistributedContext())


@pytest.mark.parametrize("name", NAMES)
def test_takes_steps(name: str, task: Task) -> None:
    """The second of two steps has snapshots that were taken after the first; micro-batches split groups."""
    trainer = trainer_of(name, task, "train.micro_batch=30")
    before = {key: value.detach().clone() for key, value in trainer.policy.parameters.items()}
    rows = [trainer.step(0), trainer.step(1)]
    for row in rows:
        assert all(math.isfinite(value) for key, value in row.items())
        assert row["grad_norm"] > 0
    assert any(not value.equal(before[key]) for key, value in trainer.policy.parameters.items())


ON_POLICY = [name for name in NAMES if read_config(recipes()[name]).data.rows == "prompts"]


def record_rounded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record likelihoods as tiny-lm does in bfloat16 in batches of 256, 0.004 a token away from those of the update.

    A model of a few thousand parameters rounds alike in every batch, and CPUs differ in where larger ones do not.
    """
    draw = policy.rollout

    def rounded(*given: Any) -> Rollout:
        drawn = draw(*given)
        recorded = drawn.replay_data["log_prob"]
        noise = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(0))
        return replace(drawn, replay_data={**drawn.replay_data, "log_prob": recorded + 0.004 * noise})

    monkeypatch.setattr(policy, "rollout", rounded)


@pytest.mark.parametrize(
    "more", [(), ("train.updates_per_step=2", "likelihood.old=recompute")], ids=["shipped", "more"]
)
@pytest.mark.parametrize("name", ON_POLICY)
def test_in_bfloat16_ratios_of_unchanged_weights_are_1_to_the_last_bit(
    name: str, more: tuple[str, ...], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights do not change at a learning rate of 0, so nothing is clipped in any update and no text is away from base."""
    trainer = trainer_of(name, task, *more, "model.dtype=bfloat16", "train.lr=0.0")
    record_rounded(trainer.policy, monkeypatch)
    row = trainer.step(0)
    assert (row["ratio/mean"], row["ratio/std"], row["approx_kl"]) == (1.0, 0.0, 0.0)
    assert row.get("clip_low", 0.0) == row.get("clip_high", 0.0) == 0.0
    assert row.get("kl/base", 0.0) == 0.0


@pytest.mark.parametrize(
    ("name", "more", "refused"),
    [
        ("text/gspo", ("objective.clip_low=3e-4", "objective.clip_high=4e-4"), r"the objective clips at 3\.00e-04"),
        ("text/dapo", (), ""),
    ],
)
def test_recorded_likelihoods_are_refused_where_rounding_takes_up_the_range_that_clips(
    name: str, more: tuple[str, ...], refused: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float error of 0.004 a token is below the tolerance, and passes beside DAPO's range of 0.2."""
    trainer = trainer_of(name, task, *more, "model.dtype=bfloat16", "likelihood.old=recorded")
    record_rounded(trainer.policy, monkeypatch)
    if not refused:
        assert trainer.step(0)["grad_norm"] > 0
        return
    with pytest.raises(FirstUpdateError, match=rf"{refused}.*likelihood\.old: recompute"):
        trainer.step(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_the_shipped_model_on_the_built_in_task(name: str) -> None:
    run = read_config(recipes()[name])
    assert run.output_dir == Path("runs") / name
    assert run.model.path == "tiny-lm"
    assert (run.data.train, run.data.evaluation) == (TRAINED_ON[run.data.rows], "arithmetic:eval")
    assert run.rewards[0].name == "math"
