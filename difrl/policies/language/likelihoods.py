"""Generated tokens evaluated under one set of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from difrl.core import LOSS_ESTIMATORS, f_divergence
from difrl.policies.evaluation import Evaluation
from difrl.policies.language.lm_head import ChunkedLogits
from difrl.policies.references import Reference


@dataclass(frozen=True, eq=False)
class TokenLogprobs(Evaluation):
    """N tokens and the distributions that they were drawn from."""

    distributions: ChunkedLogits

    @property
    def detached(self) -> Self:
        fixed = replace(self.distributions, hidden=self.distributions.hidden.detach())
        return replace(self, logp=self.logp.detach(), distributions=fixed)

    def kl_to(self, other: Self) -> Tensor:
        return self._full("reverse_kl", 0.5, other)

    def kl_from(self, other: Self) -> Tensor:
        return self._full("forward_kl", 0.5, other)

    def divergence(self, other: Self, reference: Reference) -> Tensor:
        """Estimate k2 or k3 from the drawn tokens; others from them (sampled), or over the whole vocabulary (full)."""
        name, delta = str(reference.divergence), self.logp - other.logp
        if name in LOSS_ESTIMATORS:
            return LOSS_ESTIMATORS[name](self.logp, other.logp)
        if reference.vocabulary == "full":
            return self._full(name, reference.alpha, other)
        divergence = f_divergence(name, reference.alpha)
        return (
            divergence.estimate_from_policy_samples(delta)
            if reference.samples == "own"
            else divergence.estimate_from_reference_samples(delta)
        )

    def _full(self, name: str, alpha: float, other: Self) -> Tensor:
        return self.distributions.divergence(other.distributions, f_divergence(name, alpha).full)

    @property
    def weight(self) -> Tensor | None:
        """Importance weights of tokens that another engine, or another precision, drew."""
        return self.flat.get("correction")
