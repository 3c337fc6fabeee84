"""Likelihood kinds of a diffusion policy: the decisions, and their ℓ given the denoiser's output.

The policy evaluates the denoiser under each set of weights, and the kind evaluates each output. A kind is independent of
snapshots, batches and losses, so every reference and every anchor works with every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from difrl.config import ForwardLikelihood, ReverseLikelihood
from difrl.core import elbo, forward_logp, velocity
from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions, NoiseKey
from difrl.policies.diffusion.noising import ModelAccess, build_noising
from difrl.policies.diffusion.step_weights import STEP_DIVISORS
from difrl.policies.diffusion.timestep_sampling import build_density, build_quantile, stratified
from difrl.policies.evaluation import Evaluation, StoredEvaluation
from difrl.policies.references import Reference
from samplers import Gaussian, Grid, Kernel, Process


@dataclass(frozen=True, eq=False)
class DenoiserEvaluation(Evaluation):
    """N decisions and the raw outputs of the denoiser at their (x_t, t)."""

    output: Tensor
    """[N, ...], float32 at least."""

    def stored(self, outputs: bool) -> StoredEvaluation:
        return StoredEvaluation(self.logp, self.output if outputs else None)

    def divergence(self, other: Self, reference: Reference) -> Tensor:
        if reference.divergence == "velocity":
            return velocity(self.output, other.output)
        raise ValueError(f"decisions of this likelihood have no divergence {reference.divergence!r}")


_RECORDED = ("x_t", "x_next", "t", "s", "log_prob", "mean", "correction")
"""Recorded tensors of a reverse decision. `mean` is recorded only if something needs it, `correction` with rollout.precision."""


class LikelihoodKind(Protocol):
    """A likelihood of a diffusion policy."""

    @property
    def guided(self) -> bool:
        """True if it is evaluated under the rollout's guidance."""

    def decisions(self, rollout: Rollout, key: NoiseKey, model: ModelAccess) -> Decisions:
        """Return the decisions, with at least x_t [B, J, ...] and t [B, J]."""

    def evaluate(self, output: Tensor, flat: Mapping[str, Tensor]) -> DenoiserEvaluation:
        """Evaluate N flat decisions, given the denoiser's raw output at their (x_t, t)."""


@dataclass(frozen=True)
class Reverse:
    """ℓ = log N(x_next; mean_θ(x_t), std²) of recorded transitions: the kernel that drew them evaluates them."""

    config: ReverseLikelihood
    process: Process
    kernel: Kernel
    guided: Literal[True] = True

    def decisions(self, rollout: Rollout, key: NoiseKey, model: ModelAccess) -> Decisions:
        tensors = {name: value for name, value in rollout.replay_data.items() if name in _RECORDED}
        return Decisions(tensors, torch.ones_like(tensors["log_prob"], dtype=torch.bool))

    def evaluate(self, output: Tensor, flat: Mapping[str, Tensor]) -> ReverseEvaluation:
        transition = self.kernel(self.process, output, flat["x_t"], flat["t"], flat["s"])
        return ReverseEvaluation(
            transition.log_prob(flat["x_next"], self.config.reduce), flat, output, self, transition
        )


@dataclass(frozen=True, eq=False)
class ReverseEvaluation(DenoiserEvaluation):
    """Recorded transitions under one set of weights."""

    kind: Reverse
    transition: Gaussian

    @property
    def detached(self) -> Self:
        transition = Gaussian(self.transition.mean.detach(), self.transition.std)
        return replace(self, logp=self.logp.detach(), output=self.output.detach(), transition=transition)

    @property
    def recorded(self) -> Self:
        transition = Gaussian(self.flat["mean"], self.transition.std)
        return replace(self, logp=self.flat["log_prob"], output=self.output.detach(), transition=transition)

    def kl_to(self, other: Self) -> Tensor:
        return self.transition.kl(other.transition, self.kind.config.reduce)

    def divergence(self, other: Self, reference: Reference) -> Tensor:
        return self.kl_to(other) if reference.divergence == "gaussian" else super().divergence(other, reference)

    @property
    def scale(self) -> Tensor:
        """The std of each transition (GRPO-Guard, arXiv:2510.22319)."""
        return self.transition.std.flatten()

    @property
    def weight(self) -> Tensor | None:
        kind = self.kind
        divisor = STEP_DIVISORS[kind.config.step_weight](kind.kernel, kind.process, self.flat["t"], self.flat["s"])
        weight = None if divisor is None else (1 / divisor).to(self.logp.dtype)
        correction = self.flat.get("correction")
        return weight if correction is None else correction * (1 if weight is None else weight)


