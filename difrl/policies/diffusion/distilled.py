"""Settings of a recipe that do not suit a distilled model.

A model that was distilled to few steps knows the times of these steps. At other times its outputs were never trained, neither
the policy's nor those of an anchor, and with more steps it draws worse. If guidance was distilled into it too, guidance of the
sampler comes on top.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from difrl.config import RunConfig
from difrl.policies.diffusion.families import Family

log = logging.getLogger(__name__)

FEW = 8
"""Highest number of steps to which published models with `is_distilled` are distilled (FLUX.2 klein: 4, Krea 2 Turbo: 8)."""


def warn_of_distillation(config: RunConfig, family: Family) -> None:
    """Log a warning for every setting of a recipe that does not suit a distilled model."""
    for warning in find_warnings(config, family):
        log.warning(warning)


def find_warnings(config: RunConfig, family: Family) -> Iterator[str]:
    """Yield a sentence for every such setting."""
    scales: dict[str, float | None] = {"rollout.guidance": config.rollout.guidance}
    scales |= {f"anchors.{number}.guidance": anchor.guidance for number, anchor in enumerate(config.anchors)}
    for key, scale in scales.items():
        if not family.guides and scale is not None and scale > 1:
            yield (
                f"{key}: found {scale:g}, and this pipeline has no guidance of its own, because its model was distilled under "
                "guidance. The two add up and cost a second evaluation; set 1 unless these weights need it"
            )
    if not family.distilled:
        return
    if config.rollout.steps > FEW:
        yield (
            f"rollout.steps: found {config.rollout.steps}, and this model was distilled to few; set the number that its card "
            "names (4 to 8 for published models)"
        )
    likelihood = config.likelihood
    if likelihood.kind == "forward" and likelihood.times.kind != "grid":
        yield (
            f"likelihood.times.kind: found {likelihood.times.kind}, and this model was distilled at the times of its steps "
            "only; set grid"
        )
