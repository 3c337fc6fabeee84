"""Settings of the enumerable language model, each trained by the real trainer to its known fixed point."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.arenas import text as arena
from benchmarks.arenas.text_cells import CELLS, FROZEN, anchored, distilled
from difrl.tasks.exact.enumerable import EnumerableTask
from difrl.tasks.exact.enumerable_solutions import completion_probabilities

BY_NAME = {cell.name: cell for cell in CELLS}
TASK = EnumerableTask(seed=0, prompts=1)
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TASK.save(tmp_path_factory.mktemp("enumerable"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Callable[[str], arena.Measured]:
    """Cells trained for a few steps, each once."""

    def measured(name: str) -> arena.Measured:
        cell = BY_NAME[name]
        config = arena.build_config(folder, cell, prompts=1, steps=STEPS)
        return arena.measure(arena.train(config), cell, TASK)

    return cache(measured)


@pytest.mark.parametrize("name", ["k1_sequence", "crd_sequence"])
def test_the_settings_whose_fixed_point_is_the_optimum_reach_it(
    trained: Callable[..., arena.Measured], name: str
) -> None:
    """Training starts at 0.46 nats. At the optimum the gradient has no noise."""
    assert trained(name).answer_to_optimum == 0
    assert trained(name).to_optimum < 0.01


@pytest.mark.parametrize("name", ["k2_loss", "k3_loss"])
def test_a_kl_in_the_loss_ends_at_its_own_fixed_point(trained: Callable[..., arena.Measured], name: str) -> None:
    """The noise of the last steps was measured below 0.006; the fixed points are 0.02 and 0.05 from the optimum."""
    found = trained(name)
    assert found.to_answer < 0.01
    assert found.to_answer < found.answer_to_optimum


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if c.answer is not None], ids=lambda cell: cell.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_setting_ends_at_its_fixed_point(cell: arena.Cell, seed: int, tmp_path: Path) -> None:
    task = EnumerableTask(seed)
    config = arena.build_config(task.save(tmp_path), cell, prompts=task.prompts, seed=seed)
    assert arena.measure(arena.train(config), cell, task).to_answer < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["free", "crd_moving"])
def test_what_nothing_holds_goes_to_one_completion(name: str, folder: Path) -> None:
    cell = BY_NAME[name]
    trainer = arena.train(arena.build_config(folder, cell, prompts=1, steps=cell.steps))
    assert arena.measure(trainer, cell, TASK).to_optimum > 0.5
    assert completion_probabilities(arena.tables(trainer.policy)[0]).max() > 0.9


def test_k1_as_a_loss_and_crd_of_single_tokens_are_refused(folder: Path) -> None:
    k1 = arena.Cell("k1_loss", "k1", "loss", "", anchored("k1"), None)
    tokens = arena.Cell("crd_tokens", "CRD", "", "", distilled("each", FROZEN), None)
    for cell in (k1, tokens):
        with pytest.raises(ValidationError, match=r"k1|token j of one text"):
            arena.build_config(folder, cell, prompts=1)
