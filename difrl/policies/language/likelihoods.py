"""Generated tokens evaluated under one set of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from difrl.core import f_divergence
from difrl.policies.evaluation import Evaluation, StoredEvaluation
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

    def stored(self, outputs: bool) -> StoredEvaluation:
        if not outputs:
            return StoredEvaluation(self.logp, None)
        return StoredEvaluation(self.logp, self.distributions.hidden, self.distributions.head)

    def kl_to(self, other: Self) -> Tensor:
        return self._full("reverse_kl", 0.5, other)

    def kl_from(self, other: Self) -> Tensor:
        return self._full("forward_kl", 0.5, other)

    def divergence(self, other: Self, reference: Reference) -> Tensor:
        return self._full(str(reference.divergence), reference.alpha, other)

    def _full(self, name: str, alpha: float, other: Self) -> Tensor:
        return self.distributions.divergence(other.distributions, f_divergence(name, alpha).full)

    @property
    def weight(self) -> Tensor | None:
        """Importance weights of tokens that another engine, or another precision, drew."""
        return self.flat.get("correction")
