"""Expected updates on the enumerable task, exactly: sums over all completions in place of samples.

A surrogate is the loss of a setting over infinitely many samples. The probabilities of the samples are constants in it, as in
training, where the loss of samples that were already drawn is differentiated. Surrogates are built from the functions of
difrl/core that training calls. `find_fixed_point` searches for the table at which the gradient vanishes. It checks the
closed forms of difrl/tasks/exact/enumerable_solutions.py, and finds fixed points that have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from difrl.core import LOSS_ESTIMATORS, Clipped, Likelihoods, f_divergence, k1
from difrl.tasks.exact.enumerable import ASK_ID, COMPLETIONS, FIRST_LETTER_ID, LETTERS, table_rows
from difrl.tasks.exact.enumerable_solutions import Array

LETTER_IDS = torch.tensor([[LETTERS.index(letter) for letter in text] for text in COMPLETIONS])
"""Index of each letter of every completion, [64, 3]."""
PREFIX_ROWS = table_rows(
    torch.cat([torch.full((len(LETTER_IDS), 1), ASK_ID), LETTER_IDS[:, :-1] + FIRST_LETTER_ID], dim=1)
)
"""Row of the table from which each letter is drawn, [64, 3]."""


@dataclass(frozen=True, eq=False)
class AllCompletions:
    """All completions of a prompt, under π (with gradient) and under the reference."""

    logits: Tensor
    """Table of π, [NODES, 4]."""
    reference_logits: Tensor
    """Table of the reference, [NODES, 4]."""
    reward: Tensor
    """Reward of every completion, [64]."""

    @property
    def letter_logps(self) -> Tensor:
        """Log-probabilities of all letters at every decision, [64, 3, 4]."""
        return self.logits.log_softmax(dim=1)[PREFIX_ROWS]

    @property
    def reference_letter_logps(self) -> Tensor:
        """Log-probabilities of all letters under the reference, [64, 3, 4]."""
        return self.reference_logits.log_softmax(dim=1)[PREFIX_ROWS]

    @property
    def logp(self) -> Tensor:
        """ℓ [64, 3] of the completions' own letters."""
        return self.letter_logps.gather(2, LETTER_IDS[..., None])[..., 0]

    @property
    def reference_logp(self) -> Tensor:
        """ℓ [64, 3] of the completions' own letters under the reference."""
        return self.reference_letter_logps.gather(2, LETTER_IDS[..., None])[..., 0]

    @property
    def delta(self) -> Tensor:
        """Δ = ℓ − ℓ_reference, [64, 3]."""
        return self.logp - self.reference_logp

    @property
    def probabilities(self) -> Tensor:
        """π(y) of every completion [64], detached."""
        return self.logp.detach().sum(dim=1).exp()

    def expectation(self, values: Tensor) -> Tensor:
        """Return E_π of values [64, J], summed over decisions. π is not differentiated."""
        return self.probabilities @ values.sum(dim=1)

    def reference_expectation(self, values: Tensor) -> Tensor:
        """Return the expectation of values [64, J] under the reference, summed over decisions."""
        return self.reference_logp.sum(dim=1).exp() @ values.sum(dim=1)

    def centre(self, values: Tensor) -> Tensor:
        """Subtract the mean under π, which is not differentiated, from values [64, ...]."""
        return values - self.probabilities @ values.detach()


Surrogate = Callable[[AllCompletions], Tensor]


def policy_gradient(completions: AllCompletions, advantages: Tensor) -> Tensor:
    """Return the loss [64, 3] of `Clipped` at θ = old, for advantages [64] or [64, 3]."""
    logp = completions.logp
    lik = Likelihoods(logp, torch.ones_like(logp, dtype=torch.bool), {"references/old": logp.detach()})
    return Clipped()(lik, advantages, torch.zeros(len(logp), dtype=torch.int64))[0]


def reward_only(completions: AllCompletions) -> Tensor:
    """Return the loss without any anchor."""
    return completions.expectation(policy_gradient(completions, completions.reward))


def sequence_k1_in_reward(beta: float) -> Surrogate:
    """Return the surrogate with k1 in the reward, summed over the sequence."""

    def surrogate(completions: AllCompletions) -> Tensor:
        cost = k1(completions.logp, completions.reference_logp).detach().sum(dim=1)
        return completions.expectation(policy_gradient(completions, completions.reward - beta * cost))

    return surrogate


def token_k1_in_reward(beta: float) -> Surrogate:
    """Return the surrogate with k1 in the reward, for each token its own alone."""

    def surrogate(completions: AllCompletions) -> Tensor:
        cost = k1(completions.logp, completions.reference_logp).detach()
        return completions.expectation(policy_gradient(completions, completions.reward[:, None] - beta * cost))

    return surrogate


