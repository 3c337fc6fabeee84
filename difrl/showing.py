"""What a run shows of its model: the sweep over RLG weights, and pictures of the same samples side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from difrl.config import RunConfig
from difrl.evaluation import Evaluator
from difrl.pictures import compare
from difrl.policies.base import TUNED, Steering
from difrl.processes import Processes
from difrl.rollout import Rollout
from difrl.scoring import Scorer


def rewards_of(scorer: Scorer, rollout: Rollout, columns: int) -> list[list[float | None]]:
    """The optimised reward of every image of a grid, row by row; None where it could not be scored."""
    scored = scorer(rollout)
    values = [float(r) if v else None for r, v in zip(scored.rewards, scored.valid, strict=True)]
    return [values[i : i + columns] for i in range(0, len(values), columns)]


def before_after(evaluator: Evaluator, config: RunConfig, folder: Path) -> str:
    """samples/before-after.png: the same prompts and noise through the pretrained and the trained model; "" if no images."""
    columns, path = min(4, config.eval.columns), folder / "samples" / "before-after.png"
    drawn = _compare(evaluator, {"before": Steering(0.0), "after": TUNED}, config.eval.show, columns, path)
    return str(path) if drawn else ""


def sweep(
    evaluator: Evaluator, config: RunConfig, folder: Path, processes: Processes, steering: Steering = TUNED
) -> dict[str, Any]:
    """rlg.json and rlg.png: every metric, the distance to the base and the cost against the RLG weight."""
    weights = config.eval.rlg
    steered = {f"w = {w:g}": replace(steering, rlg=w) for w in weights}
    rows = [evaluator(config.eval.images, replace(one, measure=True)) for one in steered.values()]
    settings = {"first_steps": steering.first_steps, "adaptive": steering.adaptive}
    result: dict[str, Any] = {"weights": list(weights), **settings}
    for name in rows[0]:
        result[name.removeprefix("eval/")] = [row[name] if math.isfinite(row[name]) else None for row in rows]
    if processes.is_main:
        if _compare(evaluator, steered, min(4, config.eval.show), 2, folder / "rlg.png"):
            result["picture"] = "rlg.png"
        (folder / "rlg.json").write_text(json.dumps(result, indent=1))
    return result


def _compare(evaluator: Evaluator, sets: Mapping[str, Steering], count: int, columns: int, path: Path) -> bool:
    """Draws one column of samples for each way to steer them; False where samples are not images."""
    if count == 0:
        return False
    images: dict[str, torch.Tensor] = {}
    scores: dict[str, list[list[float | None]]] = {}
    captions: list[str] = []
    for label, steering in sets.items():
        rollout, captions = evaluator.show(count, columns, steering)
        if rollout.images is None:
            return False
        images[label] = rollout.images.cpu().unflatten(0, (len(captions), columns))
        scores[label] = rewards_of(evaluator.scorer, rollout, columns)
    compare(images, captions, scores).save(path)
    return True
