"""The Gaussian task: Gaussian data, a denoiser that is exact for it, and a linear reward, so that fixed points are known.

For each prompt x0 ~ N(mean, Σ), so x_t ~ N(α mean, S_t) with S_t = α² Σ + σ² I, and the exact denoiser is affine:

    x̂0 = mean + α Σ S_t⁻¹ (x_t − α mean)          ε̂ = σ S_t⁻¹ (x_t − α mean)

Training changes `mean`, a table over time and prompts. A linear reward r = a·x0 needs nothing else: tilting by exp(r/β) moves
the mean by Σa/β and leaves Σ, and the optimal control of a sampling chain moves the mean of each step by a constant
(difrl/tasks/exact/gaussian_solutions.py). With `affine` the table also holds a matrix for each time, so that every affine
denoiser can be reached. The model is a diffusers pipeline like any other. Its latents are its images, unclamped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from rewards import Scores
from samplers import FlowMatching, Grid, Process, VariancePreserving, expand

TIMESTEPS = 1000
# (α, σ) = (cos, sin) of an angle that is linear in t: pure noise at t = 1, so that both processes start from N(0, I).
ALPHAS_CUMPROD = (torch.arange(1, TIMESTEPS + 1, dtype=torch.float64) * math.pi / (2 * TIMESTEPS)).cos() ** 2
ProcessKind = Literal["flow", "variance_preserving"]


def build_process(kind: ProcessKind) -> Process:
    """Return flow matching, or a variance-preserving process that predicts v."""
    if kind == "flow":
        return FlowMatching(TIMESTEPS)
    return VariancePreserving(ALPHAS_CUMPROD, "v_prediction")


def build_scheduler(kind: ProcessKind) -> SchedulerMixin:
    """Return the diffusers scheduler of the process, which gives a run its times."""
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(TIMESTEPS)
    betas = 1 - ALPHAS_CUMPROD / torch.cat([torch.ones(1), ALPHAS_CUMPROD[:-1]])
    return DDIMScheduler(
        TIMESTEPS, trained_betas=betas.tolist(), prediction_type="v_prediction", timestep_spacing="trailing"
    )


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """Denoiser for data N(mean_t, Σ): exact while mean_t is the mean of the data at every t.

    Args:
      covariance: Σ [D, D].
      means: prompt -> mean of the data [D]. The condition is a one-hot vector over the P prompts in this order.
      times: times of the rows of the tables, rising in (0, 1]. Linear in between, constant beyond.
      kind: the process.
      affine: True to train a matrix for each time too, 0 at first: x̂0 gains α σ² S_t⁻¹ gain_t S_t^-½ (x_t − α mean_t)
        and ε̂ loses α/σ times as much. N(mean, Σ') is at gain_t = (Σ' − Σ) S'_t⁻¹ S_t^½.
    """

    @register_to_config
    def __init__(
        self,
        covariance: list[list[float]],
        means: dict[str, list[float]],
        times: list[float],
        kind: ProcessKind = "flow",
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.process = build_process(kind)
        values, vectors = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
        self.register_buffer("variances", values.float())
        self.register_buffer("axes", vectors.float())
        self.register_buffer("nodes", torch.tensor(times))
        self.mean = nn.Parameter(torch.tensor(list(means.values())).repeat(len(times), 1, 1))
        if affine:
            self.gain = nn.Parameter(torch.zeros(len(times), len(covariance), len(covariance)))

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Return the raw output [B, D, 1, 1] for states [B, D, 1, 1], timesteps [B] and one-hot prompts [B, P]."""
        x_t, t = hidden_states.flatten(1), self.process.time(timestep)
        alpha, sigma = expand(self.process.alpha(t), x_t), expand(self.process.sigma(t), x_t)
        rows = interpolation_weights(t.to(x_t.dtype), self.nodes)
        mean = torch.einsum("bk,bp,kpd->bd", rows, prompt, self.mean)
        # In the eigenvectors of Σ, in which S_t is diagonal.
        scale = alpha.square() * self.variances + sigma.square()
        white = (x_t - alpha * mean) @ self.axes / scale.sqrt()
        x0_hat, eps_hat = alpha * self.variances / scale.sqrt() * white, sigma / scale.sqrt() * white
        if self.config.affine:
            turned = torch.einsum("bk,kde,be->bd", rows, self.gain, white @ self.axes.T) @ self.axes
            gained = alpha * sigma / scale * turned
            x0_hat, eps_hat = x0_hat + sigma * gained, eps_hat - alpha * gained
        output = self.process.combine(mean + x0_hat @ self.axes.T, eps_hat @ self.axes.T, t)
        return output.view_as(hidden_states)


def interpolation_weights(t: Tensor, times: Tensor) -> Tensor:
    """Return the weights [B, K] of linear interpolation at t [B] between rising times [K], constant beyond the ends."""
    inside = t.clamp(times[0], times[-1])
    high = torch.searchsorted(times, inside).clamp(1, len(times) - 1)
    part = (inside - times[high - 1]) / (times[high] - times[high - 1])
    rows = torch.zeros(len(t), len(times), dtype=t.dtype, device=t.device)
    return rows.scatter(1, high[:, None] - 1, 1 - part[:, None]).scatter(1, high[:, None], part[:, None])


class GaussianPipeline(DiffusionPipeline):
    """The denoiser and its scheduler: there is no text encoder and no autoencoder."""

    def __init__(self, denoiser: GaussianDenoiser, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)


class LinearReward:
    """r = a · x0, with a = metadata["direction"]."""

    name, needs = "linear", ("images", "metadata")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        directions = torch.tensor([row["direction"] for row in metadata], device=images.device)
        values = (images.flatten(1) * directions).sum(dim=1)
        return Scores(values, values.isfinite())

    def to(self, device: torch.device | str) -> LinearReward:
        return self


@dataclass(frozen=True)
class GaussianTask:
    """Σ, and for each prompt the mean of its data and the direction a of its reward.

    D = 3, so that latents have the shape of images.
    """

    covariance: tuple[tuple[float, ...], ...] = ((0.8, 0.3, 0.0), (0.3, 1.2, -0.2), (0.0, -0.2, 0.6))
    means: tuple[tuple[float, ...], ...] = ((0.0, 0.0, 0.0), (0.5, -0.3, 0.2))
    directions: tuple[tuple[float, ...], ...] = ((0.9, 0.2, -0.4), (-0.3, 0.7, 0.5))
    kind: ProcessKind = "flow"

    @property
    def prompts(self) -> list[str]:
        return [f"prompt {number}" for number in range(len(self.means))]

    def save(self, folder: Path, steps: int, *, affine: bool = False) -> Path:
        """Write folder/model, whose tables have a row at each time of a run of `steps`, and folder/prompts.jsonl."""
        scheduler = build_scheduler(self.kind)
        times = Grid.from_scheduler(scheduler, build_process(self.kind), steps).times[:steps].flip(0).tolist()
        means = {prompt: list(mean) for prompt, mean in zip(self.prompts, self.means, strict=True)}
        denoiser = GaussianDenoiser([*map(list, self.covariance)], means, times, self.kind, affine)
        GaussianPipeline(denoiser, scheduler).save_pretrained(folder / "model")
        rows = [
            {"prompt": prompt, "metadata": {"direction": direction}}
            for prompt, direction in zip(self.prompts, self.directions, strict=True)
        ]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return folder
