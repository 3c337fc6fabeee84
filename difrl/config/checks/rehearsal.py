"""Conflicts of rehearsal with the other parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.anchors import AnchorConfig
from difrl.config.schema.run import RunSections


def check_rehearsal(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    rehearsed = [(i, anchor) for i, anchor in enumerate(config.anchors) if anchor.samples == "rehearsal"]
    for index, anchor in rehearsed:
        if config.rehearsal is None:
            problem = "rehearsal refers to recorded samples, and the recipe has none; add rehearsal: {train: FILE}"
            yield ConfigConflict(("anchors", index, "samples"), f"{problem}, or set own")
        for key, problem in _find_unmeasurable(anchor):
            yield ConfigConflict(("anchors", index, key), problem)
    if config.rehearsal is None:
        return
    if not rehearsed:
        problem = "no anchor is measured on it; set samples: rehearsal for one of anchors, or remove rehearsal"
        yield ConfigConflict(("rehearsal",), problem)
    if config.likelihood.kind == "reverse":
        problem = "recorded samples have no denoising steps to evaluate; set kind: forward, or remove rehearsal"
        yield ConfigConflict(("likelihood", "kind"), problem)
    updates, prompts = config.train.updates_per_step, config.rehearsal.prompts_per_step
    if prompts % updates:
        problem = f"found {prompts}, and each of train.updates_per_step: {updates} updates takes an equal share; set a multiple"
        yield ConfigConflict(("rehearsal", "prompts_per_step"), problem)


def _find_unmeasurable(anchor: AnchorConfig) -> Iterator[tuple[str, str]]:
    if anchor.place != "loss":
        yield "place", f"rehearsed samples have neither reward nor advantage, found {anchor.place}; set loss"
    if anchor.divergence in ("k1", "k2", "k3"):
        problem = f"{anchor.divergence} estimates a KL from samples of θ, and rehearsed samples come from the anchor"
        yield "divergence", f"{problem}; set e.g. forward_kl or jensen_shannon, and vocabulary: sampled"
    if getattr(anchor.coefficient, "kind", None) == "reward_adaptive":
        yield (
            "coefficient",
            "reward_adaptive needs advantages, which rehearsed samples do not have; set a number or a schedule",
        )
