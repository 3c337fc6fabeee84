"""Shared parts of the recipes of the Gaussian arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLIPPED = {"kind": "clipped"}
MEAN = {"baseline": "mean", "std": "none"}
FROZEN = {"old": {"decay": 1.0}}
"""Snapshots with which ℓ_old stays that of the base."""


def anchor(divergence: str, coefficient: Any = 1.0, place: str = "loss") -> dict[str, Any]:
    """Return an anchor to the base."""
    return {"to": "base", "divergence": divergence, "coefficient": coefficient, "place": place}


def reverse(kernel: str, noise_level: float, *anchors: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return sections in which every noisy step is a decision, with its log-likelihood summed over dimensions."""
    likelihood = {"kind": "reverse", "reduce": "sum", **more.pop("likelihood", {})}
    rollout = {"kernel": kernel, "noise_level": noise_level}
    return {"rollout": rollout, "likelihood": likelihood, "objective": CLIPPED, "anchors": [*anchors], **more}


def forward(weighting: str, *anchors: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return sections with six uniform times a sample and rollouts by a solver of second order, whose error is small."""
    likelihood = {"kind": "forward", "weighting": weighting, "times": {"kind": "uniform"}, "decisions": 6}
    return {
        "rollout": {"solver": "DPMSolverMultistepScheduler", **more.pop("rollout", {})},
        "likelihood": {**likelihood, **more.pop("likelihood", {})},
        "objective": CLIPPED,
        "anchors": [*anchors],
        **more,
    }
