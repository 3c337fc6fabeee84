"""`difrl check` of Stable Diffusion 3.5 medium at its published size: GPUs on which a recipe fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from difrl.training.cost.estimate import Estimate, estimate
from difrl.training.cost.fits import LADDER, describe_changes, find_fit, find_fits
from tests.published import build_folder
from tests.recipes import recipe

LORA: Mapping[str, Any] = {"train": "lora", "lora": {"rank": 32}, "dtype": "bfloat16", "max_sequence_length": 256}
AT_512: Mapping[str, Any] = {
    "rollout": {"height": 512, "width": 512, "steps": 10, "guidance": 4.5, "batch": 16},
    "data": {"prompts_per_step": 8},
    "anchors": [{"to": "base", "coefficient": 0.1}],
}
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder("sd35-medium", tmp_path_factory.mktemp("models") / "sd35-medium")


@pytest.fixture(scope="module")
def lora(folder: Path) -> Estimate:
    return estimate(recipe(folder, model=LORA, **AT_512))


@pytest.fixture(scope="module")
def full(folder: Path) -> Estimate:
    return estimate(recipe(folder, model={**LORA, "train": "full"}, **AT_512))


def test_a_lora_step_fits_24_gb(lora: Estimate) -> None:
    fit = find_fit(lora.counts, lora.config, 1, 24)
    assert fit is not None
    assert fit.config.model.quantize == "none"


def test_a_full_fine_tune_fits_two_gpus_of_80_gb(full: Estimate) -> None:
    assert full.model.trained == pytest.approx(2.24e9, rel=0.01)
    sharded = full.config.model_copy(
        update={"model": full.config.model.model_copy(update={"shard": "weights", "gradient_checkpointing": True})}
    )
    half, whole = (full.counts.count(config, 2) for config in (sharded, full.config))
    assert half.state["gradients"] == 2 * full.model.trained == whole.state["gradients"] // 2
    assert half.peak < 40 * GIB < whole.peak
    fit = find_fit(full.counts, sharded, 2, 80)
    assert fit is not None
    assert fit.rung is LADDER[0]
    assert find_fit(full.counts, sharded, 1, 24) is None


@pytest.mark.slow
def test_more_or_larger_gpus_never_take_a_later_rung(lora: Estimate, full: Estimate) -> None:
    for found in (lora, full):
        rungs = {
            key: len(LADDER) if fit is None else LADDER.index(fit.rung)
            for key, fit in find_fits(found.counts, found.config).items()
        }
        for (size, count), rung in rungs.items():
            assert all(rungs[s, n] <= rung for s, n in rungs if s >= size and n == count)
            assert all(rungs[s, n] <= rung or rung > 7 for s, n in rungs if s == size and n >= count)
        for fit in filter(None, find_fits(found.counts, found.config).values()):
            assert (describe_changes(found.config, fit.config) == "") == (fit.rung is LADDER[0])
