"""The loss of a step from the losses of elements: penalties of anchors, weights of decisions, and the mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from difrl.core.likelihoods import Likelihoods

Aggregation = Literal["decision", "sample", "length"]


def anchor_penalty(lik: Likelihoods, coefficients: Mapping[str, float | Tensor]) -> Tensor:
    """Return sum_a c_a D_a over anchors a, [B, J]: the part of the loss that anchors add. Zeros without anchors.

    Args:
      lik: with the terms "divergence/NAME" of the anchors.
      coefficients: anchor name -> one number, or one a sample [B] (reward-adaptive), detached.
    """
    total = torch.zeros_like(lik.logp)
    for name, coefficient in coefficients.items():
        factor = torch.as_tensor(coefficient, dtype=lik.logp.dtype, device=lik.logp.device)
        total = total + factor.reshape(-1, 1) * lik[f"divergence/{name}"]
    return total


def aggregation_weights(mask: Tensor, per: Aggregation = "decision") -> tuple[Tensor, Tensor]:
    """Return (weights [B, J], count): the weight of each decision, and the divisor of the sum over the whole step.

                   weight               count
      "decision":  m_ij                 sum_ij m_ij                    equal weight of decisions (DAPO, 2503.14476)
      "sample":    m_ij / sum_j m_ij    number of unmasked samples     equal weight of samples (GRPO, 2402.03300)
      "length":    m_ij                 that number times J            J the maximum length (Dr.GRPO, 2503.20783)

    Counts of minibatches add up; J is the same in all of them.
    """
    weights, samples = mask.to(torch.float32), mask.any(dim=1).sum()
    if per == "decision":
        return weights, mask.sum()
    if per == "sample":
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0), samples
    if per == "length":
        return weights, samples * mask.shape[1]
    raise ValueError(f"aggregation is {per!r}, expected 'decision', 'sample' or 'length'")


def weighted_mean(values: Tensor, weights: Tensor, count: float | Tensor) -> Tensor:
    """Return sum_ij w_ij v_ij / count, a scalar: the reduction of losses and of metrics.

    Args:
      values: [B, J].
      weights: [B, J], a bool mask or from `aggregation_weights`. Values with weight 0 have no effect.
      count: the divisor for *all* micro-batches and processes of the step. So the sum of their results (and of their
        gradients) is the mean over the step, however it was split.
    """
    if weights.shape != values.shape:
        raise ValueError(f"weights have shape {list(weights.shape)}, expected {list(values.shape)} as the values have")
    return torch.where(weights != 0, values * weights, 0.0).sum() / count
