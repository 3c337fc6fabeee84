"""Base class of diffusion and language policies.

A policy evaluates decisions under the weights of a snapshot. With that one function the base class implements the
likelihoods of an update, penalties in the reward, recomputed log-probabilities and the diagnosis of the first-update check.

Weights are exchanged once for each snapshot and update: all micro-batches are evaluated under it, in their own shapes, and
what θ is compared with is held until the micro-batch is trained on.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from difrl.core import Likelihoods, k1
from difrl.data.rollout import Rollout
from difrl.policies.base import ALL, Decisions, Part, Penalty
from difrl.policies.diagnosis import Diagnosable, Diagnosis, widened
from difrl.policies.evaluation import E, StoredEvaluation
from difrl.policies.logprob_check import Close
from difrl.policies.references import Reference, ReferenceSet
from difrl.policies.snapshots import CURRENT, Snapshots
from difrl.runtime.progress import count_done, phase

In = TypeVar("In")

References = Mapping[str, StoredEvaluation]
"""The evaluations of a micro-batch under the references, by name."""

_SAMPLER = "the weights that drew the samples"


@dataclass(frozen=True)
class ModelFiles:
    """The two forms in which a trained model is written to a folder."""

    save: Callable[[Path], None]
    """Write what was trained: an adapter, or the trained parts with a reference to the model that has the others."""
    merge: Callable[[Path], None]
    """Write the whole model in the format of its library. The model itself has no adapter afterwards."""


@dataclass(frozen=True)
class _OneAtATime:
    """Evaluations whose outputs are too large to hold: they are made anew, a micro-batch at a time, in every iteration."""

    parts: Sequence[Part]
    evaluate: Callable[[Sequence[Part]], Iterable[References]]

    def __iter__(self) -> Iterator[References]:
        for part in self.parts:
            yield from self.evaluate([part])


class TrainedPolicy(Diagnosable, Generic[In, E]):
    """A model under training. `In` is the model's input for decisions of its modality, and `E` their evaluation."""

    def __init__(self, snapshots: Snapshots, reference_set: ReferenceSet, files: ModelFiles) -> None:
        self.snapshots, self.reference_set, self.save, self.merge = snapshots, reference_set, files.save, files.merge
        self.evaluations = 0

    even: ClassVar[bool] = True
    """True if drawing takes equally many passes for all samples."""

    @abstractmethod
    def prepare(self, rollout: Rollout, decisions: Decisions, settings: Iterable[float | None]) -> In:
        """Return the model's input for decisions.

        settings: every value of `setting` that they will be evaluated at; None is the policy's own.
        """

    @abstractmethod
    def using(self, snapshot: str) -> AbstractContextManager[Callable[[In, float | None], E]]:
        """Return a context with the weights of a snapshot or teacher: a function of inputs and a value of `setting`."""

    @abstractmethod
    def restore(self, stored: StoredEvaluation, inputs: In, setting: float | None) -> E:
        """Return an evaluation of these inputs that was stored with its outputs."""

    @property
    def holds_outputs(self) -> bool:
        """Whether the outputs of a whole update under a reference fit beside the decisions themselves."""
        return True

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.snapshots.parameters

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def drawing(self, *snapshots: str, alike: bool = True) -> AbstractContextManager[None]:
        return nullcontext() if alike and self.even else self.snapshots.gathered(*snapshots)

    def evaluate_references(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], needs: frozenset[str] | None = None
    ) -> Iterable[References]:
        needs = self.reference_set.needs if needs is None else needs
        outputs = self.reference_set.compared_outputs(needs)
        return self._evaluate(rollout, decisions, parts, self.reference_set.needed_for(needs), outputs)

    def _evaluate(
        self,
        rollout: Rollout,
        decisions: Decisions,
        parts: Sequence[Part],
        references: Mapping[str, Reference],
        outputs: Collection[str],
    ) -> Iterable[References]:
        """Evaluate micro-batches under each of the references. Of those in `outputs`, the model's outputs are kept."""

        snapshots = dict.fromkeys(r.snapshot for r in references.values())

        @torch.no_grad()
        def evaluate(some: Sequence[Part]) -> list[References]:
            found: list[dict[str, StoredEvaluation]] = [{} for _ in some]
            settings = [None, *(r.guidance for r in references.values())]
            for snapshot in snapshots:
                with self.using(snapshot) as model, phase("references", total=len(some)):
                    for (rows, columns), evaluations in zip(some, found, strict=True):
                        inputs = self.prepare(rollout.select(rows), decisions.select(rows, columns), settings)
                        for name, reference in references.items():
                            if reference.snapshot == snapshot:
                                stored = model(inputs, reference.guidance).stored(name in outputs)
                                evaluations[name] = stored.to(self.snapshots.device)
                        count_done()
            return list(found)

        return evaluate(parts) if self.holds_outputs or not outputs else _OneAtATime(parts, evaluate)

    def likelihoods(
        self,
        rollout: Rollout,
        decisions: Decisions,
        needs: frozenset[str] | None = None,
        references: References | None = None,
    ) -> Likelihoods:
        needs = self.reference_set.needs if needs is None else needs
        if references is None:
            # Weights are exchanged here, before the differentiable pass, and never again until its backward pass is over.
            (references,) = self.evaluate_references(rollout, decisions, [ALL], needs)
        needed, every = self.reference_set.needed_for(needs), self.reference_set.references
        # The inputs are those of the references, so that equal weights have equal ℓ.
        inputs = self.prepare(rollout, decisions, [None, *(every[name].guidance for name in references)])
        with self.using(CURRENT) as model:
            theta = model(inputs, None)
        terms = {f"references/{name}": references[name].logp for name in needed}
        for name, reference in needed.items():
            if f"divergence/{name}" not in needs:
                continue
            if reference.compares_outputs:
                other = self.restore(references[name], inputs, reference.guidance)
                terms[f"divergence/{name}"] = theta.divergence(other, reference)
            else:
                terms[f"divergence/{name}"] = theta.estimate(references[name].logp, reference)
        old = self.reference_set.old
        if "references/old" in needs and old != "recompute":
            terms["references/old"] = theta.flat["log_prob"] if old == "recorded" else theta.logp.detach()
        if "bias" in needs:
            terms["bias"] = theta.kl_from(self._get_old(theta, references, inputs))
        if "mixed/plus" in needs:
            terms["mixed/plus"], terms["mixed/minus"] = theta.mixed(self._get_old(theta, references, inputs))
        if "scale" in needs:
            terms["scale"] = theta.scale
        if (weight := theta.weight) is not None:
            terms["weight"] = weight
        shaped = {name: decisions.unflat(term) for name, term in terms.items()}
        return Likelihoods(decisions.unflat(theta.logp), decisions.mask, shaped)

    def _get_old(self, theta: E, references: References, inputs: In) -> E:
        """Return the evaluation under the weights that are old to the run (`likelihood.old`)."""
        match self.reference_set.old:
            case "recompute":
                return self.restore(references["old"], inputs, self.reference_set.references["old"].guidance)
            case "recorded":
                return theta.recorded
            case _:
                return theta.detached

    @torch.no_grad()
    def penalties(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], names: Collection[str] | None = None
    ) -> Iterator[dict[str, Penalty]]:
        """Yield k1 of every decision to every anchor outside of the loss, less its expectation if the anchor is centred.

            k1_ij − KL(sampler ‖ anchor)_ij,    KL_ij = Σ_v sampler(v) (log sampler(v) − log anchor(v))

        The expectation depends on the decisions before j alone, so E[KL_ij ∇ℓ_ij] = 0: the gradient's mean stays, and its
        variance falls (the value function of on-policy distillation: vOPD, 2605.07865).
        """
        every, recorded = self.reference_set.reward_anchors, self.reference_set.old == "recorded"
        anchors = {name: anchor for name, anchor in every.items() if names is None or name in names}
        centred = {name for name, anchor in anchors.items() if anchor.centred}
        # In the batches of the anchors: equal weights then have no distance, whatever the precision.
        sampler = {_SAMPLER: Reference(self.sampler, None, None)} if centred or not recorded else {}
        outputs = {_SAMPLER, *centred} if centred else centred
        evaluated = self._evaluate(rollout, decisions, parts, {**anchors, **sampler}, outputs)
        for (rows, columns), found in zip(parts, evaluated, strict=True):
            part, own_rollout = decisions.select(rows, columns), rollout.select(rows)
            own = self.rollout_logprobs(own_rollout, part) if recorded else part.unflat(found[_SAMPLER].logp)
            penalties = dict[str, Penalty]()
            for name in anchors:
                estimate = k1(own, part.unflat(found[name].logp))
                penalties[name] = Penalty(estimate, estimate)
            if centred:
                inputs = self.prepare(own_rollout, part, [None])
                drew = self.restore(found[_SAMPLER], inputs, None)
                for name in centred:
                    expected = part.unflat(drew.kl_to(self.restore(found[name], inputs, anchors[name].guidance)))
                    penalties[name] = Penalty(penalties[name].amount - expected, expected)
            yield penalties

    def references_equal_to_policy(self) -> list[str]:
        own, references = self.setting.value, self.reference_set.needed_for(self.reference_set.needs)
        return [
            name
            for name, r in references.items()
            if r.guidance in (None, own) and self.snapshots.is_current(r.snapshot)
        ]

    def sampler_fingerprint(self) -> Tensor:
        return self.snapshots.fingerprint(self.sampler)

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions, unlike: int = 0) -> Tensor:
        if "log_prob" in decisions.tensors:
            return decisions.tensors["log_prob"]
        rows = torch.arange(len(rollout), device=decisions.mask.device)
        missing = 2 * unlike - decisions.passes
        if missing > 0 and unlike < 2 * decisions.passes:  # copies of the first row make a batch of twice the size
            each = max(1, decisions.select(rows[:1], slice(None)).passes)
            rows = torch.cat([rows, rows[:1].expand(math.ceil(missing / each))])
        again = self.recompute_logprobs(rollout.select(rows), decisions.select(rows, slice(None)))
        return again[: len(rollout)]

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
