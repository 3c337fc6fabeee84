"""Where forward likelihoods end in the Gaussian world: the population's gradient, and the table of means at which it is 0.

A sample is x0 = M + z with z ~ N(0, C) (M and C: where the sampler ends), its advantage κ a·z, and a decision is (t, ε).
With ℓ = −φ_t(m), m the mean square of the denoiser's error e, and an anchor of weight c_t on the mean square of the
distance d to the base's output, the gradient in the mean μ_k of row k of the table is, up to a factor,

    Σ_t p_t h_k(t) T_tᵀ ( E[κ a·z φ_t′(m) e] + c_t d ),        e = e_0(z, ε) + T_t (M − μ_t),   d = T_t (mean − μ_t)

with T_t = −∂output/∂μ_t and hat functions h_k. Expectations are sums over Sobol points. For φ = w_t m it is solved by
μ_t − mean = (w_t / c_t) κ C a wherever the quotient is constant: π* for C = Σ, at β = c / (w κ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm, qmc

from difrl.tasks.exact.gaussian_solutions import Array, Normal, Output, constant, exact_output, interpolated
from samplers import Process, corrupt

Slope = Callable[[Array, Array], Array]
"""(t [T], e [T, N, D]) -> φ_t′(m) [T, N], m the mean of e² over D."""


@dataclass(frozen=True)
class Matching:
    """A forward likelihood with an anchor: φ′, the anchor's weight c at the times t [T], their probabilities p [T]."""

    slope: Slope
    anchor: Array
    times: Array
    probabilities: Array
    gain: float = 1.0
    """κ."""


@dataclass(frozen=True)
class Situation:
    """What the likelihood meets: the base's data, the reward's direction, times of the table's rows [K], the sampler."""

    process: Process
    data: Normal
    direction: Array
    rows: Array
    sample: Callable[[Output], Normal]
    """Where the rollouts of a denoiser end."""

    def end(self, means: Array) -> Normal:
        """Where the rollouts end with a table of means [K, D]."""
        return self.sample(exact_output(self.process, self.data.cov, interpolated(self.rows, means)))


def fixed_point(matching: Matching, situation: Situation, points: int = 2**11, rounds: int = 60) -> Array:
    """The table of means [K, D] at which the population's gradient is 0; raises if it is not found."""
    pull = Pull(matching, situation, points)
    means = np.tile(situation.data.mean, (len(situation.rows), 1))
    for _ in range(rounds):
        step = np.linalg.solve(pull.stiffness, pull.gradient(means).reshape(-1)).reshape(means.shape)
        means = means - step
        if np.abs(step).max() < 1e-9:
            return means
    raise ArithmeticError(f"no fixed point after {rounds} rounds; the last step was {np.abs(step).max():.1e}")


class Pull:
    """The gradient as a function of the table, with what does not depend on the table computed once.

    hats [T, K], matrices T_t [T, D, D], error e_0 [T, N, D], cov C [D, D].
    """

    def __init__(self, matching: Matching, situation: Situation, points: int = 2**11) -> None:
        self.matching, self.situation = matching, situation
        data, dims = situation.data, len(situation.direction)
        t = matching.times
        uniforms = qmc.Sobol(2 * dims, seed=0).random(points)
        normals = norm.ppf(np.clip(uniforms, 1e-12, 1 - 1e-12))
        self.cov = situation.end(np.tile(data.mean, (len(situation.rows), 1))).cov
        z = normals[:, :dims] @ np.linalg.cholesky(self.cov).T
        self.advantage = matching.gain * z @ situation.direction
        # Errors of the denoiser that believes in mean 0, of samples of mean 0.
        self.error = _errors(situation.process, data.cov, t, z, normals[:, dims:])
        self.matrices = _sensitivity(situation.process, data.cov, t)
        self.hats = np.stack([np.interp(t, situation.rows, row) for row in np.eye(len(situation.rows))], axis=1)
        self.weights = matching.probabilities[:, None] * self.hats
        squares = matching.anchor[:, None, None] * np.einsum("tdi,tdj->tij", self.matrices, self.matrices)
        blocks = np.einsum("tk,tl,tij->kilj", self.weights, self.hats, squares)
        self.stiffness = blocks.reshape(2 * (len(situation.rows) * dims,))

    def gradient(self, means: Array) -> Array:
        """[K, D], up to a factor; its sign is that of a step away from the fixed point."""
        believed = self.hats @ means
        centre = self.situation.end(means).mean
        error = self.error + np.einsum("tij,tj->ti", self.matrices, centre - believed)[:, None]
        slope = self.matching.slope(self.matching.times, error)
        pull = np.einsum("n,tn,tni->ti", self.advantage, slope, error) / len(self.advantage)
        away = np.einsum("tij,tj->ti", self.matrices, self.situation.data.mean - believed)
        total = pull + self.matching.anchor[:, None] * away
        return -np.einsum("tk,tij,ti->kj", self.weights, self.matrices, total)


def _errors(process: Process, cov: Array, t: Array, z: Array, eps: Array) -> Array:
    """output − target [T, N, D] of N(0, cov)'s denoiser at every time for every (z, ε)."""
    output = exact_output(process, cov, constant(np.zeros(len(cov))))
    clean, noise = torch.from_numpy(z), torch.from_numpy(eps)
    errors = []
    for time in torch.from_numpy(t):
        times = time.expand(len(clean))
        errors.append(output(corrupt(process, clean, noise, times), times) - process.target(clean, noise, times))
    return torch.stack(errors).numpy()


def _sensitivity(process: Process, cov: Array, t: Array) -> Array:
    """T_t = −∂output/∂mean [T, D, D]."""
    eye, times = torch.eye(len(cov), dtype=torch.float64), torch.from_numpy(t)
    columns = [
        -exact_output(process, cov, constant(unit))(torch.zeros(len(t), len(cov), dtype=torch.float64), times)
        for unit in eye.numpy()
    ]
    return torch.stack(columns, dim=2).numpy()
