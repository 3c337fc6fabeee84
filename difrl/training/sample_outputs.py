"""Samples that a run saves: the fixed prompts at a step, before and after training, and over RLG weights."""

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
from difrl.runtime.progress import phase
from difrl.training.evaluation import Evaluator

SWEPT = 4
"""Prompts of the sheet of a sweep, at most."""


def save_step_samples(evaluator: Evaluator, config: RunConfig, folder: Path, step: int) -> None:
    """Save samples/step-N and its JSON: the fixed prompts and noise, sampled with the present weights."""
    sheet = _sheet(evaluator, {"": TRAINED}, config.eval.show, config.eval.columns)
    if sheet is not None:
        place = sheet.save(folder / "samples" / f"step-{step:06d}")
        place.with_suffix(".json").write_text(json.dumps(sheet.as_data()))


def sample_files(folder: Path, step: int) -> list[Path]:
    """Return the files that `save_step_samples` wrote after a step."""
    return list((folder / "samples").glob(f"step-{step:06d}.*"))


def save_before_after(evaluator: Evaluator, config: RunConfig, folder: Path) -> str:
    """Save samples/before-after: the same prompts and noise, sampled before and after training.

    Return its path, "" on a process that is not the main one.
    """
    settings = {"before": GuidanceSettings(0.0), "after": TRAINED}
    sheet = _sheet(evaluator, settings, config.eval.show, min(4, config.eval.columns))
    return "" if sheet is None else str(sheet.save(folder / "samples" / "before-after"))


def run_sweep(
    evaluator: Evaluator, config: RunConfig, folder: Path, guidance: GuidanceSettings = TRAINED
) -> dict[str, Any]:
    """Evaluate at every RLG weight. Save rlg.json (metrics, distance to the base, cost) and a sheet of samples."""
    weights = config.eval.rlg
    settings = {f"w = {w:g}": replace(guidance, rlg=w) for w in weights}
    rows = []
    for label, one in settings.items():
        with phase(label):
            rows.append(evaluator(config.eval.images, replace(one, measure=True)))
    result: dict[str, Any] = {"weights": list(weights)}
    result |= {"first_steps": guidance.first_steps, "adaptive": guidance.adaptive}
    for name in rows[0]:
        result[name.removeprefix("eval/")] = [row[name] if math.isfinite(row[name]) else None for row in rows]
    sheet = _sheet(evaluator, settings, min(SWEPT, config.eval.show), 2) if config.eval.show > 0 else None
    if sheet is not None:
        result |= {"picture": sheet.save(folder / "rlg").name, "samples": sheet.as_data()}
    if evaluator.processes.is_main:
        (folder / "rlg.json").write_text(json.dumps(result, indent=1))
    return result


def _sheet(evaluator: Evaluator, settings: Mapping[str, GuidanceSettings], count: int, columns: int) -> Sheet | None:
    """Return a sheet of `columns` samples of `count` prompts under each of several guidance settings.

    Every process draws, since the weights may lie on all of them. The main one scores; the others return None.
    """
    rollouts: dict[str, Rollout] = {}
    scores: dict[str, list[list[float | None]]] = {}
    captions: list[str] = []
    for label, guidance in settings.items():
        rollouts[label], captions = evaluator.draw_grid(count, columns, guidance)
        with evaluator.processes.fail_together():
            if evaluator.processes.is_main:
                scored = evaluator.scorer(rollouts[label])
                rewards = [float(r) if v else None for r, v in zip(scored.rewards, scored.valid, strict=True)]
                scores[label] = [rewards[i : i + columns] for i in range(0, len(rewards), columns)]
    return build_sheet(captions, rollouts, scores) if evaluator.processes.is_main else None
