"""Likelihood kinds of a diffusion policy: what its decisions are, and ℓ of a decision given the denoiser's output.

A kind knows nothing of snapshots, batches or losses; the policy evaluates the denoiser under each set of weights and asks
the kind what each output says. So every kind has every reference and every anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from difrl.config import ForwardLikelihood, ReverseLikelihood
from difrl.core import elbo, forward_logp
from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions, NoiseKey
from difrl.policies.diffusion.noising import Model, noising_of
from difrl.policies.diffusion.step_weights import PULLS, step_std
from difrl.policies.diffusion.timestep_sampling import density_of, quantile_of, stratified
from samplers import Gaussian, Grid, Kernel, Process, Reduction, keyed_uniform


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one output says of N decisions."""

    output: Tensor
    """[N, ...] raw, float32 at least."""
    logp: Tensor
    """[N]."""
    transition: Gaussian | None = None
    """Of a reverse decision."""
    reduce: Reduction = "mean"
    """How ℓ, and so the KL of the transition, is reduced over the dimensions of a latent."""
    gap: Callable[[Tensor], Tensor] | None = None
    """Of a forward decision: another raw output [N, ...] -> the distance from it [N] as ℓ weighs and reduces errors."""

    @property
    def mean(self) -> Tensor:
        """[N, ...], of the transition of a reverse decision."""
        if self.transition is None:
            raise ValueError("only a reverse decision has a transition; set likelihood.kind: reverse")
        return self.transition.mean

    def kl(self, mean: Tensor) -> Tensor:
        """KL(N(mean, std²) ‖ transition) [N], of a mean [N, ...] under the same kernel."""
        assert self.transition is not None
        return Gaussian(mean, self.transition.std).kl(self.transition, self.reduce)


_RECORDED = ("x_t", "x_next", "t", "s", "log_prob", "mean")
"""What a reverse decision may hold of the tape; means are there only where something needs them."""


