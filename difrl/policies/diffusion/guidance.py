"""The guided denoiser that draws samples: classifier-free guidance, then RLG; both may be adaptive, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.policies.base import GuidanceSettings
from difrl.policies.snapshots import BASE, CURRENT
from samplers import (
    Agreement,
    Blend,
    Counting,
    Denoiser,
    Distance,
    Grid,
    Remembering,
    adaptive_classifier_free,
    adaptive_reinforcement_learning,
    classifier_free,
    extrapolate,
    reinforcement_learning,
)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser for one call of samples, numbered by their conditions, with the counts and distances of its use."""

    denoiser: Denoiser
    counted: Sequence[Counting]
    agreements: Sequence[Agreement]
    distance: Distance | None

    def measures(self, count: int) -> dict[str, Tensor]:
        """Return the measures of samples 0 .. count-1, float32 [count] each.

        divergence/base: mean over the states of the run of ||out - out_base||^2, averaged over dimensions.
        cost/evaluations: evaluations of the model for the sample. cost/saved: those that adaptive guidance left out.
        """
        made = sum((c.per_sample.sums(count).cpu() for c in self.counted), torch.zeros(count))
        saved = sum((a.saved.sums(count).cpu() for a in self.agreements), torch.zeros(count))
        costs = {"cost/evaluations": made.float(), "cost/saved": saved.float()}
        return costs if self.distance is None else {"divergence/base": self.distance.means(count).float(), **costs}


def build_guidance(
    denoiser: Callable[[str], Denoiser],
    scale: float,
    settings: GuidanceSettings,
    grid: Grid,
    blend: Blend = extrapolate,
) -> GuidedDenoiser:
    """Build RLG of base and current weights, each under classifier-free guidance at `scale`.

    denoiser: snapshot -> conditional denoiser. The base is evaluated only where the weight or a measurement needs it.
    """
    counted = [Counting(denoiser(snapshot)) for snapshot in (BASE, CURRENT)]
    agreements: list[Agreement] = []
    if settings.adaptive is None:
        base, trained = (classifier_free(one, scale, blend) for one in counted)
        remembered = Remembering(base)
        guided = reinforcement_learning(remembered, trained, settings.rlg, first_steps=settings.first_steps, grid=grid)
    else:
        costs = (1, 1, 1 if scale == 1 else 2)
        agreements = [Agreement(settings.adaptive, cost) for cost in costs]
        base, trained = (
            adaptive_classifier_free(c, scale, a, blend) for c, a in zip(counted, agreements, strict=False)
        )
        remembered = Remembering(base)
        guided = adaptive_reinforcement_learning(
            remembered, trained, settings.rlg, agreements[-1], first_steps=settings.first_steps, grid=grid
        )
    if not settings.measure:
        return GuidedDenoiser(guided, counted, agreements, None)
    distance = Distance(guided, classifier_free(denoiser(BASE), scale, blend), remembered)
    return GuidedDenoiser(distance, counted, agreements, distance)
