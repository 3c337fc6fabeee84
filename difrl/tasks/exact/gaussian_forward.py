"""Fixed points of forward likelihoods on the Gaussian task: the expected gradient, and the table of means at which it is 0.

A sample is x0 = M + z with z ~ N(0, C), where N(M, C) is the end of the sampler. Its advantage is κ a·z, and a decision is
(t, ε). Let ℓ = −φ_t(m) with m the mean square of the denoiser's error e, and let an anchor have weight c_t on the mean square
of the distance d to the base's output. Then the gradient with respect to the mean μ_k of row k of the table is, up to a factor,

    Σ_t p_t h_k(t) T_tᵀ ( E[κ a·z φ_t′(m) e] + c_t d ),        e = e_0(z, ε) + T_t (M − μ_t),   d = T_t (mean − μ_t)

with T_t = −∂output/∂μ_t and hat functions h_k. Expectations are means over Sobol points. For φ = w_t m the solution is
μ_t − mean = (w_t / c_t) κ C a if w_t / c_t is constant: π* for C = Σ, at β = c / (w κ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm, qmc

from difrl.tasks.exact.gaussian_solutions import (
    Array,
    ExactDenoiser,
    Normal,
    build_exact_denoiser,
    constant_mean,
    interpolated_mean,
)
from samplers import Process, corrupt

LossDerivative = Callable[[Array, Array], Array]
"""(t [T], e [T, N, D]) -> φ_t′(m) [T, N], m the mean of e² over D."""


@dataclass(frozen=True)
class MatchingLoss:
    """A forward likelihood with an anchor: φ′, the anchor's weight c at the times t [T], their probabilities p [T]."""

    slope: LossDerivative
    anchor: Array
    times: Array
    probabilities: Array
    gain: float = 1.0
    """Factor κ of the advantage."""


@dataclass(frozen=True)
class Setup:
    """A run to be solved: data of the base, direction of the reward, times of the table's rows [K], and the sampler."""

    process: Process
    data: Normal
    direction: Array
    rows: Array
    sample: Callable[[ExactDenoiser], Normal]
    """Distribution at the end of the rollouts of a denoiser."""

    def end(self, means: Array) -> Normal:
        """Return the distribution at the end of the rollouts with a table of means [K, D]."""
        return self.sample(build_exact_denoiser(self.process, self.data.cov, interpolated_mean(self.rows, means)))


def fixed_point(matching: MatchingLoss, setup: Setup, points: int = 2**11, rounds: int = 60) -> Array:
    """Return the table of means [K, D] at which the expected gradient is 0; ArithmeticError if it is not found."""
    expected = PopulationGradient(matching, setup, points)
    means = np.tile(setup.data.mean, (len(setup.rows), 1))
    for _ in range(rounds):
        step = np.linalg.solve(expected.hessian, expected.gradient(means).reshape(-1)).reshape(means.shape)
        means = means - step
        if np.abs(step).max() < 1e-9:
            return means
    raise ArithmeticError(f"no fixed point after {rounds} rounds; the last step was {np.abs(step).max():.1e}")


class PopulationGradient:
    """The expected gradient as a function of the table. Parts that do not depend on the table are computed once.

    hats h_k(t) [T, K], matrices T_t [T, D, D], error e_0 [T, N, D], cov C [D, D], hessian of the anchor's term [KD, KD].
    """

    def __init__(self, matching: MatchingLoss, setup: Setup, points: int = 2**11) -> None:
        self.matching, self.setup = matching, setup
        data, dims = setup.data, len(setup.direction)
        t = matching.times
        uniforms = qmc.Sobol(2 * dims, seed=0).random(points)
        normals = norm.ppf(np.clip(uniforms, 1e-12, 1 - 1e-12))
        self.cov = setup.end(np.tile(data.mean, (len(setup.rows), 1))).cov
        z = normals[:, :dims] @ np.linalg.cholesky(self.cov).T
        self.advantage = matching.gain * z @ setup.direction
        # Errors of the denoiser for mean 0, on samples of mean 0.
        self.error = _errors(setup.process, data.cov, t, z, normals[:, dims:])
        self.matrices = _sensitivity(setup.process, data.cov, t)
        self.hats = np.stack([np.interp(t, setup.rows, row) for row in np.eye(len(setup.rows))], axis=1)
        self.weights = matching.probabilities[:, None] * self.hats
        squares = matching.anchor[:, None, None] * np.einsum("tdi,tdj->tij", self.matrices, self.matrices)
        blocks = np.einsum("tk,tl,tij->kilj", self.weights, self.hats, squares)
        self.hessian = blocks.reshape(2 * (len(setup.rows) * dims,))

    def gradient(self, means: Array) -> Array:
        """Return the gradient [K, D] up to a factor, for a table of means [K, D]. It points away from the fixed point."""
        table_mean = self.hats @ means
        centre = self.setup.end(means).mean
        error = self.error + np.einsum("tij,tj->ti", self.matrices, centre - table_mean)[:, None]
        slope = self.matching.slope(self.matching.times, error)
        reward_term = np.einsum("n,tn,tni->ti", self.advantage, slope, error) / len(self.advantage)
        distance = np.einsum("tij,tj->ti", self.matrices, self.setup.data.mean - table_mean)
        total = reward_term + self.matching.anchor[:, None] * distance
        gradient: Array = -np.einsum("tk,tij,ti->kj", self.weights, self.matrices, total)
        return gradient


def _errors(process: Process, cov: Array, t: Array, z: Array, eps: Array) -> Array:
    """Return output − target [T, N, D] of the denoiser of N(0, cov), at every time for every (z, ε)."""
    output = build_exact_denoiser(process, cov, constant_mean(np.zeros(len(cov))))
    clean, noise = torch.from_numpy(z), torch.from_numpy(eps)
    errors = []
    for time in torch.from_numpy(t):
        times = time.expand(len(clean))
        errors.append(output(corrupt(process, clean, noise, times), times) - process.target(clean, noise, times))
    return torch.stack(errors).numpy()


def _sensitivity(process: Process, cov: Array, t: Array) -> Array:
    """Return T_t = −∂output/∂mean [T, D, D]."""
    eye, times = torch.eye(len(cov), dtype=torch.float64), torch.from_numpy(t)
    columns = [
        -build_exact_denoiser(process, cov, constant_mean(unit))(
            torch.zeros(len(t), len(cov), dtype=torch.float64), times
        )
        for unit in eye.numpy()
    ]
    return torch.stack(columns, dim=2).numpy()
