"""What a run shows of its model: the sweep over RLG weights, and the same samples side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from difrl.config import RunConfig
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, GuidanceSettings
from difrl.reporting.sample_sheets import Sheet, build_sheet
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.evaluation import Evaluator


def sheet_rewards(scorer: Scorer, rollout: Rollout, columns: int) -> list[list[float | None]]:
    """The optimised reward of every sample of a sheet, row by row; None where it could not be scored."""
    scored = scorer(rollout)
    values = [float(r) if v else None for r, v in zip(scored.rewards, scored.valid, strict=True)]
    return [values[i : i + columns] for i in range(0, len(values), columns)]


def save_step_samples(evaluator: Evaluator, config: RunConfig, folder: Path, step: int) -> None:
    """samples/step-N: the fixed prompts and noise through the weights of this moment; and what JSON keeps of it."""
    sheet = _sheet(evaluator, {"": TRAINED}, config.eval.show, config.eval.columns)
    place = sheet.save(folder / "samples" / f"step-{step:06d}")
    place.with_suffix(".json").write_text(json.dumps(sheet.as_data()))


def save_before_after(evaluator: Evaluator, config: RunConfig, folder: Path) -> str:
    """samples/before-after: the same prompts and noise through the pretrained and the trained model; where it is."""
    steered = {"before": GuidanceSettings(0.0), "after": TRAINED}
    sheet = _sheet(evaluator, steered, config.eval.show, min(4, config.eval.columns))
    return str(sheet.save(folder / "samples" / "before-after"))


def sweep(
    evaluator: Evaluator,
    config: RunConfig,
    folder: Path,
    processes: DistributedContext,
    steering: GuidanceSettings = TRAINED,
) -> dict[str, Any]:
    """rlg.json and a sheet beside it: every metric, the distance to the base and the cost against the RLG weight."""
    weights = config.eval.rlg
    steered = {f"w = {w:g}": replace(steering, rlg=w) for w in weights}
    rows = [evaluator(config.eval.images, replace(one, measure=True)) for one in steered.values()]
    settings = {"first_steps": steering.first_steps, "adaptive": steering.adaptive}
    result: dict[str, Any] = {"weights": list(weights), **settings}
    for name in rows[0]:
        result[name.removeprefix("eval/")] = [row[name] if math.isfinite(row[name]) else None for row in rows]
    if processes.is_main:
        if config.eval.show > 0:
            sheet = _sheet(evaluator, steered, min(4, config.eval.show), 2)
            result |= {"picture": sheet.save(folder / "rlg").name, "samples": sheet.as_data()}
        (folder / "rlg.json").write_text(json.dumps(result, indent=1))
    return result


def _sheet(evaluator: Evaluator, sets: Mapping[str, GuidanceSettings], count: int, columns: int) -> Sheet:
    """`columns` samples of `count` prompts for each way to steer them."""
    rollouts: dict[str, Rollout] = {}
    scores: dict[str, list[list[float | None]]] = {}
    captions: list[str] = []
    for label, steering in sets.items():
        rollouts[label], captions = evaluator.show(count, columns, steering)
        scores[label] = sheet_rewards(evaluator.scorer, rollouts[label], columns)
    return build_sheet(captions, rollouts, scores)
