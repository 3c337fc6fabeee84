"""Samples of the first micro-batch of a step, on which the policy must reproduce known log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.core import Likelihoods
from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions, Policy
from difrl.policies.logprob_check import SAMPLES, Close, EvaluationNames, check_first_update
from difrl.policies.snapshots import CURRENT
from difrl.runtime.dtypes import DTYPES


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

    @classmethod
    def prepare(cls, config: RunConfig, policy: Policy, rollout: Rollout, decisions: Decisions) -> FirstUpdateCheck:
        """Choose samples of a micro-batch and evaluate them under the weights that drew them.

        To be called before the differentiable pass of the micro-batch, because it may exchange weights.
        """
        evaluations = policy.evaluations
        scored = decisions.mask.any(dim=1)
        rows = scored.int().argsort(descending=True, stable=True)[:SAMPLES]
        rollout, decisions = rollout.select(rows), decisions.select(rows, slice(None))
        recorded = policy.rollout_logprobs(rollout, decisions)
        on_policy = config.rollout.snapshot == CURRENT
        recomputed = None if on_policy else policy.recompute_logprobs(rollout, decisions)
        equal_references = policy.references_equal_to_policy()
        # Every process checks samples in every step: if they were counted, `nfe` would depend on the number of processes.
        policy.evaluations = evaluations
        dtype = DTYPES[config.model.dtype]
        return cls(policy, rollout, decisions, rows, recorded, recomputed, equal_references, dtype)

    def __call__(self, lik: Likelihoods) -> None:
        """Compare with the likelihoods of the micro-batch. Raise FirstUpdateError, with the cause, if they do not agree."""
        mask, logp = self.decisions.mask, lik.logp[self.rows]
        found = logp if self.recomputed is None else self.recomputed
        check_first_update(found, self.recorded, mask, self.dtype, self._diagnose)
        for name in self.equal_references:
            names = EvaluationNames(other=f"that of {name!r}, whose weights are the same,")
            check_first_update(logp, lik[f"references/{name}"][self.rows], mask, self.dtype, self._diagnose, names)

    def _diagnose(self, expected: Tensor, close: Close) -> str:
        return self.policy.diagnose(self.rollout, self.decisions, expected, close)
