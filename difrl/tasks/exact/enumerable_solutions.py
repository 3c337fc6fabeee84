"""Exact fixed points of training on the enumerable task, in float64.

π is a distribution over the completions y of one prompt, an array [4, 4, 4] with an axis for each token. x is a prefix, a the
next letter, and Q^π(x, a) = E_π[r | x, a]. The expected update with advantages r and an anchor to ref, over samples of π, is

    E_π[ Σ_j r(y) ∇ℓ_j ] − β · (the anchor's term)

A fixed point is a π at which this is 0. With a free logit after each prefix it must be 0 prefix by prefix. A constant after a
prefix never counts, because E_π[∇ℓ_j | x] = 0. The reward's term is Σ_a π(a|x) Q^π(x, a) ∇ log π(a|x). The anchor's term:

* **k1 in the reward, of the sequence** (r − β Σ_j k1_j in place of r). The gradient of J = E_π[r] − β KL(π ‖ ref), which is
  concave in π with its only maximum at π* ∝ ref exp(r/β). At π* the reward minus its penalty is the same number for every
  sample, so advantages are 0 whatever they are divided by: a standard deviation changes the path but not the fixed point.
* **k1 in the reward, of the token alone** (ℓ_j is weighted by r − β k1_j). E[k1_j ∇ℓ_j]: after each prefix
  Q^π(x, a) − β log(π(a|x) / ref(a|x)) is constant, and π(a|x) ∝ ref(a|x) exp(Q^π(x, a) / β): *token-wise*. Q^π is the mean
  reward of the continuations, where π* has the soft maximum β log E_ref[exp(r/β) | x, a]: the effect of a token on later
  penalties is left out.
* **k1 as a loss.** E[∇ℓ_j] = 0: it adds nothing, and recipes with it are rejected.
* **k2 as a loss.** ∇k2 = k1_j ∇ℓ_j, as k1 of the token alone. Full-vocabulary **reverse KL** as a loss: the same, noise apart.
* **a full-vocabulary f-divergence as a loss.** Σ_a π(a|x) f'(u_a) ∇ log π(a|x), u = π/ref: after each prefix Q^π − β f'(u) is
  constant, the condition for π(·|x) to maximise Σ_a π(a|x) Q^π(x, a) − β D_f(π(·|x) ‖ ref(·|x)) with the later policy held fixed.
  **k3 as a loss** has the gradient of forward KL, f' = 1 − 1/u: u = β / (λ − Q^π).
* **an f-divergence from whole sequences of the reference.** The gradient of E_π[r] − β KL(ref ‖ π), for forward KL (the chain
  rule makes of the tokens a sequence): u(y) = β / (λ − r(y)): *sequence-wise*.
* **advantages divided by a standard deviation**, with an anchor in the loss: the reward's term is divided and the anchor's is
  not. The same fixed points with β (σ + ε) in place of β, where σ is the standard deviation of r at the fixed point itself.
* **CRD on the sum of Δ = ℓ − ℓ_ref** against raw rewards, both centred: 0 for every sample at π*. **Token by token** it
  is β Δ_j − r squared, whose gradient E[(β Δ_j − r) ∇ℓ_j] is k2's: token-wise.
* **CRD with an old policy that moves**, and no anchor: each time it converges it has tilted by another exp(r/β). After n rounds
  it is at the tilt of β/n, and it ends at the argmax. Training without any anchor ends at the argmax too.

When prefixes are visited from the last to the first, every Q^π is known when its prefix is reached. Token-wise solutions
therefore take one pass over the tree, and only λ needs iteration. difrl/tasks/exact/enumerable_updates.py has the updates
themselves, and the tests find their zeros at these solutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, rel_entr

Array = np.ndarray


class Derivative(NamedTuple):
    """f' of a divergence, with f'(1) = 0 (difrl/core/f_divergences.py), and its inverse."""

    value: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {
        "reverse_kl": Derivative(np.log, np.exp),
        "forward_kl": Derivative(lambda u: 1 - 1 / u, lambda s: 1 / (1 - s)),
        "jensen_shannon": Derivative(lambda u: np.log(2 * u / (1 + u)), lambda s: np.exp(s) / (2 - np.exp(s))),
        "alpha": Derivative(lambda u: 2 - 2 * u**-0.5, lambda s: (1 - s / 2) ** -2.0),
        "hellinger": Derivative(lambda u: (1 - u**-0.5) / 2, lambda s: (1 - 2 * s) ** -2.0),
        "chi_squared": Derivative(lambda u: 2 * (u - 1), lambda s: np.maximum(1 + s / 2, 0.0)),
    }
)
"""f' of each divergence, alpha at 1/2. Total variation is missing: its f' is ±1/2, so it has no solution in the interior."""


def joint(conditionals: list[Array]) -> Array:
    """Return π(y) = Π_j π(y_j | y_<j) for arrays [4], [4, 4], [4, 4, 4]."""
    product = np.ones(())
    for conditional in conditionals:
        product = product[..., None] * conditional
    return product


def conditionals(probabilities: Array) -> list[Array]:
    """Return the conditional distributions of each token, the inverse of `joint`."""
    marginals = [probabilities]
    while marginals[0].ndim > 1:
        marginals.insert(0, marginals[0].sum(axis=-1))
    return [marginal / marginal.sum(axis=-1, keepdims=True) for marginal in marginals]


def completion_probabilities(logits: Array) -> Array:
    """Return π [4, 4, 4] for a table of logits [NODES, 4], whose rows are the prefixes, level by level."""
    levels: list[Array] = []
    start = 0
    while start < len(logits):
        shape = (logits.shape[1],) * (len(levels) + 1)
        level = logits[start : start + math.prod(shape[:-1])].reshape(shape)
        levels.append(np.exp(level - logsumexp(level, axis=-1, keepdims=True)))
        start += math.prod(shape[:-1])
    return joint(levels)


def kl(p: Array, q: Array) -> float:
    """Return KL(p ‖ q) in nats."""
    return float(rel_entr(p, q).sum())


def std(probabilities: Array, reward: Array) -> float:
    """Return the standard deviation of the reward under the distribution."""
    mean = (probabilities * reward).sum()
    return float(np.sqrt((probabilities * (reward - mean) ** 2).sum()))


def exponential_tilt(reference: Array, reward: Array, beta: float) -> Array:
    """Return π* ∝ ref exp(r/β), which maximises E[r] − β KL(π ‖ ref)."""
    logits = np.log(reference) + reward / beta
    return np.asarray(np.exp(logits - logsumexp(logits)))


def regularised_argmax(reference: Array, value: Array, beta: float, divergence: str) -> Array:
    """Return argmax_p Σ p value − β D_f(p ‖ reference) for arrays [V].

    The solution is p = reference · (f')⁻¹((value − λ) / β), with λ such that p sums to 1.
    """
    derivative = DERIVATIVES[divergence]

    def excess(level: float) -> float:
        return float((reference * derivative.inverse((value - level) / beta)).sum()) - 1

    # λ is at most the highest value, at which no ratio exceeds 1. It is at least the level at which one element alone has
    # probability 1. The margin is for rounding, when λ equals one of the bounds.
    low, high = float((value - beta * derivative.value(1 / reference)).max()), float(value.max())
    level = brentq(excess, low - 1e-12 * beta, high + 1e-12 * beta, xtol=1e-15, rtol=1e-14)
    p = reference * derivative.inverse((value - level) / beta)
    return np.asarray(p / p.sum())


def solve_token_wise(reference: Array, reward: Array, beta: float, divergence: str = "reverse_kl") -> Array:
    """Return the π that maximises, after each prefix, the mean reward of the continuations minus β times the divergence."""
    solved: list[Array] = []
    value = reward
    for conditional in reversed(conditionals(reference)):
        rows = zip(conditional.reshape(-1, value.shape[-1]), value.reshape(-1, value.shape[-1]), strict=True)
        policy = np.array([regularised_argmax(ref, q, beta, divergence) for ref, q in rows]).reshape(value.shape)
        solved.insert(0, policy)
        value = (policy * value).sum(axis=-1)
    return joint(solved)


def solve_sequence_wise(reference: Array, reward: Array, beta: float, divergence: str) -> Array:
    """Return argmax_π E_π[r] − β D_f(π ‖ ref) over distributions of whole completions. For reverse KL this is π*."""
    return regularised_argmax(reference.ravel(), reward.ravel(), beta, divergence).reshape(reward.shape)


def solve_with_std(solve: Callable[[float], Array], reward: Array, coefficient: float, eps: float = 1e-4) -> Array:
    """Return the fixed point for advantages that are divided by σ + ε.

    It is solve(β) at β = coefficient · (σ + ε), with σ the standard deviation of r under that solution. Of several such σ the
    largest is used, because training that begins at the base model reaches it first. A smaller one may exist on the way to a
    single completion, at which σ and the coefficient vanish together. ValueError if the coefficient is too small for any.
    """

    def excess(sigma: float) -> float:
        return std(solve(coefficient * (sigma + eps)), reward) - sigma

    # Rewards in an interval of width w have σ ≤ w / 2, so the excess is not positive there.
    grid = np.linspace(0.5, 0.0, 64, endpoint=False) * float(reward.max() - reward.min())
    for low, high in zip(grid[1:], grid, strict=False):
        if excess(low) > 0:
            return solve(coefficient * (brentq(excess, low, high, xtol=1e-13) + eps))
    raise ValueError(
        f"no fixed point with a coefficient of {coefficient} once advantages are divided by σ; expected a larger one"
    )
