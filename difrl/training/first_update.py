"""Samples of the first micro-batch of a step, on which the policy must reproduce known log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.core import Likelihoods, Objective, reduce_over_decisions
from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions, Policy
from difrl.policies.logprob_check import (
    SAMPLES,
    ClipRange,
    Close,
    EvaluationNames,
    FirstUpdateError,
    check_first_update,
)
from difrl.policies.snapshots import CURRENT
from difrl.runtime.dtypes import DTYPES

RECORDED_IN_RATIO = (
    "If rounding is the cause: likelihood.old: recompute with snapshots: {old: {decay: 0.0}} evaluates old as θ is, and "
    "likelihood.old: detach takes θ itself if a step has one update; both make the ratio exactly 1"
)


@dataclass(frozen=True, eq=False)
class FirstUpdateCheck:
    """A check that the first update of a step starts from ratio 1, on S samples of its first micro-batch."""

    policy: Policy
    rollout: Rollout
    """The S samples."""
    decisions: Decisions
    rows: Tensor
    """[S]: their rows in the micro-batch."""
    recorded: Tensor
    """[S, J]: ℓ under the weights that drew the samples, from the rollout."""
    recomputed: Tensor | None
    """[S, J]: ℓ under these weights, evaluated again. None if they are θ: then the differentiable pass evaluates it."""
    equal_references: Sequence[str]
    """References of the likelihoods whose weights are θ's at this moment."""
    dtype: torch.dtype
    objective: Objective
    old: str
    """Source of ℓ_old (`likelihood.old`)."""
    evaluations: int
    """Evaluations of the model that preparing it took."""
    search: bool = True
    """Whether a failure makes it search for the cause."""

    @classmethod
    def prepare(
        cls, config: RunConfig, policy: Policy, objective: Objective, rollout: Rollout, decisions: Decisions
    ) -> FirstUpdateCheck:
        """Choose samples of a micro-batch and evaluate them under the weights that drew them.

        To be called before the differentiable pass of the micro-batch, because it may exchange weights.
        """
        evaluations = policy.evaluations
        scored, size = decisions.mask.any(dim=1), decisions.passes
        rows = scored.int().argsort(descending=True, stable=True)[:SAMPLES]
        rollout, decisions = rollout.select(rows), decisions.select(rows, slice(None))
        on_policy = config.rollout.snapshot == CURRENT
        recorded = policy.rollout_logprobs(rollout, decisions, size if on_policy else decisions.passes)
        recomputed = None if on_policy else policy.recompute_logprobs(rollout, decisions)
        equal_references = policy.references_equal_to_policy()
        # Every process checks samples in every step: if they were counted, `nfe` would depend on the number of processes.
        spent, policy.evaluations = policy.evaluations - evaluations, evaluations
        dtype, old = DTYPES[config.model.dtype], config.likelihood.old
        return cls(
            policy, rollout, decisions, rows, recorded, recomputed, equal_references, dtype, objective, old, spent
        )

    def holds(self, lik: Likelihoods) -> bool:
        """Return whether the likelihoods of the micro-batch agree. This costs no evaluations."""
        try:
            replace(self, search=False)(lik)
        except FirstUpdateError:
            return False
        return True

    def __call__(self, lik: Likelihoods) -> None:
        """Compare with the likelihoods of the micro-batch. Raise FirstUpdateError, with the cause, if they do not agree."""
        lik = lik.select(self.rows).map(Tensor.detach)
        own = lik.logp if self.recomputed is None else self.recomputed
        clip_range = self._clip_range(lik, "old", RECORDED_IN_RATIO) if self.old == "recorded" else None
        self._compare(own, self.recorded, EvaluationNames(), clip_range)
        for name in [name for name in self.equal_references if f"references/{name}" in lik.terms]:
            names = EvaluationNames(other=f"that of {name!r}, whose weights are the same,")
            self._compare(lik.logp, lik[f"references/{name}"], names, self._clip_range(lik, name))

    def _compare(self, logp: Tensor, other: Tensor, names: EvaluationNames, clip_range: ClipRange | None) -> None:
        check_first_update(logp, other, self.decisions.mask, self.dtype, self._diagnose, names, clip_range)

    def _clip_range(self, lik: Likelihoods, reference: str, remedy: str = "") -> ClipRange | None:
        """Return the range of an objective that computes its ratio to a reference; None if it does not."""
        objective, term = self.objective, f"references/{reference}"
        if term not in objective.needs:
            return None

        def excursion(logp: Tensor, other: Tensor) -> float:
            # The closed-form KL is that of θ, which says nothing of two evaluations under other weights.
            bias = {} if "bias" not in lik.terms or logp is lik.logp else {"bias": torch.zeros_like(logp)}
            compared = replace(lik, logp=logp, terms={**lik.terms, term: other, **bias})
            compared = reduce_over_decisions(compared, objective.decisions)
            found = objective.excursion(compared)[compared.mask]
            return float(found.max()) if found.numel() else 0.0

        return ClipRange(objective.clip_range, excursion, remedy)

    def _diagnose(self, expected: Tensor, close: Close) -> str:
        return self.policy.diagnose(self.rollout, self.decisions, expected, close) if self.search else ""
