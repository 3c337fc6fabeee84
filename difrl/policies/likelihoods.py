"""Likelihood kinds of a diffusion policy: what its decisions are, and ℓ of a decision given the denoiser's output.

A kind knows nothing of snapshots, batches or losses; the policy evaluates the denoiser under each set of weights and asks
the kind what each output says. So every kind has every reference and every anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from difrl.config import ForwardLikelihood, ReverseLikelihood
from difrl.core import forward_logp
from difrl.policies.base import Decisions, Key
from difrl.policies.times import density_of, quantile_of, stratified
from difrl.rollout import Rollout
from samplers import Gaussian, Grid, Kernel, Process, Reduction, corrupt, keyed, keyed_uniform


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


class Kind(Protocol):
    """A likelihood of a diffusion policy."""

    @property
    def guided(self) -> bool:
        """Whether it is evaluated under the rollout's guidance."""

    def decisions(self, rollout: Rollout, key: Key) -> Decisions:
        """The decisions, with at least x_t [B, J, ...] and t [B, J]."""

    def evaluate(self, output: Tensor, flat: dict[str, Tensor]) -> Evaluation:
        """ℓ of N flat decisions given the denoiser's raw output at their (x_t, t)."""

    def mixed(self, output: Tensor, old: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """(ℓ⁺, ℓ⁻) [N] of the two mixtures of θ's and the old output, where the kind has them."""


@dataclass(frozen=True)
class Reverse:
    """ℓ = log N(x_next; mean_θ(x_t), std²) of recorded transitions: the kernel that drew them evaluates them."""

    config: ReverseLikelihood
    process: Process
    kernel: Kernel
    guided: Literal[True] = True

    def decisions(self, rollout: Rollout, key: Key) -> Decisions:
        tape = rollout.tape
        tensors = {name: tape[name] for name in ("x_t", "x_next", "t", "s", "log_prob")}
        return Decisions(tensors, torch.ones_like(tape["log_prob"], dtype=torch.bool))

    def evaluate(self, output: Tensor, flat: dict[str, Tensor]) -> Evaluation:
        transition = self.kernel(self.process, output, flat["x_t"], flat["t"], flat["s"])
        logp = transition.log_prob(flat["x_next"], self.config.reduce)
        return Evaluation(output, logp, transition, self.config.reduce)

    def mixed(self, output: Tensor, old: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        return None


@dataclass(frozen=True)
class Forward:
    """ℓ = −w(t) ‖out_θ(x_t, t) − target‖² at J fresh (t, ε) of each clean sample (AWM, arXiv:2509.25050)."""

    config: ForwardLikelihood
    process: Process
    grid: Grid
    guided: Literal[False] = False

    def decisions(self, rollout: Rollout, key: Key) -> Decisions:
        config, x0 = self.config, rollout.tape["latents"]
        count, device = config.decisions, x0.device
        t = quantile_of(config.times)(stratified(self._uniforms(rollout, key)), self.grid).to(device)
        owners = rollout.groups if "noise" in config.share else rollout.samples
        noise = keyed(
            (count, *x0.shape[1:]),
            seed=key.seed,
            step=key.step,
            samples=owners,
            use=f"{key.use}/noise",
            device=device,
        )
        clean = x0[:, None].expand_as(noise)
        x_t = corrupt(self.process, clean.flatten(0, 1), noise.flatten(0, 1), t.flatten()).unflatten(0, t.shape)
        tensors = {"x_t": x_t, "t": t, "x0": clean, "noise": noise}
        return Decisions(tensors, torch.ones(t.shape, dtype=torch.bool, device=device))

    def _uniforms(self, rollout: Rollout, key: Key) -> Tensor:
        owners = rollout.groups if "t" in self.config.share else rollout.samples
        shape = (self.config.decisions,)
        return keyed_uniform(
            shape, seed=key.seed, step=key.step, samples=owners, use=f"{key.use}/t", dtype=torch.float64
        )

    def evaluate(self, output: Tensor, flat: dict[str, Tensor]) -> Evaluation:
        return Evaluation(output, self.logp(output, flat))

    def mixed(self, output: Tensor, old: Tensor, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """ℓ under b out_θ + (1 − b) out_old and under (1 + b) out_old − b out_θ (DiffusionNFT, arXiv:2509.16117)."""
        b = self.config.mix
        if b is None:
            return None
        return self.logp(b * output + (1 - b) * old, flat), self.logp((1 + b) * old - b * output, flat)

    def logp(self, output: Tensor, flat: dict[str, Tensor]) -> Tensor:
        """ℓ [N]; elbo sums over dimensions, the other weightings average."""
        t, noise, weighting = flat["t"], flat["noise"], self.config.weighting
        target = self.process.target(flat["x0"], noise, t)
        if weighting != "elbo":
            return forward_logp(output, target, t, weighting)
        return forward_logp(
            output,
            target,
            t,
            weighting,
            eps=noise,
            eps_hat=self.process.split(output, flat["x_t"], t)[1],
            log_snr_rate=self.process.log_snr_rate(t),
            density=density_of(self.config.times)(t),
            cutoff=self.config.cutoff,
        )
