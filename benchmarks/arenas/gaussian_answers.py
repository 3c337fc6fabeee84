"""Fixed points of the Gaussian arena's cells, each from its formula alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import gammaln

from benchmarks.arenas.gaussian import GROUP, Answer, Setting
from difrl.tasks.exact.gaussian_forward import Matching, Pull, Situation, Slope, fixed_point
from difrl.tasks.exact.gaussian_solutions import Array, Normal

TIMES = (np.arange(64) + 0.5) / 64
"""Midpoints by which the mean over uniform times is taken."""


def paths(beta: float | Callable[[Setting], float] = 1.0) -> Answer:
    """The optimum over paths: the mean of step j moves by std_j² P_jᵀ a / β."""

    def answer(setting: Setting) -> Normal:
        chain = setting.chain(setting.base)
        value = beta if isinstance(beta, float) else beta(setting)
        return chain.controlled(setting.direction, np.full(len(chain.stds), 1 / value)).end()

    return answer


def guarded_paths(coefficient: float) -> Answer:
    """As `paths` where the pull of the reward at a step is std / |dt| times its own, and the anchor's is `coefficient`."""

    def answer(setting: Setting) -> Normal:
        chain = setting.chain(setting.base)
        dt = -np.diff(setting.policy.sampling.grid.times.numpy())
        return chain.controlled(setting.direction, chain.stds / dt / coefficient).end()

    return answer


def tilt(beta: float) -> Answer:
    """The tilt of what the base samples: π* but for the sampler's own error."""
    return lambda setting: setting.end(setting.base).tilted(setting.direction, beta)


def group_std_beta(setting: Setting) -> float:
    """The β that a coefficient of 1 stands for when advantages are divided by the group's standard deviation.

    Of G Gaussian rewards of variance σ², the mean of (r_i − r̄) r_i / s is E[s] = σ √(2/G) Γ(G/2) / Γ((G−1)/2), where
    leave-one-out without a division has σ²: so β = σ² / E[s].
    """
    cov = setting.end(setting.base).cov
    std = np.sqrt(setting.direction @ cov @ setting.direction)
    return float(std / (np.sqrt(2 / GROUP) * np.exp(gammaln(GROUP / 2) - gammaln((GROUP - 1) / 2))))


def matched(slope: Slope, anchor: Callable[[Array], Array], gain: float = 1.0) -> Answer:
    """Where A-weighted matching with an anchor of weight c(t) on the mean square of outputs ends; times are uniform."""
    matching = Matching(slope, anchor(TIMES), TIMES, np.full(len(TIMES), 1 / len(TIMES)), gain)

    def answer(setting: Setting) -> Normal:
        situation = Situation(setting.policy.process, setting.data, setting.direction, setting.rows, setting.end)
        return situation.end(fixed_point(matching, situation))

    return answer


def constant_slope(weight: Callable[[Array], Array]) -> Slope:
    """φ = w(t) m."""
    return lambda t, error: np.broadcast_to(weight(t)[:, None], error.shape[:2])


def ghuber_slope(t: Array, error: Array) -> Array:
    """φ = t/p ((m + 1e-10)^p − 1e-10^p), p = 1/4."""
    return t[:, None] * (np.square(error).mean(axis=2) + 1e-10) ** -0.75


def adaptive_slope(t: Array, error: Array) -> Array:
    """φ = m / mean |e|, the divisor detached."""
    return 1 / np.abs(error).mean(axis=2).clip(1e-5)


def adaptive_clean_slope(t: Array, error: Array) -> Array:
    """The same of errors on x0, t times those of a flow's output: φ = t² m / (t mean |e|)."""
    return t[:, None] * adaptive_slope(t, error)


def regressed(beta: float) -> Answer:
    """Where β Δ at single times is regressed on rewards, Δ of `uniform` from the base; times are uniform.

    Δ_t = (2/D) (μ_t − mean)ᵀT_tᵀ e + …, so the normal equations of row k are, with e the error of the base,

        Σ_t h_k T_tᵀ ( (2β/D) E[e eᵀ] T_t (μ_t − mean) − T_t C a ) = 0
    """

    def answer(setting: Setting) -> Normal:
        situation = Situation(setting.policy.process, setting.data, setting.direction, setting.rows, setting.end)
        pull = Pull(Matching(constant_slope(np.ones_like), np.ones_like(TIMES), TIMES, np.ones_like(TIMES)), situation)
        squares = np.einsum("tni,tnj->tij", pull.error, pull.error) / pull.error.shape[1]
        answers = (
            np.einsum("tdi,tde,tej->tij", pull.matrices, squares, pull.matrices) * 2 * beta / len(setting.direction)
        )
        blocks = np.einsum("tk,tl,tij->kilj", pull.hats, pull.hats, answers)
        wanted = np.einsum("tk,tdi,tde,e->ki", pull.hats, pull.matrices, pull.matrices, pull.cov @ setting.direction)
        size = wanted.size
        moved = np.linalg.solve(blocks.reshape(size, size), wanted.reshape(size)).reshape(wanted.shape)
        return situation.end(setting.data.mean + moved)

    return answer


def elbo_weight(t: Array) -> Array:
    """(1 − t)/t of a flow, summed over D = 3 dimensions, at uniform times down to the cutoff 0.02."""
    return np.where(t >= 0.02, 3 * (1 - t) / t, 0.0)
