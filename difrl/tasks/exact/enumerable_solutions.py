"""Where training ends in the enumerable world: the exact fixed points, in float64.

π is a distribution over the completions y of one prompt, an array [4, 4, 4] with an axis for each token; x is a prefix, a the
next letter, Q^π(x, a) = E_π[r | x, a]. An update with advantages r and an anchor to ref goes, on average over samples of π, along

    E_π[ Σ_j r(y) ∇ℓ_j ] − β · (what the anchor adds)

and a setting is at rest where this is 0. With a free logit after each prefix it must be 0 prefix by prefix, and a constant
after a prefix never counts, since E_π[∇ℓ_j | x] = 0. The reward's part is Σ_a π(a|x) Q^π(x, a) ∇ log π(a|x) there. What the
anchor adds:

* **k1 in the reward, of the sequence** (r − β Σ_j k1_j in place of r). The gradient of J = E_π[r] − β KL(π ‖ ref), which is
  concave in π with its only maximum at π* ∝ ref exp(r/β). At π* every sample's reward less its penalty is the same
  number, so advantages are 0 whatever they are divided by: a standard deviation changes the way and not the end.
* **k1 in the reward, of the token alone** (ℓ_j is weighed by r − β k1_j). E[k1_j ∇ℓ_j]: after each prefix
  Q^π(x, a) − β log(π(a|x) / ref(a|x)) is constant, and π(a|x) ∝ ref(a|x) exp(Q^π(x, a) / β): *token-wise*. Q^π is the mean
  reward of what follows, where π* has the soft maximum β log E_ref[exp(r/β) | x, a]: what a token does to later penalties is
  left out.
* **k1 as a loss.** E[∇ℓ_j] = 0: adds nothing, and is refused.
* **k2 as a loss.** ∇k2 = k1_j ∇ℓ_j, as k1 of the token alone. Full-vocabulary **reverse KL** as a loss: the same but for noise.
* **a full-vocabulary f-divergence as a loss.** Σ_a π(a|x) f'(u_a) ∇ log π(a|x), u = π/ref: after each prefix Q^π − β f'(u) is
  constant, the condition for π(·|x) to maximise Σ_a π(a|x) Q^π(x, a) − β D_f(π(·|x) ‖ ref(·|x)) with the later policy held fixed.
  **k3 as a loss** has the gradient of forward KL, f' = 1 − 1/u: u = β / (λ − Q^π).
* **an f-divergence from whole sequences of the reference.** The gradient of E_π[r] − β KL(ref ‖ π), for forward KL (the chain
  rule makes of the tokens a sequence): u(y) = β / (λ − r(y)): *sequence-wise*.
* **advantages divided by a standard deviation**, with an anchor in the loss: the reward's part is divided and the anchor's is
  not. The same fixed points with β (σ + ε) in place of β, σ = that of r at the fixed point itself.
* **CRD on the sum of Δ = ℓ − ℓ_ref** against raw rewards, both centred: 0 for every sample at π*. **Token by token** it
  is β Δ_j − r squared, whose gradient E[(β Δ_j − r) ∇ℓ_j] is k2's: token-wise.
* **CRD with an old that moves**, and no anchor: each time it settles it has tilted by another exp(r/β), so after n of them
  it is at the tilt of β/n, and ends at the argmax. Nothing at all to hold it: the argmax too.

Last prefixes first, every Q^π is known when its prefix is reached: token-wise answers are one pass over the tree, with no
iteration but for λ. `enumerable_updates.py` has the updates themselves; the tests find these zeros of theirs.
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


class Slope(NamedTuple):
    """f' of a divergence, f'(1) = 0 (difrl/core/f_divergences.py), and its inverse."""

    value: Callable[[Array], Array]
    ratio: Callable[[Array], Array]


SLOPES: Mapping[str, Slope] = MappingProxyType(
    {
        "reverse_kl": Slope(np.log, np.exp),
        "forward_kl": Slope(lambda u: 1 - 1 / u, lambda s: 1 / (1 - s)),
        "jensen_shannon": Slope(lambda u: np.log(2 * u / (1 + u)), lambda s: np.exp(s) / (2 - np.exp(s))),
        "alpha": Slope(lambda u: 2 - 2 * u**-0.5, lambda s: (1 - s / 2) ** -2.0),
        "hellinger": Slope(lambda u: (1 - u**-0.5) / 2, lambda s: (1 - 2 * s) ** -2.0),
        "chi_squared": Slope(lambda u: 2 * (u - 1), lambda s: np.maximum(1 + s / 2, 0.0)),
    }
)
"""alpha = 1/2. Total variation has no answer inside: π gains either nothing, or all that its f' of ±1/2 does not pay for."""


