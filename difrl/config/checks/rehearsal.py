"""What a rehearsal asks of the other parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from difrl.config.checks.conflict import ConfigConflict

if TYPE_CHECKING:
    from difrl.config import AnchorConfig
    from difrl.config.schema.run import RunSections as RunConfig


def check_rehearsal(config: RunConfig) -> Iterator[ConfigConflict]:
    """All that does not go with rehearsed samples, or with their absence."""
    rehearsed = [(i, anchor) for i, anchor in enumerate(config.anchors) if anchor.samples == "rehearsal"]
    for index, anchor in rehearsed:
        if config.rehearsal is None:
            problem = "rehearsal names the samples of a file, and the recipe has none; add rehearsal: {train: FILE}"
            yield ConfigConflict(("anchors", index, "samples"), f"{problem}, or set own")
        for key, problem in _unmeasurable(anchor):
            yield ConfigConflict(("anchors", index, key), problem)
    if config.rehearsal is None:
        return
    if not rehearsed:
        problem = "no anchor is measured on it; set samples: rehearsal for one of anchors, or remove rehearsal"
        yield ConfigConflict(("rehearsal",), problem)
    if config.likelihood.kind == "reverse":
        problem = (
            "samples of a file have no recorded denoising steps to evaluate; set kind: forward, or remove rehearsal"
        )
        yield ConfigConflict(("likelihood", "kind"), problem)
    updates, prompts = config.train.updates_per_step, config.rehearsal.prompts_per_step
    if prompts % updates:
        problem = (
            f"found {prompts}, and each of train.updates_per_step: {updates} updates rehearses as many; set a multiple"
        )
        yield ConfigConflict(("rehearsal", "prompts_per_step"), problem)


def _unmeasurable(anchor: AnchorConfig) -> Iterator[tuple[str, str]]:
    if anchor.place != "loss":
        yield "place", f"rehearsed samples have neither reward nor advantage, found {anchor.place}; set loss"
    if anchor.divergence in ("k1", "k2", "k3"):
        problem = f"{anchor.divergence} estimates a KL from samples of θ, and rehearsed ones are the anchor's"
        yield "divergence", f"{problem}; set e.g. forward_kl or jensen_shannon, and vocabulary: sampled"
    if getattr(anchor.coefficient, "kind", None) == "reward_adaptive":
        yield (
            "coefficient",
            "reward_adaptive asks for advantages, which rehearsed samples have not; set a number or a schedule",
        )
