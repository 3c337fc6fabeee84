"""References of an update: the weights that θ is compared with, and the divergence from each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from difrl.config import AnchorConfig, RunConfig
from difrl.core import LOSS_ESTIMATORS
from difrl.policies.snapshots import BASE

_REFERENCES = "references/"
_OLD_OUTPUTS = frozenset({"bias", "mixed/plus", "mixed/minus"})
_NEEDS_OLD = _OLD_OUTPUTS | {"references/old"}
"""Tensors of likelihoods that are computed from an evaluation under old weights, where it is evaluated again."""


@dataclass(frozen=True)
class Reference:
    """A snapshot or teacher under which decisions are evaluated for comparison."""

    snapshot: str
    guidance: float | None
    """Guidance scale; None for that of θ."""
    divergence: str | None
    """Name of the divergence; None if only ℓ is needed."""
    alpha: float = 0.5
    """Parameter of the alpha-divergence."""
    vocabulary: str = "full"
    """Estimate of a divergence of distributions: over the whole vocabulary (full), or from the drawn tokens (sampled)."""
    samples: str = "own"
    """Samples that it is measured on: the policy's own, or those of the rehearsal."""
    centred: bool = False
    """True for an anchor in the advantages of decisions whose k1 is taken less its expectation."""

    @property
    def compares_outputs(self) -> bool:
        """Whether its divergence compares the model's outputs, and not ℓ alone."""
        return self.divergence not in (None, "k1", *LOSS_ESTIMATORS) and self.vocabulary == "full"


@dataclass(frozen=True)
class ReferenceSet:
    """The references of a run and the terms that it reads."""

    references: Mapping[str, Reference]
    old: str
    """Source of ℓ_old: recorded, recompute (then it is one of the references) or detach."""
    needs: frozenset[str]
    """Names of the terms (`Likelihoods.terms`) that a run reads."""

    reward_anchors: Mapping[str, Reference] = field(default_factory=dict)
    """Anchors in the reward or in the advantages: recorded likelihoods are compared with them."""

    def needed_for(self, needs: frozenset[str]) -> dict[str, Reference]:
        """Return the references that must be evaluated for these terms."""

        def serves(name: str) -> set[str]:
            return {f"references/{name}", f"divergence/{name}", *(_NEEDS_OLD if name == "old" else ())}

        return {name: reference for name, reference in self.references.items() if needs & serves(name)}

    def compared_outputs(self, needs: frozenset[str]) -> set[str]:
        """Return the references whose outputs, and not ℓ alone, are compared for these terms."""
        anchors = {name for name, r in self.references.items() if r.compares_outputs and f"divergence/{name}" in needs}
        return anchors | ({"old"} if needs & _OLD_OUTPUTS else set())


def build_reference_set(config: RunConfig) -> ReferenceSet:
    """Build the reference set of a run."""
    return ReferenceSet(get_references(config), config.likelihood.old, get_needs(config), reward_anchors(config))


def get_references(config: RunConfig) -> dict[str, Reference]:
    """Return the references of a run: anchors in the loss, those of the objective, and old weights if evaluated again."""
    references = {a.label: _reference(a) for a in config.anchors if a.place == "loss" and a.is_evaluated}
    needs = config.objective.build(config.likelihood).needs
    for name in sorted(n.removeprefix(_REFERENCES) for n in needs if n.startswith(_REFERENCES)):
        if name != "old" or config.likelihood.old == "recompute":
            references.setdefault(name, Reference(name, None, None))
    return references


def _reference(anchor: AnchorConfig) -> Reference:
    return Reference(
        anchor.to,
        anchor.guidance,
        anchor.divergence,
        anchor.alpha,
        anchor.vocabulary,
        anchor.samples,
        anchor.centred,
    )


def get_needs(config: RunConfig) -> frozenset[str]:
    """Return the names of the terms (`Likelihoods.terms`) that a run reads for its own samples."""
    anchors = [a for a in config.anchors if a.place == "loss" and a.samples == "own" and a.is_evaluated]
    return config.objective.build(config.likelihood).needs | {f"divergence/{a.label}" for a in anchors}


def reward_anchors(config: RunConfig) -> dict[str, Reference]:
    """Return the anchors whose divergence is subtracted from the reward, or from the advantages of single decisions."""
    return {a.label: _reference(a) for a in config.anchors if a.place != "loss" and a.is_evaluated}


def needs_base(config: RunConfig) -> bool:
    """Return whether training evaluates the pretrained weights, or draws from them."""
    likelihood = config.likelihood
    inverted = (
        [likelihood.noise.snapshot] if likelihood.kind == "forward" and likelihood.noise.kind == "inversion" else []
    )
    compared = [r.snapshot for r in [*get_references(config).values(), *reward_anchors(config).values()]]
    return BASE in (*config.sampling_snapshots, *inverted, *compared)