def joint(conditionals: list[Array]) -> Array:
    """π(y) = Π_j π(y_j | y_<j) from arrays [4], [4, 4], [4, 4, 4]."""
    found = np.ones(())
    for conditional in conditionals:
        found = found[..., None] * conditional
    return found


def conditionals(probabilities: Array) -> list[Array]:
    """The inverse of `joint`."""
    marginals = [probabilities]
    while marginals[0].ndim > 1:
        marginals.insert(0, marginals[0].sum(axis=-1))
    return [marginal / marginal.sum(axis=-1, keepdims=True) for marginal in marginals]


def generated(logits: Array) -> Array:
    """π of a table of logits [NODES, 4], whose rows are the prefixes, level by level."""
    found: list[Array] = []
    start = 0
    while start < len(logits):
        shape = (logits.shape[1],) * (len(found) + 1)
        level = logits[start : start + math.prod(shape[:-1])].reshape(shape)
        found.append(np.exp(level - logsumexp(level, axis=-1, keepdims=True)))
        start += math.prod(shape[:-1])
    return joint(found)


def kl(one: Array, other: Array) -> float:
    """KL(one ‖ other)."""
    return float(rel_entr(one, other).sum())


def std(probabilities: Array, reward: Array) -> float:
    """Standard deviation of the reward over samples, of infinitely many."""
    mean = (probabilities * reward).sum()
    return float(np.sqrt((probabilities * (reward - mean) ** 2).sum()))


def tilted(reference: Array, reward: Array, beta: float) -> Array:
    """π* ∝ ref exp(r/β), the maximum of E[r] − β KL(π ‖ ref)."""
    logits = np.log(reference) + reward / beta
    return np.asarray(np.exp(logits - logsumexp(logits)))


def best(reference: Array, value: Array, beta: float, divergence: str) -> Array:
    """argmax_p Σ p value − β D_f(p ‖ reference), [V] each: p = reference · (f')⁻¹((value − λ) / β), λ such that it sums to 1."""
    slope = SLOPES[divergence]

    def excess(level: float) -> float:
        return float((reference * slope.ratio((value - level) / beta)).sum()) - 1

    # λ is at most the highest value, where no ratio is above 1, and at least where one element has all there is. The margin is
    # for rounding, where these are λ itself.
    low, high = float((value - beta * slope.value(1 / reference)).max()), float(value.max())
    level = brentq(excess, low - 1e-12 * beta, high + 1e-12 * beta, xtol=1e-15, rtol=1e-14)
    found = reference * slope.ratio((value - level) / beta)
    return np.asarray(found / found.sum())


def token_wise(reference: Array, reward: Array, beta: float, divergence: str = "reverse_kl") -> Array:
    """After each prefix the best for the mean reward of what follows, last prefixes first."""
    found: list[Array] = []
    value = reward
    for conditional in reversed(conditionals(reference)):
        rows = zip(conditional.reshape(-1, value.shape[-1]), value.reshape(-1, value.shape[-1]), strict=True)
        chosen = np.array([best(ref, q, beta, divergence) for ref, q in rows]).reshape(value.shape)
        found.insert(0, chosen)
        value = (chosen * value).sum(axis=-1)
    return joint(found)


def sequence_wise(reference: Array, reward: Array, beta: float, divergence: str) -> Array:
    """argmax of E_π[r] − β D_f(π ‖ ref) over distributions of whole completions; of reverse KL, π*."""
    return best(reference.ravel(), reward.ravel(), beta, divergence).reshape(reward.shape)


def with_std(answer: Callable[[float], Array], reward: Array, coefficient: float, eps: float = 1e-4) -> Array:
    """Where advantages are divided by σ + ε: answer(β) at β = coefficient · (σ + ε), σ that of r under the answer itself.

    The largest such σ, which training that begins at the base model meets first: below it may be another, on the way to one
    completion alone, where σ and the coefficient vanish together. ValueError: a coefficient too small to hold anything.
    """

    def excess(sigma: float) -> float:
        return std(answer(coefficient * (sigma + eps)), reward) - sigma

    # A reward in an interval of width w has σ ≤ w / 2, so that the excess is not positive there.
    grid = np.linspace(0.5, 0.0, 64, endpoint=False) * float(reward.max() - reward.min())
    for low, high in zip(grid[1:], grid, strict=False):
        if excess(low) > 0:
            return answer(coefficient * (brentq(excess, low, high, xtol=1e-13) + eps))
    raise ValueError(
        f"a coefficient of {coefficient} holds nothing once advantages are divided by σ; expected a larger one"
    )