def kl_estimator_loss(name: str, beta: float) -> Surrogate:
    """Return the surrogate with k2 or k3 as a loss."""

    def surrogate(completions: AllCompletions) -> Tensor:
        cost = LOSS_ESTIMATORS[name](completions.logp, completions.reference_logp)
        return reward_only(completions) + beta * completions.expectation(cost)

    return surrogate


def divergence_loss(name: str, beta: float) -> Surrogate:
    """Return the surrogate with a full-vocabulary f-divergence as a loss."""

    def surrogate(completions: AllCompletions) -> Tensor:
        cost = f_divergence(name).full(completions.letter_logps, completions.reference_letter_logps)
        return reward_only(completions) + beta * completions.expectation(cost)

    return surrogate


def sampled_divergence_loss(name: str, beta: float) -> Surrogate:
    """Return the surrogate with an f-divergence as a loss, estimated from the samples' own tokens."""

    def surrogate(completions: AllCompletions) -> Tensor:
        cost = f_divergence(name).estimate_from_policy_samples(completions.delta)
        return reward_only(completions) + beta * completions.expectation(cost)

    return surrogate


def reference_divergence_loss(name: str, beta: float) -> Surrogate:
    """Return the surrogate with an f-divergence as a loss, estimated from whole completions of the reference."""

    def surrogate(completions: AllCompletions) -> Tensor:
        cost = f_divergence(name).estimate_from_reference_samples(completions.delta)
        return reward_only(completions) + beta * completions.reference_expectation(cost)

    return surrogate


def divide_by_std(surrogate: Surrogate, eps: float = 1e-4) -> Surrogate:
    """Return the surrogate for rewards that are centred and divided by their standard deviation (+ eps)."""

    def normalised(completions: AllCompletions) -> Tensor:
        centred = completions.centre(completions.reward)
        std = (completions.probabilities @ centred.square()).sqrt()
        return surrogate(replace(completions, reward=centred / (std + eps)))

    return normalised


def centred_distillation(beta: float, *, summed: bool) -> Surrogate:
    """Return the surrogate of CRD from the reference on raw rewards, Δ summed over the sequence or token by token."""

    def surrogate(completions: AllCompletions) -> Tensor:
        delta = completions.delta.sum(dim=1, keepdim=True) if summed else completions.delta
        residual = beta * completions.centre(delta) - completions.centre(completions.reward)[:, None]
        return completions.expectation(residual.square() / (2 * beta))

    return surrogate


def gradient(surrogate: Surrogate, logits: Array, reference_logits: Array, reward: Array) -> Array:
    """Return the gradient of the surrogate with respect to the logits, [NODES, 4]. Each row sums to 0."""
    table = torch.tensor(logits, requires_grad=True)
    completions = AllCompletions(table, torch.from_numpy(reference_logits), torch.from_numpy(reward.ravel()))
    return np.asarray(torch.autograd.grad(surrogate(completions), table)[0].numpy())


def direction(surrogate: Surrogate, logits: Array, reference_logits: Array, reward: Array) -> Array:
    """Return minus the gradient of each logit over the probability that its letter is drawn, centred by row: [NODES, 4].

    It vanishes where the gradient does, but rare letters count as much as frequent ones. For the reward alone it is
    Q(x, a) − V(x).
    """
    logps = torch.from_numpy(logits).log_softmax(dim=1)
    probabilities = logps[PREFIX_ROWS].gather(2, LETTER_IDS[..., None])[..., 0].sum(dim=1).exp()
    drawn = torch.zeros(logits.shape, dtype=torch.float64).index_put(
        (PREFIX_ROWS, LETTER_IDS), probabilities[:, None].expand(-1, LETTER_IDS.shape[1]), accumulate=True
    )
    ascent = -gradient(surrogate, logits, reference_logits, reward) / drawn.numpy()
    return np.asarray(ascent - ascent.mean(axis=1, keepdims=True))


def find_fixed_point(
    surrogate: Surrogate,
    reference_logits: Array,
    reward: Array,
    rate: float = 0.2,
    tolerance: float = 1e-9,
    limit: int = 20_000,
) -> Array:
    """Return the table [NODES, 4] to which small updates along `direction` converge from the reference.

    RuntimeError if some letter still has more than `tolerance` to gain after `limit` updates.
    """
    logits = reference_logits
    for _ in range(limit):
        step = direction(surrogate, logits, reference_logits, reward)
        if np.abs(step).max() < tolerance:
            return logits
        logits = logits + rate * step
    raise RuntimeError(
        f"some letter still gains {np.abs(step).max():.1e} after {limit} updates, expected {tolerance:.0e}"
    )
