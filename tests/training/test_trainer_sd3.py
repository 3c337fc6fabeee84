"""The trainer with a real pipeline: random SD3 weights, forward and reverse likelihoods, and the check of every run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.core import CentredRewardDistillation, Objective
from difrl.data.prompts import load_prompts
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.fakes import Brightness
from tests.recipes import FLOW_GRPO, recipe
from tests.training.test_trainer import Recording

UNCLIPPED = {"max_grad_norm": 1e9}
AWM_EMA = {"anchors": [{"to": "ema", "coefficient": 0.5}], "snapshots": {"ema": {"decay": 0.5}}}
REVERSE = {**FLOW_GRPO, "anchors": [{"to": "base", "divergence": "gaussian", "coefficient": 0.5}]}
FRESH_OLD = {"likelihood": {"kind": "forward", "decisions": 3, "old": "recompute"}, "snapshots": {"old": {}}}


def sd3_trainer(path: Path, /, **sections: Any) -> Trainer:
    config = recipe(path, **sections)
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    return Trainer(config, load_diffusion_policy(config), scorer, load_prompts(config.data.train), DistributedContext())


def learnt(
    path: Path, size: int, sections: Mapping[str, Any], objective: Objective | None
) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient of the second step, and its metrics."""
    trainer = sd3_trainer(path, **sections, train={"micro_batch": size, **UNCLIPPED})
    trainer.objective = objective or trainer.objective
    trainer.step(0)
    row = trainer.step(1)
    grads = [p.grad.flatten() for p in trainer.parameters if p.grad is not None]
    return torch.cat(grads), {k: v for k, v in row.items() if not k.startswith("time/")}


@pytest.mark.parametrize(
    ("sections", "objective"),
    [(AWM_EMA, None), (REVERSE, None), (FRESH_OLD, CentredRewardDistillation(decisions="mean"))],
    ids=["forward, ema anchor", "reverse, base anchor", "group statistics of means"],
)
def test_micro_batches_do_not_matter(sd3: Path, sections: dict[str, Any], objective: Objective | None) -> None:
    """Gradients, not weights, are compared: Adam turns a gradient that is 0 but for rounding into a whole step."""
    grad, row = learnt(sd3, 1000, sections, objective)
    del row["nfe"], row["nfe/check"]  # statistics of groups that come in pieces cost a pass of their own
    for size in (2, 5):  # fewer than a sample's decisions, and no multiple of them
        again, metrics = learnt(sd3, size, sections, objective)
        del metrics["nfe"], metrics["nfe/check"]
        # float32: two steps of some hundred operations each, relative to the largest entries
        torch.testing.assert_close(again, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
        assert metrics == pytest.approx(row, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "sections",
    [
        REVERSE,
        {**REVERSE, "likelihood": {"kind": "reverse", "old": "recompute"}, "snapshots": {"old": {}}},
        FRESH_OLD,
    ],
    ids=["reverse, recorded", "reverse, recomputed", "forward, recomputed"],
)
def test_later_updates_are_measured_against_the_weights_that_drew(sd3: Path, sections: dict[str, Any]) -> None:
    trainer = sd3_trainer(sd3, **sections, train={"updates_per_step": 2, "micro_batch": 1000, "lr": 1e-2})
    trainer.objective = objective = Recording(0.1, 0.1)
    for number in range(2):
        trainer.step(number)
        first, second = objective.ratios[2 * number :]
        torch.testing.assert_close(first, torch.ones_like(first), atol=1e-4, rtol=0)
        assert (second - 1).abs().max() > 1e-3


def test_detached_old_makes_every_ratio_one(sd3: Path) -> None:
    trainer = sd3_trainer(sd3, **AWM_EMA)
    for number in range(2):
        row = trainer.step(number)
        assert row["ratio/mean"] == 1
        assert row["ratio/std"] == 0
    assert row["kl/ema"] > 0


def test_evaluations_count_rollout_training_and_anchors_and_no_check(sd3: Path) -> None:
    """12 samples take 4 steps, and 3 decisions each under θ and under the anchor's weights."""
    assert sd3_trainer(sd3, **AWM_EMA).step(0)["nfe"] == 12 * 4 + 12 * 3 * 2
    assert sd3_trainer(sd3, rollout={"guidance": 2.0}).step(0)["nfe"] == 12 * 4 * 2 + 12 * 3


@pytest.mark.parametrize("sections", [{}, FLOW_GRPO], ids=["forward", "reverse"])
def test_first_update_check_bears_the_rounding_of_bfloat16(sd3: Path, sections: dict[str, Any]) -> None:
    sd3_trainer(sd3, **sections, model={"train": "lora", "lora": {"rank": 2}, "dtype": "bfloat16"}).step(0)
