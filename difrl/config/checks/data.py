"""Conflicts of recorded samples, and of the division of a step into updates."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections


def check_data(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _recorded_rows_are_evaluated(config)
    yield from _updates_divide_groups(config)


def _recorded_rows_are_evaluated(config: RunSections) -> Iterator[ConfigConflict]:
    rows = config.data.rows
    if rows == "prompts":
        return
    if config.likelihood.kind == "reverse":
        problem = f"the images of data.rows: {rows} have no recorded denoising steps to evaluate; set kind: forward"
        yield ConfigConflict(("likelihood", "kind"), problem)
    if config.collect.max_draws > 1:
        problem = f"data.rows: {rows} are read, not sampled, so drawing again changes nothing; set 1"
        yield ConfigConflict(("collect", "max_draws"), problem)
    if config.advantage.normalise == "each":
        problem = f"data.rows: {rows} have one reward a sample, and each needs the rewards of the recipe; set total"
        yield ConfigConflict(("advantage", "normalise"), problem)
    if config.rollout.snapshot != "current":
        problem = f"data.rows: {rows} are not sampled from a snapshot; set current"
        yield ConfigConflict(("rollout", "snapshot"), problem)
    if config.rollout.branch is not None:
        yield ConfigConflict(
            ("rollout", "branch"), f"data.rows: {rows} are not sampled, so they share no steps; remove branch"
        )
    if rows == "pairs" and config.data.group_size != 2:
        problem = f"found {config.data.group_size}, and a pair is a group of two; set data.group_size: 2"
        yield ConfigConflict(("data", "group_size"), problem)


def _updates_divide_groups(config: RunSections) -> Iterator[ConfigConflict]:
    updates, groups = config.train.updates_per_step, config.groups
    if groups % updates:
        found = f"data.prompts_per_step: {config.data.prompts_per_step}"
        branches = f" with {config.branches} branches each" if config.branches > 1 else ""
        problem = (
            f"an update takes whole groups, and {found}{branches} is not a multiple of {updates}; change one of them"
        )
        yield ConfigConflict(("train", "updates_per_step"), problem)
