"""The cells of the grid, each trained by the real trainer to its closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.arenas import gaussian as arena
from benchmarks.arenas.gaussian_page import CELLS
from difrl.data.prompts import load_prompts
from difrl.policies.base import GuidanceSettings, NoiseKey
from difrl.training.run import train
from difrl.training.trainer import Trainer

BY_NAME = {cell.name: cell for cell in CELLS}
QUICK = ["flow_sde", "dance", "flow_grpo", "k1_reward", "crd_paths", "awm_elbo", "awm_t", "crd_elbo", "nft"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arena.TASK.save(tmp_path_factory.mktemp("gaussian"), arena.STEPS)


@pytest.fixture(scope="module")
def trained(task: Path) -> Callable[[str], Trainer]:
    """Cells trained on a small budget, each once."""
    return cache(lambda name: arena.train(arena.build_config(task, BY_NAME[name].sections, budget=160_000)))


@pytest.mark.parametrize("name", QUICK)
def test_training_ends_at_the_closed_form(trained: Callable[[str], Trainer], name: str) -> None:
    """Training begins at a KL of about 0.4. The rest is the noise of Adam's last steps, measured below 0.004."""
    assert arena.measure(trained(name), BY_NAME[name].answer).to_answer < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if c.answer is not None], ids=lambda cell: cell.name)
def test_every_cell_ends_at_its_closed_form(task: Path, cell: arena.Cell) -> None:
    """Noise at this budget was measured below 0.003."""
    trainer = arena.train(arena.build_config(task, cell.sections, budget=400_000))
    assert arena.measure(trainer, cell.answer).to_answer < 0.006


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_rlg_moves_the_trained_mean_in_proportion(task: Path, trained: Callable[[str], Trainer], weight: float) -> None:
    """Base N(m, Σ), trained N(m + Σa/β, Σ): RLG at w samples N(m + w Σa/β, Σ), through the policy's own evaluation."""
    policy, count = trained("awm_elbo").policy, 4096
    prompt = load_prompts(str(task / "prompts.jsonl"))[0]
    drawn = policy.evaluation(
        [prompt] * count, torch.arange(count), NoiseKey(0, 0, "eval"), GuidanceSettings(rlg=weight)
    )
    assert drawn.images is not None
    found = drawn.images.flatten(1).double().numpy()
    cov, direction = np.array(arena.TASK.covariance), np.array(arena.TASK.directions[0])
    expected = np.array(arena.TASK.means[0]) + weight * cov @ direction / arena.BETA
    deviation = np.sqrt(np.diag(cov))
    # Four standard errors of the mean, and what training left: its KL of 0.01 at most is 0.14 deviations.
    assert (np.abs(found.mean(0) - expected) < deviation * (4 / math.sqrt(count) + 0.14 * weight)).all()
    # The solver's own error in 12 steps is 2 % of the covariance.
    allowed = np.outer(deviation, deviation) * (4 * math.sqrt(2 / count) + 0.03)
    assert (np.abs(np.cov(found.T) - cov) < allowed).all()


def test_the_ode_of_a_network_trained_with_memory_falls_short_of_the_optimum(trained: Callable[[str], Trainer]) -> None:
    """Dance-SDE at η = 0.7 keeps two fifths of the variance of its initial noise, and its optimum over paths is not π*."""
    found = arena.measure(trained("dance"), BY_NAME["dance"].answer)
    assert min(found.answer_to_optimum, found.to_optimum, found.ode_to_optimum) > 0.08


@pytest.mark.slow
def test_training_keeps_the_covariance(tmp_path: Path) -> None:
    """A linear reward moves only means, even if every affine denoiser can be reached: the covariance is the base's."""
    task = arena.TASK.save(tmp_path, arena.STEPS, affine=True)
    for name in ("flow_sde", "awm_uniform"):
        cell = BY_NAME[name]
        trainer = arena.train(arena.build_config(task, cell.sections, budget=800_000))
        assert arena.measure(trainer, cell.answer).to_answer < 0.02


def test_a_run_of_the_task_from_recipe_to_report(task: Path, tmp_path: Path) -> None:
    sections = {**BY_NAME["flow_sde"].sections, "eval": {"every": 0, "rlg": []}}
    config = arena.build_config(task, sections, budget=20_000).model_copy(update={"output_dir": tmp_path / "run"})
    train(config)
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "model" / "base.json").exists()
