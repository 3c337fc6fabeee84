"""Bad input of language models in the trainer: some is refused, some is left out of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.data.prompts import load_prompts
from difrl.policies.errors import ModelError
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy
from difrl.reporting.terminal import SilentDisplay
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training import run as running
from difrl.training.trainer import Trainer, TrainingError
from samplers import DecodingError
from tests.texts import Ones, prompt_file, shown_recipe


def trainer_of(lm: Path, folder: Path, reward: Ones, **sections: Any) -> tuple[Trainer, LanguagePolicy]:
    config = shown_recipe(lm, folder / "run", prompt_file(folder), **sections)
    policy = load_language_policy(config)
    scorer = Scorer.from_rewards({"ones": (reward, 1.0)}, {})
    return Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()), policy


def test_a_run_refuses_long_prompts_before_it_begins(lm: Path, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, ["1+1=", "1" * 60])
    with pytest.raises(ModelError, match=r"prompts\.txt:2: 60 tokens.*context of 64 leaves room for 59"):
        running.train(shown_recipe(lm, tmp_path / "run", path), display=SilentDisplay())
    assert not (tmp_path / "run").exists()


def test_a_group_that_nothing_scored_has_no_part_in_the_step(lm: Path, tmp_path: Path) -> None:
    """Each step has two groups of three. A third of the six prompts begin with 0."""
    trainer, _ = trainer_of(lm, tmp_path, Ones("0"), data={"prompts_per_step": 6})
    metrics = trainer.step(0)
    assert metrics["samples/invalid"] == pytest.approx(1 / 3)
    assert metrics["reward/mean"] == metrics["reward/ones"]


def test_a_step_of_which_nothing_was_scored_stops_the_run(lm: Path, tmp_path: Path) -> None:
    trainer, policy = trainer_of(lm, tmp_path, Ones("012"))
    before = [p.clone() for p in policy.parameters.values()]
    with pytest.raises(TrainingError, match="no sample could be scored"):
        trainer.step(0)
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters.values(), before, strict=True))


def test_completions_that_end_at_once_are_samples_of_one_decision(lm: Path, tmp_path: Path) -> None:
    """The model generates only the end token: the reward gets empty texts, and every sample is trained on."""
    trainer, policy = trainer_of(lm, tmp_path, Ones())
    with torch.no_grad():
        head = policy.network.model.get_output_embeddings()
        head.weight.zero_()
        head.weight[1] = 1e-3
        policy.network.model.model.norm.weight.zero_()  # uniform, then all on the end token by the bias below
    head.bias = torch.nn.Parameter(torch.tensor([100.0 if i == 1 else 0.0 for i in range(15)]), requires_grad=False)
    scored = trainer.source.draw(0, 0, range(2), lambda part: None)
    assert set(scored.rollout.texts or ()) == {""}
    assert scored.valid.all()
    assert scored.rollout.replay_data["mask"].sum(dim=1).tolist() == [1] * 6
    assert trainer.step(0)["reward/mean"] == 0.0


def test_logits_that_are_not_numbers_stop_the_run_with_the_reason(lm: Path, tmp_path: Path) -> None:
    trainer, policy = trainer_of(lm, tmp_path, Ones())
    with torch.no_grad():
        next(iter(policy.parameters.values())).fill_(float("nan"))
    with pytest.raises(DecodingError, match="logits are not finite for prompt 0"):
        trainer.step(0)


def test_the_metrics_of_a_run_count_unscored_samples(lm: Path, tmp_path: Path) -> None:
    rewards = [{"import": "tests.texts:Ones", "options": {"unscorable": "0"}}]
    config = shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path), rewards=rewards, data={"prompts_per_step": 6})
    running.train(config, display=SilentDisplay())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples/invalid"] for row in rows if "loss" in row] == pytest.approx([1 / 3, 1 / 3])
