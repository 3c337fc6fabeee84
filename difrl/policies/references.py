"""What θ is compared with when decisions are evaluated: snapshots, guided or not, and the distance to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from difrl.config import AnchorConfig, RunConfig
from difrl.core import Objective

_REFERENCES = "references/"
_NEEDS_OLD = frozenset({"references/old", "bias", "mixed/plus", "mixed/minus"})
"""Tensors of likelihoods that are computed from an evaluation under old weights, where it is evaluated again."""


@dataclass(frozen=True)
class Reference:
    """Weights under which decisions are evaluated for comparison."""

    snapshot: str
    guidance: float | None
    """None: as θ itself is evaluated."""
    divergence: str | None
    """None: only ℓ is wanted."""
    alpha: float = 0.5
    """Of the alpha-divergence."""
    vocabulary: str = "full"
    """Of a divergence of distributions: in full, or from the element that was drawn (sampled)."""
    samples: str = "own"
    """Whose samples it is measured on: θ's, or those of a rehearsal."""
    centred: bool = False
    """Of an anchor that charges decisions: whether k1 is taken less its expectation."""


@dataclass(frozen=True)
class ReferenceSet:
    """What θ is compared with when decisions are evaluated."""

    references: Mapping[str, Reference]
    old: str
    """Where ℓ_old comes from: recorded, recompute (then it is one of the references) or detach."""
    needs: frozenset[str]
    """What a run reads of its likelihoods, by the names of `Likelihoods.terms`."""

    reward_anchors: Mapping[str, Reference] = field(default_factory=dict)
    """What recorded likelihoods are compared with, for the reward."""

    def needed_for(self, needs: frozenset[str]) -> dict[str, Reference]:
        """The references that must be evaluated for these."""

        def serves(name: str) -> set[str]:
            return {f"references/{name}", f"divergence/{name}", *(_NEEDS_OLD if name == "old" else ())}

        return {name: reference for name, reference in self.references.items() if needs & serves(name)}


def get_references(config: RunConfig) -> dict[str, Reference]:
    """Everything θ is compared with: anchors, the objective's references, and old weights where evaluated again."""
    references = {a.label: _reference(a) for a in config.anchors if a.place == "loss"}
    for name in sorted(get_references_read(config.objective.build(config.likelihood))):
        if name != "old" or config.likelihood.old == "recompute":
            references.setdefault(name, Reference(name, None, None))
    return references


def get_references_read(objective: Objective) -> set[str]:
    """The names of the references that the objective reads, "old" among them where it does."""
    return {name.removeprefix(_REFERENCES) for name in objective.needs if name.startswith(_REFERENCES)}


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
    """What a run reads of its likelihoods, by the names of `Likelihoods.terms`."""
    return config.objective.build(config.likelihood).needs | _measured(config, "own")


def get_rehearsal_needs(config: RunConfig) -> frozenset[str]:
    """What is read of the likelihoods of rehearsed samples."""
    return frozenset(_measured(config, "rehearsal"))


def _measured(config: RunConfig, samples: str) -> set[str]:
    return {f"divergence/{a.label}" for a in config.anchors if a.place == "loss" and a.samples == samples}


def reward_anchors(config: RunConfig) -> dict[str, Reference]:
    """Anchors whose divergence is taken off the reward, or off the advantages of single decisions."""
    return {a.label: _reference(a) for a in config.anchors if a.place != "loss"}


def snapshots_used(config: RunConfig) -> set[str]:
    """The snapshots and teachers that training evaluates for comparison."""
    return {r.snapshot for r in [*get_references(config).values(), *reward_anchors(config).values()]}
