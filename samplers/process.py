"""Corruption processes x_t = alpha_t x0 + sigma_t eps, and the meaning of a model's raw output under each.

`t` runs from 1 (noise) to 0 (data). Only this module distinguishes prediction types: everything after `split`
is written in (x0_hat, eps_hat), with score = -eps_hat / sigma_t. Coefficients are float64 whatever the
precision of `t` (there is one number a sample); tensors are raised to float32 at least, and float64 stays
float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

FLOW: Literal["flow_prediction"] = "flow_prediction"
VPPrediction = Literal["epsilon", "v_prediction", "sample"]


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32 at least: half precisions are raised, float64 is kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(values: Tensor, x: Tensor) -> Tensor:
    """Return coefficients [B] (or one for all) as [B,1,...], in the dtype and on the device of `x` [B,...]."""
    return values.to(x.device, x.dtype).expand(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))


class Process(Protocol):
    """Coefficients alpha and sigma, and the meaning of a raw output. `t` is a float tensor [B], or one value for all."""

    @property
    def prediction(self) -> str:
        """The kind of raw output, in diffusers' terms. A scheduler must be configured for the same kind."""

    @property
    def scheduler_settings(self) -> Mapping[str, bool | str]:
        """Settings with which a diffusers scheduler that supports several processes follows this one."""

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data, in the shape of t."""

    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise, in the shape of t."""

    def timestep(self, t: Tensor) -> Tensor:
        """Return the number that the model itself receives for `t`."""

    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of `timestep`."""

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """-d lambda/dt > 0, where lambda = log(alpha_t^2 / sigma_t^2); in the shape of t."""

    def split(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x0_hat, eps_hat) for a raw output at the state `x`; all [B,...]."""

    def combine(self, x0_hat: Tensor, eps_hat: Tensor, t: Tensor) -> Tensor:
        """Return the raw output that `split` turns into (x0_hat, eps_hat) at x = alpha x0_hat + sigma eps_hat."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the raw output that pretraining regresses on, for clean data `x0` and its noise `eps`."""


def corrupt(process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps, [B,...]."""
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), eps) * eps


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: alpha = 1 - t, sigma = t, output v = eps - x0 (2209.03003; SD3, 2403.03206).

    The model receives t * num_train_timesteps.
    """

    num_train_timesteps: int = 1000

    @property
    def prediction(self) -> str:
        return FLOW

    @property
    def scheduler_settings(self) -> Mapping[str, bool | str]:
        return {"use_flow_sigmas": True, "prediction_type": FLOW}

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def timestep(self, t: Tensor) -> Tensor:
        return t.double() * self.num_train_timesteps

    def time(self, timestep: Tensor) -> Tensor:
        return timestep.double() / self.num_train_timesteps

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """lambda = 2 log((1-t)/t), so -d lambda/dt = 2 / (t (1-t))."""
        t = t.double()
        return 2 / (t * (1 - t))

    def split(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0_hat = x - t v, eps_hat = x + (1-t) v."""
        v, x = at_least_float32(output), at_least_float32(x)
        return x - expand(self.sigma(t), v) * v, x + expand(self.alpha(t), v) * v

    def combine(self, x0_hat: Tensor, eps_hat: Tensor, t: Tensor) -> Tensor:
        return at_least_float32(eps_hat) - at_least_float32(x0_hat)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.combine(x0, eps, t)


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 from a table `alphas_cumprod` [T]; output eps, v = alpha eps - sigma x0, or x0.

    Index i of the table is t = (i+1)/T, exactly; t = 0 is clean data, which the table does not hold. Between
    the points the angle phi of (alpha, sigma) = (cos phi, sin phi) is linear in t. This interpolation agrees
    with a linear log-SNR to second order in 1/T. Unlike the log-SNR the angle is finite at both ends: at clean
    data, and at the pure noise of a zero-terminal-SNR table (2305.08891).
    """

    alphas_cumprod: Tensor
    prediction: VPPrediction
    angles: Tensor = field(init=False, repr=False)  # [T+1] float64, ascending from 0 (data)

    def __post_init__(self) -> None:
        if self.prediction not in get_args(VPPrediction):
            known = ", ".join(get_args(VPPrediction))
            raise ValueError(f"unknown prediction {self.prediction!r}; variance-preserving ones: {known}")
        table = self.alphas_cumprod.detach().double().cpu()
        falling = table.ndim == 1 and len(table) > 0 and bool((table.diff() < 0).all())
        if not (falling and table[0] < 1 and table[-1] >= 0):
            raise ValueError(
                "alphas_cumprod must be a 1-d table that falls inside [0, 1), from little to much noise; "
                f"got shape {tuple(table.shape)}, values {table.flatten()[:3].tolist()} ... "
                f"{table.flatten()[-3:].tolist()}. Pass scheduler.alphas_cumprod unchanged"
            )
        if self.prediction == "epsilon" and table[-1] == 0:
            raise ValueError(
                "alphas_cumprod ends at 0 (zero terminal SNR), where x0 cannot be recovered from a predicted "
                "epsilon; such a model predicts v_prediction or sample"
            )
        angles = torch.atan2((1 - table).sqrt(), table.sqrt())
        object.__setattr__(self, "angles", torch.cat([angles.new_zeros(1), angles]))

    @property
    def scheduler_settings(self) -> Mapping[str, bool | str]:
        return {}

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].sin()

    def timestep(self, t: Tensor) -> Tensor:
        return (self._position(t) - 1).clamp(min=0)

    def time(self, timestep: Tensor) -> Tensor:
        return (timestep.double() + 1) / self._steps

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """lambda = 2 log cot phi, so -d lambda/dt = 2 phi' / (sin phi cos phi).

        phi' is constant between table points; at a point it is the slope of the interval towards noise.
        """
        angle, slope = self._angle(t)
        return 2 * slope / (angle.sin() * angle.cos())

    def split(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        out, x = at_least_float32(output), at_least_float32(x)
        alpha, sigma = expand(self.alpha(t), x), expand(self.sigma(t), x)
        if self.prediction == "epsilon":
            return (x - sigma * out) / alpha, out
        if self.prediction == "sample":
            return out, (x - alpha * out) / sigma
        return alpha * x - sigma * out, alpha * out + sigma * x

    def combine(self, x0_hat: Tensor, eps_hat: Tensor, t: Tensor) -> Tensor:
        x0_hat, eps_hat = at_least_float32(x0_hat), at_least_float32(eps_hat)
        if self.prediction == "epsilon":
            return eps_hat
        if self.prediction == "sample":
            return x0_hat
        return expand(self.alpha(t), eps_hat) * eps_hat - expand(self.sigma(t), x0_hat) * x0_hat

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.combine(x0, eps, t)

    @property
    def _steps(self) -> int:
        return len(self.angles) - 1

    def _position(self, t: Tensor) -> Tensor:
        """Return t * T. Table points come out whole, although a float32 `t` is off by up to T 2^-25."""
        position = t.double() * self._steps
        error = (position - position.round()).detach()
        return position - torch.where(error.abs() < self._steps * 2**-23, error, 0.0)

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi(t) and d phi/dt."""
        position = self._position(t)
        low = position.detach().floor().long().clamp(0, self._steps - 1)
        angles = self.angles.to(t.device)
        left, right = angles[low], angles[low + 1]
        return torch.lerp(left, right, position - low), (right - left) * self._steps