class Kind(Protocol):
    """A likelihood of a diffusion policy."""

    @property
    def guided(self) -> bool:
        """Whether it is evaluated under the rollout's guidance."""

    def decisions(self, rollout: Rollout, key: NoiseKey, model: Model) -> Decisions:
        """The decisions, with at least x_t [B, J, ...] and t [B, J]."""

    def evaluate(self, output: Tensor, flat: dict[str, Tensor]) -> Evaluation:
        """ℓ of N flat decisions given the denoiser's raw output at their (x_t, t)."""

    def mixed(self, output: Tensor, old: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(ℓ⁺, ℓ⁻) [N] of the two mixtures of θ's and the old output."""

    def scale(self, flat: dict[str, Tensor]) -> Tensor:
        """What ratio normalisation multiplies log ρ + bias by, [N]."""

    def weight(self, flat: dict[str, Tensor]) -> Tensor | None:
        """Factor of each decision's loss [N], where the recipe asks for one."""


@dataclass(frozen=True)
class Reverse:
    """ℓ = log N(x_next; mean_θ(x_t), std²) of recorded transitions: the kernel that drew them evaluates them."""

    config: ReverseLikelihood
    process: Process
    kernel: Kernel
    guided: Literal[True] = True

    def decisions(self, rollout: Rollout, key: NoiseKey, model: Model) -> Decisions:
        tape = rollout.replay_data
        tensors = {name: value for name, value in tape.items() if name in _RECORDED}
        return Decisions(tensors, torch.ones_like(tape["log_prob"], dtype=torch.bool))

    def evaluate(self, output: Tensor, flat: dict[str, Tensor]) -> Evaluation:
        transition = self.kernel(self.process, output, flat["x_t"], flat["t"], flat["s"])
        logp = transition.log_prob(flat["x_next"], self.config.reduce)
        return Evaluation(output, logp, transition, self.config.reduce)

    def mixed(self, output: Tensor, old: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        raise ValueError("a reverse likelihood has no mixtures; set likelihood.kind: forward and likelihood.mix")

    def scale(self, flat: dict[str, Tensor]) -> Tensor:
        """The std of each transition (GRPO-Guard, arXiv:2510.22319)."""
        return step_std(self.kernel, self.process, flat["t"], flat["s"])

    def weight(self, flat: dict[str, Tensor]) -> Tensor | None:
        pull = PULLS[self.config.step_weight](self.kernel, self.process, flat["t"], flat["s"])
        return None if pull is None else 1 / pull


def _output(process: Process, output: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return output, process.target(flat["x0"], flat["noise"], flat["t"])


def _clean(process: Process, output: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return process.split(output, flat["x_t"], flat["t"])[0], flat["x0"]


ERRORS: Mapping[str, Callable[[Process, Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "output": _output,
    "clean": _clean,
}
"""What a forward likelihood compares with what, [N, ...] each: raw outputs, or clean samples."""


@dataclass(frozen=True)
class Forward:
    """ℓ = −w(t) ‖out_θ(x_t, t) − target‖² at J (t, ε) of each clean sample (AWM, arXiv:2509.25050)."""

    config: ForwardLikelihood
    process: Process
    grid: Grid
    guided: Literal[False] = False

    def decisions(self, rollout: Rollout, key: NoiseKey, model: Model) -> Decisions:
        x0 = rollout.replay_data["latents"]
        t = quantile_of(self.config.times)(stratified(self._uniforms(rollout, key)), self.grid).to(x0.device)
        x_t, noise = noising_of(self.config, self.process, self.grid)(rollout, t, key, model)
        tensors = {"x_t": x_t, "t": t, "x0": x0[:, None].expand_as(x_t), "noise": noise}
        return Decisions(tensors, torch.ones(t.shape, dtype=torch.bool, device=x0.device))

    def _uniforms(self, rollout: Rollout, key: NoiseKey) -> Tensor:
        owners = rollout.groups if "t" in self.config.share else rollout.samples
        shape = (self.config.decisions,)
        return keyed_uniform(
            shape, seed=key.seed, step=key.step, samples=owners, use=f"{key.purpose}/t", dtype=torch.float64
        )

    def evaluate(self, output: Tensor, flat: dict[str, Tensor]) -> Evaluation:
        return Evaluation(output, self.logp(output, flat), gap=partial(self._gap, output, flat))

    def _gap(self, output: Tensor, flat: dict[str, Tensor], other: Tensor) -> Tensor:
        """−ℓ of the clean sample and the noise that the other output sees in x_t; for `elbo` the mean is KL(θ ‖ other)."""
        x0_hat, eps_hat = self.process.split(other.detach(), flat["x_t"], flat["t"])
        return -self.logp(output, {**flat, "x0": x0_hat, "noise": eps_hat})

    def mixed(self, output: Tensor, old: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """ℓ under b out_θ + (1 − b) out_old and under (1 + b) out_old − b out_θ (DiffusionNFT, arXiv:2509.16117)."""
        b = self.config.mix
        if b is None:
            raise ValueError("the mixtures have no b; set likelihood.mix")
        return self.logp(b * output + (1 - b) * old, flat), self.logp((1 + b) * old - b * output, flat)

    def scale(self, flat: dict[str, Tensor]) -> Tensor:
        return torch.ones_like(flat["t"])

    def weight(self, flat: dict[str, Tensor]) -> Tensor | None:
        return None

    def logp(self, output: Tensor, flat: dict[str, Tensor]) -> Tensor:
        """ℓ [N]; elbo sums over dimensions, the other weightings average."""
        t = flat["t"]
        if self.config.weighting == "elbo":
            eps_hat = self.process.split(output, flat["x_t"], t)[1]
            rate, density = self.process.log_snr_rate(t), density_of(self.config.times)(t)
            return elbo(flat["noise"], eps_hat, t, rate, density, self.config.cutoff)
        found, target = ERRORS[self.config.error](self.process, output, flat)
        return forward_logp(found, target, t, self.config.weighting)
