"""The distances of denoised decisions to an anchor, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from difrl.core import get_estimator, velocity
from difrl.policies.diffusion.likelihoods import Evaluation

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
    "k2": lambda theta, reference: get_estimator("k2", "loss")(theta.logp, reference.logp),
    "k3": lambda theta, reference: get_estimator("k3", "loss")(theta.logp, reference.logp),
}
