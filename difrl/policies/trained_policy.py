"""Base class of diffusion and language policies.

A policy evaluates decisions under the weights of a snapshot. With that one function the base class implements the
likelihoods of an update, penalties in the reward, recomputed log-probabilities and the diagnosis of the first-update check.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Generic

import torch
from torch import Tensor, nn

from difrl.core import Likelihoods, k1
from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions, Penalty
from difrl.policies.diagnosis import Diagnosable, Diagnosis, widened
from difrl.policies.evaluation import E, get_old
from difrl.policies.logprob_check import Close
from difrl.policies.references import ReferenceSet
from difrl.policies.snapshots import CURRENT, Snapshots


@dataclass(frozen=True)
class ModelFiles:
    """The two forms in which a trained model is written to a folder."""

    save: Callable[[Path], None]
    """Write what was trained: an adapter, or the trained parts with a reference to the model that has the others."""
    merge: Callable[[Path], None]
    """Write the whole model in the format of its library. The model itself has no adapter afterwards."""


class TrainedPolicy(Diagnosable, Generic[E]):
    """A model under training. `E` is the evaluation of decisions of its modality."""

    def __init__(self, snapshots: Snapshots, reference_set: ReferenceSet, files: ModelFiles) -> None:
        self.snapshots, self.reference_set, self.save, self.merge = snapshots, reference_set, files.save, files.merge
        self.evaluations = 0

    even: ClassVar[bool] = True
    """True if drawing takes equally many passes for all samples."""

    @abstractmethod
    def build_evaluator(
        self, rollout: Rollout, decisions: Decisions, settings: Iterable[float | None]
    ) -> Callable[[str, float | None], E]:
        """Return a function of a snapshot (or teacher) and a value of `setting` that evaluates the decisions.

        settings: every value that the function will be called with; None is the policy's own.
        """

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.snapshots.parameters

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def drawing(self, *snapshots: str, alike: bool = True) -> AbstractContextManager[None]:
        return nullcontext() if alike and self.even else self.snapshots.gathered(*snapshots)

    def likelihoods(self, rollout: Rollout, decisions: Decisions, needs: frozenset[str] | None = None) -> Likelihoods:
        needs = self.reference_set.needs if needs is None else needs
        references = self.reference_set.needed_for(needs)
        evaluate = self.build_evaluator(rollout, decisions, [None, *(r.guidance for r in references.values())])
        # Weights are exchanged here, before the differentiable pass, and never again until its backward pass is over.
        with torch.no_grad():
            others = {name: evaluate(r.snapshot, r.guidance) for name, r in references.items()}
        theta = evaluate(CURRENT, None)
        terms = {f"references/{name}": other.logp for name, other in others.items()}
        for name, reference in references.items():
            if reference.divergence is not None and f"divergence/{name}" in needs:
                terms[f"divergence/{name}"] = theta.divergence(others[name], reference)
        old = self.reference_set.old
        if "references/old" in needs:
            terms["references/old"] = theta.flat["log_prob"] if old == "recorded" else get_old(old, theta, others).logp
        if "bias" in needs:
            terms["bias"] = theta.kl_from(get_old(old, theta, others))
        if "mixed/plus" in needs:
            terms["mixed/plus"], terms["mixed/minus"] = theta.mixed(get_old(old, theta, others))
        if "scale" in needs:
            terms["scale"] = theta.scale
        if (weight := theta.weight) is not None:
            terms["weight"] = weight
        shaped = {name: decisions.unflat(term) for name, term in terms.items()}
        return Likelihoods(decisions.unflat(theta.logp), decisions.mask, shaped)

    @torch.no_grad()
    def penalties(self, rollout: Rollout, decisions: Decisions) -> dict[str, Penalty]:
        """Return k1 of every decision to every anchor outside of the loss, less its expectation if the anchor is centred.

            k1_ij − KL(sampler ‖ anchor)_ij,    KL_ij = Σ_v sampler(v) (log sampler(v) − log anchor(v))

        The expectation depends on the decisions before j alone, so E[KL_ij ∇ℓ_ij] = 0: the gradient's mean stays, and its
        variance falls (the value function of on-policy distillation: vOPD, 2605.07865).
        """
        anchors, penalties = self.reference_set.reward_anchors, dict[str, Penalty]()
        evaluate = self.build_evaluator(rollout, decisions, [None, *(anchor.guidance for anchor in anchors.values())])
        evaluate_sampler = cache(partial(evaluate, self.sampler, None))
        if self.reference_set.old == "recorded":
            own = self.rollout_logprobs(rollout, decisions)
        else:  # in the batch of the anchor: equal weights then have no distance, whatever the precision
            own = decisions.unflat(evaluate_sampler().logp)
        for name, anchor in anchors.items():
            other = evaluate(anchor.snapshot, anchor.guidance)
            estimate = k1(own, decisions.unflat(other.logp))
            if anchor.centred:
                expected = decisions.unflat(evaluate_sampler().kl_to(other))
                penalties[name] = Penalty(estimate - expected, expected)
            else:
                penalties[name] = Penalty(estimate, estimate)
        return penalties

    def references_equal_to_policy(self) -> list[str]:
        own, references = self.setting.value, self.reference_set.needed_for(self.reference_set.needs)
        return [
            name
            for name, r in references.items()
            if r.guidance in (None, own) and self.snapshots.is_current(r.snapshot)
        ]

    def sampler_fingerprint(self) -> Tensor:
        return self.snapshots.fingerprint(self.sampler)

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        if "log_prob" in decisions.tensors:
            return decisions.tensors["log_prob"]
        # The batch shape differs from that of training, as the shape of a rollout does.
        return self.recompute_logprobs(rollout, decisions, together=1)

    @contextmanager
    def in_precision(self, dtype: torch.dtype) -> Iterator[None]:
        before = self.dtype
        with widened(self.module) if dtype == torch.float32 else nullcontext():
            self.dtype = dtype
            try:
                yield
            finally:
                self.dtype = before

    def diagnose(self, rollout: Rollout, decisions: Decisions, recorded: Tensor, close: Close) -> str:
        return Diagnosis(self, rollout, decisions, recorded, close)()