ERRORS: Mapping[str, Callable[[Process, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "output": lambda process, output, flat: (output, process.target(flat["x0"], flat["noise"], flat["t"])),
    "clean": lambda process, output, flat: (process.split(output, flat["x_t"], flat["t"])[0], flat["x0"]),
}
"""likelihood.error -> (prediction, target), [N, ...] each: raw outputs, or clean samples."""


@dataclass(frozen=True)
class Forward:
    """ℓ = −w(t) ‖out_θ(x_t, t) − target‖² at J (t, ε) of each clean sample (AWM, arXiv:2509.25050)."""

    config: ForwardLikelihood
    process: Process
    grid: Grid
    guided: Literal[False] = False

    def decisions(self, rollout: Rollout, key: NoiseKey, model: ModelAccess) -> Decisions:
        x0 = rollout.replay_data["latents"]
        owners = rollout.groups if "t" in self.config.share else rollout.samples
        uniforms = stratified(key.uniform((self.config.decisions,), owners, "t").double())
        t = build_quantile(self.config.times)(uniforms, self.grid).to(x0.device)
        x_t, noise = build_noising(self.config, self.process, self.grid)(rollout, t, key, model)
        tensors = {"x_t": x_t, "t": t, "x0": x0[:, None].expand_as(x_t), "noise": noise}
        return Decisions(tensors, torch.ones(t.shape, dtype=torch.bool, device=x0.device))

    def evaluate(self, output: Tensor, flat: Mapping[str, Tensor]) -> ForwardEvaluation:
        return ForwardEvaluation(self.logp(output, flat), flat, output, self)

    def logp(self, output: Tensor, flat: Mapping[str, Tensor]) -> Tensor:
        """Return ℓ [N]. `elbo` sums over dimensions, the other weightings average."""
        t = flat["t"]
        if self.config.weighting == "elbo":
            eps_hat = self.process.split(output, flat["x_t"], t)[1]
            rate, density = self.process.log_snr_rate(t), build_density(self.config.times)(t)
            return elbo(flat["noise"], eps_hat, t, rate, density, self.config.cutoff)
        prediction, target = ERRORS[self.config.error](self.process, output, flat)
        return forward_logp(prediction, target, t, self.config.weighting)


@dataclass(frozen=True, eq=False)
class ForwardEvaluation(DenoiserEvaluation):
    """Noisy states of clean samples under one set of weights."""

    kind: Forward

    @property
    def detached(self) -> Self:
        return replace(self, logp=self.logp.detach(), output=self.output.detach())

    def divergence(self, other: Self, reference: Reference) -> Tensor:
        """`weighted` is −ℓ of the clean sample and the noise that the other output predicts; for `elbo` its mean is the KL."""
        if reference.divergence != "weighted":
            return super().divergence(other, reference)
        x0_hat, eps_hat = self.kind.process.split(other.output.detach(), self.flat["x_t"], self.flat["t"])
        return -self.kind.logp(self.output, {**self.flat, "x0": x0_hat, "noise": eps_hat})

    def mixed(self, old: Self) -> tuple[Tensor, Tensor]:
        """ℓ under b out_θ + (1 − b) out_old and under (1 + b) out_old − b out_θ (DiffusionNFT, arXiv:2509.16117)."""
        b, theta = self.kind.config.mix, self.output
        if b is None:
            raise ValueError("the mixtures have no b; set likelihood.mix")
        mixtures = b * theta + (1 - b) * old.output, (1 + b) * old.output - b * theta
        return self.kind.logp(mixtures[0], self.flat), self.kind.logp(mixtures[1], self.flat)
