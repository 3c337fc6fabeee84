"""What θ is compared with when decisions are evaluated: snapshots, guided or not, and the distance to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from difrl.core import estimator, velocity
from difrl.policies.likelihoods import Evaluation
from difrl.policies.old import READERS


@dataclass(frozen=True)
class Reference:
    """Weights under which decisions are evaluated for comparison."""

    snapshot: str
    guidance: float | None
    """None: as θ itself is evaluated."""
    divergence: str | None
    """None: only ℓ is wanted."""


Divergence = Callable[[Evaluation, Evaluation], Tensor]


def _velocity(theta: Evaluation, reference: Evaluation) -> Tensor:
    return velocity(theta.output, reference.output)


def _gaussian(theta: Evaluation, reference: Evaluation) -> Tensor:
    assert theta.transition is not None
    assert reference.transition is not None
    return theta.transition.kl(reference.transition, theta.reduce)


def _weighted(theta: Evaluation, reference: Evaluation) -> Tensor:
    assert theta.gap is not None
    return theta.gap(reference.output)


DIVERGENCES: Mapping[str, Divergence] = {
    "velocity": _velocity,
    "weighted": _weighted,
    "gaussian": _gaussian,
    "k2": lambda theta, reference: estimator("k2", "loss")(theta.logp, reference.logp),
    "k3": lambda theta, reference: estimator("k3", "loss")(theta.logp, reference.logp),
}


@dataclass(frozen=True)
class Comparison:
    """What θ is compared with when decisions are evaluated."""

    references: Mapping[str, Reference]
    old: str
    """Where ℓ_old comes from: recorded, recompute (then it is one of the references) or detach."""
    needs: frozenset[str]
    """What a run reads of its likelihoods, in the words of `Likelihoods.tensors`."""

    in_reward: Mapping[str, Reference] = field(default_factory=dict)
    """What recorded likelihoods are compared with, for the reward."""

    def wanted(self, needs: frozenset[str]) -> dict[str, Reference]:
        """The references that must be evaluated for these."""

        def serves(name: str) -> set[str]:
            return {f"references/{name}", f"divergence/{name}", *(READERS if name == "old" else ())}

        return {name: reference for name, reference in self.references.items() if needs & serves(name)}
