"""What one set of weights says of N tokens, and how far that is from what another says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from difrl.core import f_divergence, get_estimator
from difrl.policies.language.lm_head import ChunkedLogits
from difrl.policies.references import Reference


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """The N tokens' ℓ, and the distributions they were chosen from."""

    logp: Tensor
    """[N]."""
    distributions: ChunkedLogits

    @property
    def detached(self) -> TokenLogprobs:
        tokens = self.distributions
        fixed = ChunkedLogits(tokens.hidden.detach(), tokens.head, tokens.temperature, tokens.chunk)
        return TokenLogprobs(self.logp.detach(), fixed)


Distance = Callable[[TokenLogprobs, TokenLogprobs], Tensor]
"""(θ, reference) → [N], with gradient in θ."""


def distance(reference: Reference) -> Distance:
    """The distance of an anchor: an estimate from the tokens that were drawn, or of their whole distributions."""
    name = str(reference.divergence)
    if name in ESTIMATES:
        return ESTIMATES[name]
    return VOCABULARY[reference.vocabulary, reference.samples](name, reference.alpha)


def _estimate(name: str) -> Distance:
    return lambda theta, other: get_estimator(name, "loss")(theta.logp, other.logp)


def _full(name: str, alpha: float) -> Distance:
    of = f_divergence(name, alpha).full
    return lambda theta, other: theta.distributions.divergence(other.distributions, of)


def _sampled(name: str, alpha: float) -> Distance:
    of = f_divergence(name, alpha).estimate_from_policy_samples
    return lambda theta, other: of(theta.logp - other.logp)


def _rehearsed(name: str, alpha: float) -> Distance:
    of = f_divergence(name, alpha).estimate_from_reference_samples
    return lambda theta, other: of(theta.logp - other.logp)


ESTIMATES: Mapping[str, Distance] = {name: _estimate(name) for name in ("k2", "k3")}
VOCABULARY: Mapping[tuple[str, str], Callable[[str, float], Distance]] = {
    ("full", "own"): _full,
    ("full", "rehearsal"): _full,
    ("sampled", "own"): _sampled,
    ("sampled", "rehearsal"): _rehearsed,
}
"""By an anchor's vocabulary, and by whose samples it is measured on."""

kl_to = _full("reverse_kl", 0.5)
"""KL(θ ‖ other)."""

kl_from = _full("forward_kl", 0.5)
"""KL(other ‖ θ): of the old weights, what ratio normalisation adds and a trust region measures."""


class Old(NamedTuple):
    """What is known of the weights that are old to a run."""

    logp: Callable[[TokenLogprobs, Mapping[str, TokenLogprobs], Mapping[str, Tensor]], Tensor]
    """(θ, references, what the tape holds of the N tokens) → ℓ_old [N]."""
    spoken: Callable[[TokenLogprobs, Mapping[str, TokenLogprobs]], TokenLogprobs]
    """(θ, references) → their distributions."""


def _unknown(theta: TokenLogprobs, others: Mapping[str, TokenLogprobs]) -> TokenLogprobs:
    raise ValueError(
        "of old distributions only each token's ℓ is recorded; set likelihood.old: recompute and snapshots: {old: {decay: 0.0}}"
    )


OLD: Mapping[str, Old] = {
    "recorded": Old(lambda theta, others, recorded: recorded["log_prob"], _unknown),
    "recompute": Old(lambda theta, others, recorded: others["old"].logp, lambda theta, others: others["old"]),
    "detach": Old(lambda theta, others, recorded: theta.logp.detach(), lambda theta, others: theta.detached),
}
"""By likelihood.old."""
