"""Decisions evaluated under one set of weights, and the comparison of two such evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from difrl.core import LOSS_ESTIMATORS, f_divergence
from difrl.policies.references import Reference


@dataclass(frozen=True, eq=False)
class StoredEvaluation:
    """N decisions under the weights of a reference, as they are held until the micro-batch that is compared with them."""

    logp: Tensor
    """ℓ, [N], without gradient."""
    output: Tensor | None
    """The model's outputs, [N, ...], without gradient. None if only ℓ is compared."""
    head: Callable[[Tensor], Tensor] | None = None
    """The last layer under the same weights, where `output` is its input."""

    def to(self, device: torch.device | str | None) -> StoredEvaluation:
        """Return it with the outputs on a device; None leaves them where they are."""
        if device is None or self.output is None:
            return self
        return StoredEvaluation(self.logp, self.output.to(device), self.head)


@dataclass(frozen=True, eq=False)
class Evaluation(ABC):
    """N decisions under one set of weights. Results of methods are [N]. Other evaluations carry no gradient."""

    logp: Tensor
    """ℓ, [N]."""
    flat: Mapping[str, Tensor]
    """The decisions (`Decisions.flat`): name -> [N, ...]."""

    @property
    @abstractmethod
    def detached(self) -> Self:
        """The same evaluation without gradient."""

    @abstractmethod
    def stored(self, outputs: bool) -> StoredEvaluation:
        """Return ℓ, and if `outputs` all that other evaluations are compared with. It holds none of the decisions."""

    @abstractmethod
    def divergence(self, other: Self, reference: Reference) -> Tensor:
        """Return the divergence from an anchor that compares outputs: `other` is its evaluation, `reference` its definition."""

    def estimate(self, logp: Tensor, reference: Reference) -> Tensor:
        """Return the divergence from an anchor that compares ℓ alone: `logp` is the anchor's."""
        name = str(reference.divergence)
        if name in LOSS_ESTIMATORS:
            return LOSS_ESTIMATORS[name](self.logp, logp)
        divergence, delta = f_divergence(name, reference.alpha), self.logp - logp
        return (
            divergence.estimate_from_policy_samples(delta)
            if reference.samples == "own"
            else divergence.estimate_from_reference_samples(delta)
        )

    @property
    def recorded(self) -> Self:
        """The distributions that drew the decisions, as the rollout recorded them."""
        raise ValueError(
            "rollouts of this likelihood do not record the distributions that drew them; set likelihood.old: recompute and "
            "snapshots: {old: {decay: 0.0}}"
        )

    def kl_to(self, other: Self) -> Tensor:
        """Return KL(self ‖ other)."""
        raise ValueError("decisions of this likelihood have no distributions; set likelihood.kind: reverse")

    def kl_from(self, other: Self) -> Tensor:
        """Return KL(other ‖ self)."""
        return other.kl_to(self)

    def mixed(self, old: Self) -> tuple[Tensor, Tensor]:
        """Return ℓ⁺ and ℓ⁻ of the two mixtures of the weights and the old ones."""
        raise ValueError("decisions of this likelihood have no mixtures; set likelihood.kind: forward")

    @property
    def scale(self) -> Tensor:
        """Factor of log ρ + bias in ratio normalisation."""
        return torch.ones_like(self.logp)

    @property
    def weight(self) -> Tensor | None:
        """Factor of each decision's loss; None stands for 1."""
        return None


E = TypeVar("E", bound=Evaluation)
