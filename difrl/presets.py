"""Published methods as points of the grid: a preset is what `algorithm: NAME` puts under a recipe.

A preset holds what defines the method, with the published numbers. What a model, a task or a machine decides
(steps, group size, learning rate, guidance) is the recipe's. Published clip ranges and step sizes hold for
SD3.5-size latents (65,536 numbers); recipes for another size set their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method: where it comes from, its place in the grid, and the settings that make it."""

    summary: str
    source: str
    """arXiv number."""
    likelihood: str
    objective: str
    anchor: str
    advantage: str
    settings: Mapping[str, Any] = field(repr=False)


def _reverse(
    kernel: str, noise_level: float, clip: float, *, window: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """What the policy gradients on denoising steps share: equal clip bounds, group z-scores, no anchor."""
    rollout = {"kernel": kernel, "noise_level": noise_level, "window": window or {"kind": "all"}}
    return {
        "rollout": rollout,
        "likelihood": {"kind": "reverse", "reduce": "mean", "old": "recorded"},
        "objective": {"kind": "clipped", "clip_low": clip, "clip_high": clip},
        "anchors": [],
        "advantage": {"baseline": "mean", "std": "group", "clip": 5.0},
        **more,
    }


PRESETS: Mapping[str, Preset] = {
    "awm": Preset(
        summary="Advantage Weighted Matching: the pretraining loss, weighted by the advantage",
        source="2509.25050",
        likelihood="forward",
        objective="clipped",
        anchor="base+ema",
        advantage="global-std",
        # The authors' settings for SD3.5-M on GenEval. Their samples come from SA-Solver at 14 steps.
        settings={
            "rollout": {"kernel": "ode", "noise_level": 0.0},
            "likelihood": {
                "kind": "forward",
                "weighting": "ghuber",
                "times": {"kind": "grid", "fraction": 0.9},
                "decisions": 6,
                "old": "detach",
            },
            "objective": {"kind": "clipped", "clip_low": 1.0, "clip_high": 1.0},
            "snapshots": {"ema": {"decay": {"kind": "linear", "start": 0.0, "end": 0.3, "steps": 300}}},
            "anchors": [
                {"to": "ema", "divergence": "velocity", "coefficient": 1.0},
                {"to": "base", "divergence": "velocity", "coefficient": 0.003},
            ],
            "advantage": {"baseline": "mean", "std": "global", "clip": 5.0, "scale": 0.2},
        },
    ),
    "flow_grpo": Preset(
        summary="Flow-GRPO: policy gradient on every step of the Flow-SDE sampler, KL to the base model",
        source="2505.05470",
        likelihood="reverse",
        objective="clipped",
        anchor="base",
        advantage="group-std",
        # The published beta = 0.04 multiplies KL times |dt|, and |dt| is 0.1 on average in its ten steps.
        settings=_reverse(
            "flow_sde",
            0.7,
            1e-4,
            anchors=[{"to": "base", "divergence": "gaussian", "coefficient": 0.004}],
        ),
    ),
    "flow_grpo_fast": Preset(
        summary="Flow-GRPO-Fast: Flow-GRPO on a random window of two steps, the others by the ODE",
        source="2505.05470",
        likelihood="reverse",
        objective="clipped",
        anchor="none",
        advantage="group-std",
        # As in the authors' later code; in their first, a group also shared the steps before the window.
        settings=_reverse("flow_sde", 0.8, 1e-5, window={"kind": "random", "start": 0, "size": 2}),
    ),
    "dance_grpo": Preset(
        summary="DanceGRPO: policy gradient on steps of constant noise, without an anchor",
        source="2505.07818",
        likelihood="reverse",
        objective="clipped",
        anchor="none",
        advantage="group-std",
        # The authors also train a random 60 % of the steps, and start the samples of a group from one noise.
        settings=_reverse("dance_sde", 0.3, 1e-4),
    ),
    "cps": Preset(
        summary="Flow-CPS: policy gradient on coefficient-preserving sampling, which leaves images clean",
        source="2509.05952",
        likelihood="reverse",
        objective="clipped",
        anchor="none",
        advantage="group-std",
        # Published is a clip range of 1e-5 for -|x - mean|^2 as log-likelihood; a true one needs more.
        settings=_reverse("cps", 0.8, 1e-4, window={"kind": "random", "start": 0, "size": 3}),
    ),
}
