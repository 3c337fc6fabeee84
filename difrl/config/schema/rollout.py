"""How samples are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from difrl.config.schema.base import Section
from difrl.config.schema.kernels import KERNELS, KernelName

if TYPE_CHECKING:
    from samplers import Grid, Kernel


class AllWindow(Section):
    """Every denoising step with noise is a decision of a reverse likelihood."""

    kind: Literal["all"] = "all"


class FixedWindow(Section):
    """The same few steps are stochastic, and so decisions; the others take the ODE."""

    kind: Literal["fixed"]
    start: int = Field(0, ge=0, description="first step of the window; 0: the first with noise")
    size: int = Field(1, gt=0, description="number of steps in the window")


class RandomWindow(Section):
    """A few steps at a place drawn anew each training step (Flow-GRPO-Fast, arXiv:2505.05470)."""

    kind: Literal["random"]
    start: int = Field(0, ge=0, description="first step that may be in the window; 0: the first with noise")
    end: int | None = Field(None, gt=0, description="step after the last that may be; default: all that have noise")
    size: int = Field(1, gt=0, description="number of steps in the window")


class SlidingWindow(Section):
    """A few steps that move towards the image in the course of training, and stay at the end (arXiv:2507.21802)."""

    kind: Literal["sliding"]
    start: int = Field(0, ge=0, description="first step of the window at the beginning; 0: the first with noise")
    end: int | None = Field(None, gt=0, description="step after the last it comes to; default: all that have noise")
    size: int = Field(1, gt=0, description="number of steps in the window")
    stride: int = Field(1, gt=0, description="steps by which it moves")
    every: int = Field(25, gt=0, description="training steps between two moves")


class ProgressiveWindow(Section):
    """The last steps first, then more and more of those before them (B²-DiffuRL, arXiv:2503.11240)."""

    kind: Literal["progressive"]
    first: int = Field(1, gt=0, description="stochastic steps at the beginning of the run, the last ones")
    last: int | None = Field(None, gt=0, description="stochastic steps at its end; default: all that have noise")
    over: int | None = Field(None, gt=0, description="training steps in which the window grows; default: train.steps")


AnyWindow = Annotated[
    AllWindow | FixedWindow | RandomWindow | SlidingWindow | ProgressiveWindow, Field(discriminator="kind")
]


class BranchConfig(Section):
    """Samples that share their initial noise and the denoising steps before the window, and are compared (2503.11240)."""

    count: int = Field(1, gt=0, description="branches of a prompt, each of data.group_size / count samples")
    prefix: Literal["ode", "kernel"] = Field("ode", description="how the shared steps are taken: the ODE or the kernel")


class RolloutConfig(Section):
    """How samples are drawn."""

    steps: int = Field(10, gt=1, description="denoising steps")
    kernel: KernelName = "ode"
    noise_level: float = Field(0.0, ge=0, description="η of the kernel")
    window: AnyWindow = AllWindow()
    branch: BranchConfig | None = Field(
        None, description="what the samples of a group share; default: the prompt alone"
    )
    solver: str | None = Field(
        None, description="a diffusers scheduler class in place of the kernel; forward likelihoods only"
    )
    guidance: float = Field(1.0, ge=1, description="classifier-free guidance scale; 1 switches it off")
    snapshot: str = Field("current", description="whose samples: current, or the name of a snapshot")
    width: int | None = Field(None, gt=0, description="pixels; default: the model's own")
    height: int | None = Field(None, gt=0, description="pixels; default: the model's own")
    batch: int = Field(64, gt=0, description="samples drawn at once")
    overlap: bool = Field(
        False, description="score what has been drawn in a thread while the next samples are drawn, `batch` at a time"
    )

    @property
    def silent(self) -> bool:
        """Whether samples are drawn without noise after the first."""
        return self.solver is not None or self.kernel == "ode" or self.noise_level == 0

    def build_kernel(self, grid: Grid) -> Kernel:
        """Return the kernel, for the times of `grid`."""
        return KERNELS[self.kernel].build(self.noise_level, grid)
