"""Sampling of images and videos: steps, kernel, window of stochastic steps, branches; and of all samples: batch, precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from difrl.config.schema.base import Section
from difrl.config.schema.kernels import KERNEL_ENTRIES, KernelName

if TYPE_CHECKING:
    from samplers import Grid, Kernel


class AllWindow(Section):
    """Every denoising step with noise is a decision of a reverse likelihood."""

    kind: Literal["all"] = "all"


class FixedWindow(Section):
    """A fixed range of stochastic steps, which are the decisions; the other steps follow the ODE."""

    kind: Literal["fixed"]
    start: int = Field(0, ge=0, description="first step of the window; 0: the first with noise")
    size: int = Field(1, gt=0, description="number of steps in the window")


class RandomWindow(Section):
    """A range of steps at a random position in each training step (Flow-GRPO-Fast, arXiv:2505.05470)."""

    kind: Literal["random"]
    start: int = Field(0, ge=0, description="first step that may be in the window; 0: the first with noise")
    end: int | None = Field(
        None, gt=0, description="step after the last that may be in the window; default: all with noise"
    )
    size: int = Field(1, gt=0, description="number of steps in the window")
    adjacent: bool = Field(
        True, description="false: any steps of the range, drawn without replacement (Flow-DPPO, arXiv:2606.11025)"
    )


class SlidingWindow(Section):
    """A range of steps that moves towards the image in the course of training and stays at the end (arXiv:2507.21802)."""

    kind: Literal["sliding"]
    start: int = Field(0, ge=0, description="first step of the window at the beginning; 0: the first with noise")
    end: int | None = Field(None, gt=0, description="step after the last position; default: all with noise")
    size: int = Field(1, gt=0, description="number of steps in the window")
    stride: int = Field(1, gt=0, description="steps of a move")
    every: int = Field(25, gt=0, description="training steps between two moves")


class ProgressiveWindow(Section):
    """A range that begins with the last steps and grows towards the first (B²-DiffuRL, arXiv:2503.11240)."""

    kind: Literal["progressive"]
    first: int = Field(
        1, gt=0, description="stochastic steps at the beginning of the run, counted from the end of the path"
    )
    last: int | None = Field(None, gt=0, description="stochastic steps at the end of the run; default: all with noise")
    over: int | None = Field(None, gt=0, description="training steps in which the window grows; default: train.steps")


AnyWindow = Annotated[
    AllWindow | FixedWindow | RandomWindow | SlidingWindow | ProgressiveWindow, Field(discriminator="kind")
]


class BranchConfig(Section):
    """Groups of samples that share their initial noise and the denoising steps before the window (arXiv:2503.11240)."""

    count: int = Field(1, gt=0, description="branches of a prompt, each of data.group_size / count samples")
    prefix: Literal["ode", "kernel"] = Field("ode", description="sampler of the shared steps: the ODE or the kernel")


class RolloutConfig(Section):
    """Sampling of the images or videos of a step."""

    steps: int = Field(10, gt=1, le=10_000, description="denoising steps")
    kernel: KernelName = "ode"
    noise_level: float = Field(0.0, ge=0, description="η of the kernel")
    window: AnyWindow = AllWindow()
    branch: BranchConfig | None = Field(
        None, description="shared first steps of the samples of a group; default: they share the prompt alone"
    )
    solver: str | None = Field(
        None, description="a diffusers scheduler class in place of the kernel; forward likelihoods only"
    )
    guidance: float = Field(1.0, ge=1, description="classifier-free guidance scale; 1 switches it off")
    snapshot: str = Field("current", description="weights that draw the samples: current, or the name of a snapshot")
    width: int | None = Field(None, gt=0, description="pixels; default: the model's own")
    height: int | None = Field(None, gt=0, description="pixels; default: the model's own")
    frames: int | None = Field(None, gt=0, description="frames of a video; default: the samples are images")
    batch: int = Field(64, gt=0, description="samples drawn at once")
    precision: Literal["same", "int8", "int8_dynamic", "float8", "float8_dynamic"] = Field(
        "same",
        description="precision of the linear layers that draw the samples of training, by torchao: same is that of the update, "
        "int8 and float8 quantise weights, and with _dynamic activations too",
    )
    correction: float = Field(
        2.0,
        gt=0,
        description="with another precision and a reverse likelihood: upper bound of a denoising step's importance weight "
        "exp(ℓ_here − ℓ_sampler) (difrl/policies/importance_sampling.py)",
    )
    overlap: bool = Field(
        False, description="score samples in a thread while the next ones are drawn, `batch` at a time"
    )

    @property
    def silent(self) -> bool:
        """True if no noise is drawn after the initial one."""
        return self.solver is not None or self.kernel == "ode" or self.noise_level == 0

    def build_kernel(self, grid: Grid) -> Kernel:
        """Return the kernel, for the times of `grid`."""
        return KERNEL_ENTRIES[self.kernel].build(self.noise_level, grid)
