"""What an update does on average in the enumerable world, exactly: sums over all completions in place of samples.

A surrogate is the loss of a setting over infinitely many samples. How likely they are is a constant of it, as in training:
what is differentiated is the loss of samples that were drawn. It is made of the functions of difrl/core that training calls.
`settled` looks for the table at which its gradient vanishes: so the closed forms of enumerable_answers.py are checked, and
fixed points found that have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from difrl.core import Clipped, Likelihoods, f_divergence, get_estimator, k1
from difrl.tasks.exact.enumerable import ASK, COMPLETIONS, FIRST, LETTERS, nodes
from difrl.tasks.exact.enumerable_solutions import Array

CHOSEN = torch.tensor([[LETTERS.index(letter) for letter in text] for text in COMPLETIONS])
"""Letters of every completion, [64, 3]."""
PREFIXES = nodes(torch.cat([torch.full((len(CHOSEN), 1), ASK), CHOSEN[:, :-1] + FIRST], dim=1))
"""The row of the table that each of them is drawn from, [64, 3]."""


@dataclass(frozen=True, eq=False)
class Every:
    """Every completion of a prompt, under π (with gradient) and under the reference."""

    logits: Tensor
    """[NODES, 4]."""
    base: Tensor
    """[NODES, 4], of the reference."""
    reward: Tensor
    """[64]."""

    @property
    def full(self) -> Tensor:
        """Log-probabilities of all letters at every decision, [64, 3, 4]."""
        return self.logits.log_softmax(dim=1)[PREFIXES]

    @property
    def full_base(self) -> Tensor:
        """The same under the reference."""
        return self.base.log_softmax(dim=1)[PREFIXES]

    @property
    def logp(self) -> Tensor:
        """ℓ [64, 3] of the letters chosen."""
        return self.full.gather(2, CHOSEN[..., None])[..., 0]

    @property
    def logp_base(self) -> Tensor:
        """The same under the reference."""
        return self.full_base.gather(2, CHOSEN[..., None])[..., 0]

    def mean(self, values: Tensor) -> Tensor:
        """E_π of values [64, 3], summed over decisions; π is not differentiated."""
        return self.logp.detach().sum(dim=1).exp() @ values.sum(dim=1)

    def mean_base(self, values: Tensor) -> Tensor:
        """The same over samples of the reference."""
        return self.logp_base.sum(dim=1).exp() @ values.sum(dim=1)


Surrogate = Callable[[Every], Tensor]


def policy_gradient(every: Every, advantages: Tensor) -> Tensor:
    """The loss [64, 3] of `clipped` where θ = old, for advantages [64] or [64, 3]."""
    logp = every.logp
    lik = Likelihoods(logp, torch.ones_like(logp, dtype=torch.bool), {"references/old": logp.detach()})
    return Clipped()(lik, advantages, torch.zeros(len(logp), dtype=torch.int64))[0]


def free(every: Every) -> Tensor:
    """Nothing but the reward."""
    return every.mean(policy_gradient(every, every.reward))


def k1_of_sequences(beta: float) -> Surrogate:
    """k1 in the reward, summed over the sequence."""

    def surrogate(every: Every) -> Tensor:
        cost = k1(every.logp, every.logp_base).detach().sum(dim=1)
        return every.mean(policy_gradient(every, every.reward - beta * cost))

    return surrogate


def k1_of_tokens(beta: float) -> Surrogate:
    """k1 in the reward, each token's own alone."""

    def surrogate(every: Every) -> Tensor:
        cost = k1(every.logp, every.logp_base).detach()
        return every.mean(policy_gradient(every, every.reward[:, None] - beta * cost))

    return surrogate


def estimated(name: str, beta: float) -> Surrogate:
    """k2 or k3 as a loss."""
    of = get_estimator(name, "loss")
    return lambda every: free(every) + beta * every.mean(of(every.logp, every.logp_base))


def full(name: str, beta: float) -> Surrogate:
    """A full-vocabulary f-divergence as a loss."""
    of = f_divergence(name)
    return lambda every: free(every) + beta * every.mean(of.full(every.full, every.full_base))


def sampled(name: str, beta: float) -> Surrogate:
    """The same from the samples' own tokens."""
    of = f_divergence(name)
    return lambda every: free(every) + beta * every.mean(of.estimate_from_policy_samples(every.logp - every.logp_base))


def rehearsed(name: str, beta: float) -> Surrogate:
    """The same from the tokens of the reference's own samples, after prefixes that are the reference's too."""
    of = f_divergence(name)
    return lambda every: (
        free(every) + beta * every.mean_base(of.estimate_from_reference_samples(every.logp - every.logp_base))
    )


def divided(surrogate: Surrogate, eps: float = 1e-4) -> Surrogate:
    """With rewards that were centred and divided by their standard deviation (+ eps)."""

    def normalised(every: Every) -> Tensor:
        weights = every.logp.detach().sum(dim=1).exp()
        centred = every.reward - weights @ every.reward
        scaled = centred / ((weights @ centred.square()).sqrt() + eps)
        return surrogate(Every(every.logits, every.base, scaled))

    return normalised


def distilled(beta: float, *, summed: bool) -> Surrogate:
    """CRD from the reference on raw rewards, Δ summed over the sequence or token by token."""

    def surrogate(every: Every) -> Tensor:
        weights = every.logp.detach().sum(dim=1).exp()
        delta = every.logp - every.logp_base
        delta = delta.sum(dim=1, keepdim=True) if summed else delta
        centred = delta - weights @ delta.detach()
        return every.mean((beta * centred - (every.reward - weights @ every.reward)[:, None]).square() / (2 * beta))

    return surrogate


def gradient(surrogate: Surrogate, logits: Array, base: Array, reward: Array) -> Array:
    """Of the surrogate in the logits, [NODES, 4]; each row sums to 0."""
    table = torch.tensor(logits, requires_grad=True)
    every = Every(table, torch.from_numpy(base), torch.from_numpy(reward.ravel()))
    return np.asarray(torch.autograd.grad(surrogate(every), table)[0].numpy())


def direction(surrogate: Surrogate, logits: Array, base: Array, reward: Array) -> Array:
    """Minus the gradient of each logit over the probability of its letter being drawn at all, centred; [NODES, 4].

    It is 0 where the gradient is, and is what letters gain by it whether they are rare or not: of the reward alone,
    Q(x, a) - V(x).
    """
    log_odds = torch.from_numpy(logits).log_softmax(dim=1)
    drawn = log_odds[PREFIXES].gather(2, CHOSEN[..., None])[..., 0].sum(dim=1).exp()
    met = torch.zeros(logits.shape, dtype=torch.float64).index_put(
        (PREFIXES, CHOSEN), drawn[:, None].expand(-1, CHOSEN.shape[1]), accumulate=True
    )
    found = -gradient(surrogate, logits, base, reward) / met.numpy()
    return np.asarray(found - found.mean(axis=1, keepdims=True))


def settled(
    surrogate: Surrogate, base: Array, reward: Array, rate: float = 0.2, tolerance: float = 1e-9, limit: int = 20_000
) -> Array:
    """The table [NODES, 4] at which small updates along `direction` come to rest, from the base on.

    RuntimeError where some letter still has more than `tolerance` to gain after `limit` updates.
    """
    logits = base
    for _ in range(limit):
        step = direction(surrogate, logits, base, reward)
        if np.abs(step).max() < tolerance:
            return logits
        logits = logits + rate * step
    raise RuntimeError(
        f"some letter still gains {np.abs(step).max():.1e} after {limit} updates, expected {tolerance:.0e}"
    )
