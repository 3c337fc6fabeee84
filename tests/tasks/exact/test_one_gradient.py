"""AWM, CRD and DiffusionNFT at θ = old: one gradient, −A ∇ℓ, through the real trainer and policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.arenas import gaussian as arena
from difrl.data.prompts import load_prompts
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer

OLD: Mapping[str, Any] = {"snapshots": {"old": {}}}
MEAN = {"baseline": "mean", "std": "none"}


def likelihood(weighting: str, **more: Any) -> dict[str, Any]:
    return {"kind": "forward", "weighting": weighting, "times": {"kind": "uniform"}, "decisions": 3, **more}


def first_gradient(folder: Path, sections: Mapping[str, Any]) -> Tensor:
    """Return the gradient of the first update at θ = old = base, with the same samples and decisions for every objective."""
    config = arena.build_config(folder, {"advantage": MEAN, **sections}, budget=1)
    scorer = Scorer.build(config.rewards, config.watch, torch.device("cpu"))
    trainer = Trainer(
        config, load_diffusion_policy(config), scorer, load_prompts(config.data.train), DistributedContext()
    )
    trainer.step(0)
    grad = trainer.parameters[0].grad
    assert grad is not None
    return grad.clone()


@pytest.mark.parametrize("weighting", ["uniform", "ghuber", "elbo"])
@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ({"kind": "centred", "bound": 50.0}, {}),
        ({"kind": "centred", "reward": "raw", "beta": 0.3}, {}),
        ({"kind": "negative_aware", "bound": 50.0}, {"mix": 1.0}),
        ({"kind": "negative_aware", "bound": 50.0}, {"mix": 0.5}),
    ],
    ids=["CRD", "CRD, raw rewards", "NFT", "NFT, b = 0.5"],
)
def test_three_methods_share_their_first_gradient(
    tmp_path: Path, weighting: str, objective: dict[str, Any], more: dict[str, Any]
) -> None:
    task = arena.TASK.save(tmp_path, arena.STEPS)
    awm = first_gradient(task, {"likelihood": likelihood(weighting), "objective": {"kind": "clipped"}})
    other = first_gradient(
        task, {"likelihood": likelihood(weighting, old="recompute", **more), "objective": objective, **OLD}
    )
    # float32 sums of some 400 terms; unit rewards lose a bound's worth of digits
    torch.testing.assert_close(other, awm, rtol=1e-3, atol=2e-4 * float(awm.abs().max()))
    assert awm.abs().max() > 1e-3
