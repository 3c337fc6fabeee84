"""Decisions evaluated under one set of weights, and the comparison of two such evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from difrl.policies.references import Reference


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
    def divergence(self, other: Self, reference: Reference) -> Tensor:
        """Return the divergence from an anchor: `other` is its evaluation, `reference` its definition."""

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


def get_old(source: str, theta: E, others: Mapping[str, E]) -> E:
    """Return the evaluation under the weights that are old to a run.

    Args:
      source: `likelihood.old`.
      theta: the evaluation under the weights that are trained.
      others: those of the references by name, "old" among them if `source` is "recompute".
    """
    match source:
        case "recompute":
            return others["old"]
        case "recorded":
            return theta.recorded
        case _:
            return theta.detached
