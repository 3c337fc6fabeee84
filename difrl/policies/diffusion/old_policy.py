"""The weights that are old to a run: where ℓ_old, and the transitions that they would have made, come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from difrl.policies.diffusion.likelihoods import Evaluation

Source = Callable[[Evaluation, Mapping[str, Evaluation], dict[str, Tensor]], Tensor]
"""(θ, references, N flat decisions) → [N, ...]."""


class Old(NamedTuple):
    """What is known of old weights without evaluating them once more."""

    logp: Source
    """ℓ_old, [N]."""
    mean: Source
    """Of the old transition of a reverse decision, [N, ...]."""


OLD: Mapping[str, Old] = {
    "recorded": Old(lambda theta, others, flat: flat["log_prob"], lambda theta, others, flat: flat["mean"]),
    "recompute": Old(lambda theta, others, flat: others["old"].logp, lambda theta, others, flat: others["old"].mean),
    "detach": Old(lambda theta, others, flat: theta.logp.detach(), lambda theta, others, flat: theta.mean.detach()),
}
"""By likelihood.old."""

READERS = frozenset({"bias", "mixed/plus", "mixed/minus"})
"""What may take an evaluation under old weights beside ℓ_old itself, by the names of `Likelihoods.terms`."""
