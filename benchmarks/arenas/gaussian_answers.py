"""Fixed points of the cells of the Gaussian arena, each from its formula alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import gammaln

from benchmarks.arenas.gaussian import GROUP, Answer, Setting
from difrl.tasks.exact.gaussian_forward import LossDerivative, MatchingLoss, PopulationGradient, Setup, fixed_point
from difrl.tasks.exact.gaussian_solutions import Array, Normal

TIMES = (np.arange(64) + 0.5) / 64
"""Midpoints for means over uniform times."""


def paths(beta: float | Callable[[Setting], float] = 1.0) -> Answer:
    """Return the optimum over paths: the mean of step j moves by std_j² P_jᵀ a / β."""

    def answer(setting: Setting) -> Normal:
        chain = setting.chain(setting.base)
        value = beta if isinstance(beta, float) else beta(setting)
        return chain.with_control(setting.direction, np.full(len(chain.stds), 1 / value)).end()

    return answer


def guarded_paths(coefficient: float) -> Answer:
    """Return `paths` with the reward term of a step multiplied by std / |dt| and the anchor term by `coefficient`."""

    def answer(setting: Setting) -> Normal:
        chain = setting.chain(setting.base)
        dt = -np.diff(setting.policy.sampling.grid.times.numpy())
        return chain.with_control(setting.direction, chain.stds / dt / coefficient).end()

    return answer


def tilt(beta: float) -> Answer:
    """Return the tilt of the base's samples: π* up to the error of the sampler."""
    return lambda setting: setting.end(setting.base).tilted(setting.direction, beta)


def group_std_beta(setting: Setting) -> float:
    """Return the β of a coefficient of 1 when advantages are divided by the group's standard deviation.

    For G Gaussian rewards of variance σ², the mean of (r_i − r̄) r_i / s is E[s] = σ √(2/G) Γ(G/2) / Γ((G−1)/2). Leave-one-out
    without a division has σ², so β = σ² / E[s].
    """
    cov = setting.end(setting.base).cov
    std = np.sqrt(setting.direction @ cov @ setting.direction)
    return float(std / (np.sqrt(2 / GROUP) * np.exp(gammaln(GROUP / 2) - gammaln((GROUP - 1) / 2))))


def matched(slope: LossDerivative, anchor: Callable[[Array], Array], gain: float = 1.0) -> Answer:
    """Return the end of A-weighted matching with an anchor of weight c(t) on the mean square of outputs; times are uniform."""
    matching = MatchingLoss(slope, anchor(TIMES), TIMES, np.full(len(TIMES), 1 / len(TIMES)), gain)

    def answer(setting: Setting) -> Normal:
        setup = Setup(setting.policy.process, setting.data, setting.direction, setting.rows, setting.end)
        return setup.end(fixed_point(matching, setup))

    return answer


def constant_slope(weight: Callable[[Array], Array]) -> LossDerivative:
    """φ = w(t) m."""
    return lambda t, error: np.broadcast_to(weight(t)[:, None], error.shape[:2])


def ghuber_slope(t: Array, error: Array) -> Array:
    """φ = t/p ((m + 1e-10)^p − 1e-10^p), p = 1/4."""
    return t[:, None] * (np.square(error).mean(axis=2) + 1e-10) ** -0.75


def adaptive_slope(t: Array, error: Array) -> Array:
    """φ = m / mean |e|, with a detached divisor."""
    return 1 / np.abs(error).mean(axis=2).clip(1e-5)


def adaptive_clean_slope(t: Array, error: Array) -> Array:
    """φ = t² m / (t mean |e|), for errors on x0, which are t times those of a flow's output."""
    return t[:, None] * adaptive_slope(t, error)


def regressed(beta: float) -> Answer:
    """Return the end of a regression of β Δ at single times on rewards, with Δ of `uniform` from the base; times are uniform.

    Δ_t = (2/D) (μ_t − mean)ᵀT_tᵀ e + …, so the normal equations of row k are, where e is the error of the base,

        Σ_t h_k T_tᵀ ( (2β/D) E[e eᵀ] T_t (μ_t − mean) − T_t C a ) = 0
    """

    def answer(setting: Setting) -> Normal:
        setup = Setup(setting.policy.process, setting.data, setting.direction, setting.rows, setting.end)
        terms = PopulationGradient(
            MatchingLoss(constant_slope(np.ones_like), np.ones_like(TIMES), TIMES, np.ones_like(TIMES)), setup
        )
        squares = np.einsum("tni,tnj->tij", terms.error, terms.error) / terms.error.shape[1]
        answers = (
            np.einsum("tdi,tde,tej->tij", terms.matrices, squares, terms.matrices) * 2 * beta / len(setting.direction)
        )
        blocks = np.einsum("tk,tl,tij->kilj", terms.hats, terms.hats, answers)
        wanted = np.einsum(
            "tk,tdi,tde,e->ki", terms.hats, terms.matrices, terms.matrices, terms.cov @ setting.direction
        )
        size = wanted.size
        moved = np.linalg.solve(blocks.reshape(size, size), wanted.reshape(size)).reshape(wanted.shape)
        return setup.end(setting.data.mean + moved)

    return answer


def elbo_weight(t: Array) -> Array:
    """Return (1 − t)/t of a flow, summed over D = 3 dimensions, at uniform times down to the cutoff 0.02."""
    return np.where(t >= 0.02, 3 * (1 - t) / t, 0.0)
