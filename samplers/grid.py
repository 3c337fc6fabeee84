"""The times of a run, and the steps of it that are stochastic decisions.

Times come from a diffusers scheduler, so that shifts and spacings are exactly the pipeline's. They are left
unchanged, also where the last step is nearly empty (SD3's default sigmas end 0.001, 0 before shifting).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.noise import stable_seed
from samplers.process import FLOW, Process

# Diffusers' schedulers share methods by convention, not by a common typed base.
Scheduler = Any


@dataclass(frozen=True, eq=False)
class Grid:
    """Times of a run of N steps, [N+1] float64, falling from at most 1 to 0 (or to the first point of a table)."""

    times: Tensor

    def __post_init__(self) -> None:
        times = self.times.double()
        object.__setattr__(self, "times", times)
        # The last step may be empty: DDIM's timestep 0 to a final alpha that is the table's first.
        falling = times.ndim == 1 and len(times) >= 2 and bool((times[:-2] > times[1:-1]).all())
        if not (falling and times[-2] >= times[-1] and times[0] <= 1 and times[-1] >= 0):
            raise ValueError(
                f"times must be at least two numbers that fall inside [0, 1], got {times.tolist()}. "
                "A scheduler that repeats times (Heun, PNDM) or counts upwards gives no grid: build one "
                "with FlowMatchEulerDiscreteScheduler or DDIMScheduler, or use samplers.solve"
            )

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def to(self, device: torch.device | str) -> Grid:
        return Grid(self.times.to(device))

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Scheduler,
        process: Process,
        steps: int,
        device: torch.device | str = "cpu",
        *,
        sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Grid:
        """Return the times at which a pipeline with this scheduler calls its model, and the time at which it ends.

        The scheduler is not changed. `sequence_length` (tokens of one image) is for dynamic shifting, `sigmas` for
        pipelines that pass their own. With DDIM's "linspace" spacing, and with "trailing" when `steps` does not
        divide the table, a step ends at another time than the one of the model's next call; the grid has the latter.
        """
        scheduler = prepare_scheduler(scheduler, process, steps, device, sequence_length=sequence_length, sigmas=sigmas)
        if process.prediction == FLOW:
            return cls(scheduler.sigmas.to(device))  # the timesteps are these times 1000, rounded
        times = process.time(scheduler.timesteps.to(device))
        config = scheduler.config
        clean = config.get("set_alpha_to_one", True) and config.get("final_sigmas_type", "zero") == "zero"
        end = torch.zeros_like(times[:1]) if clean else process.time(torch.zeros_like(times[:1]))
        return cls(torch.cat([times, end]))


def prepare_scheduler(
    scheduler: Scheduler,
    process: Process,
    steps: int,
    device: torch.device | str,
    *,
    sequence_length: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> Scheduler:
    """Return a copy of `scheduler` with its timesteps set. ValueError if it is made for other outputs than the process's."""
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", FLOW)
    if prediction != process.prediction:
        raise ValueError(
            f"{name} is configured for {prediction!r} and the model predicts {process.prediction!r}; "
            f"build it with prediction_type={process.prediction!r}, or take a scheduler made for such models"
        )
    if prediction == FLOW and not config.get("use_flow_sigmas", True):
        raise ValueError(f"{name} drives a flow model only with use_flow_sigmas=True; build it so")
    options: dict[str, float | list[float]] = {}
    if config.get("use_dynamic_shifting", False):
        options["mu"] = _shift(config, name, sequence_length)
    if sigmas is not None:
        options["sigmas"] = list(sigmas)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=device, **options)
    return scheduler


def _shift(config: Mapping[str, float], name: str, sequence_length: int | None) -> float:
    """Return mu of dynamic shifting as in the pipelines: linear in the length through two points."""
    if sequence_length is None:
        raise ValueError(
            f"{name} shifts its times by the image size (use_dynamic_shifting); pass sequence_length, "
            "the number of latent patches of one image"
        )
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (sequence_length - short) / (long - short))


@dataclass(frozen=True)
class Window:
    """Steps start .. start+size-1 of a run: they are drawn from the kernel and are decisions; other steps take the ODE.

    The last step, to t = 0, is never in a window: its transition is deterministic. A size of 0 is an ODE run. With `gaps`
    the steps are not adjacent: gaps[i] steps that take the ODE lie between steps i and i + 1 of the window.
    """

    start: int
    size: int
    gaps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 0:
            raise ValueError(f"a window needs start >= 0 and size >= 0, got {self}")
        if self.gaps and (len(self.gaps) != self.size - 1 or min(self.gaps) < 0):
            raise ValueError(f"a window needs no gaps, or one >= 0 between each two of its steps, got {self}")

    @classmethod
    def all(cls, steps: int) -> Window:
        """Return every step of a run of `steps` but the last."""
        return cls(0, max(steps - 1, 0))

    @classmethod
    def random(cls, size: int, low: int, high: int, seed: int, step: int) -> Window:
        """Return `size` steps inside low .. high-1, with a uniform start keyed by (seed, step)."""
        if not 0 <= low <= high - size:
            raise ValueError(f"a window of {size} steps does not fit into steps {low} .. {high - 1}")
        generator = torch.Generator().manual_seed(stable_seed(seed, step, "window"))
        return cls(int(torch.randint(low, high - size + 1, (), generator=generator)), size)

    @classmethod
    def scattered(cls, size: int, low: int, high: int, seed: int, step: int) -> Window:
        """Return `size` of the steps low .. high-1, drawn without replacement and keyed by (seed, step)."""
        if not 0 <= low <= high - size:
            raise ValueError(f"a window of {size} steps does not fit into steps {low} .. {high - 1}")
        generator = torch.Generator().manual_seed(stable_seed(seed, step, "window"))
        steps = sorted((low + torch.randperm(high - low, generator=generator)[:size]).tolist())
        return cls(steps[0], size, tuple(after - before - 1 for before, after in itertools.pairwise(steps)))

    @classmethod
    def sliding(cls, size: int, low: int, high: int, shift: int) -> Window:
        """Return `size` steps inside low .. high-1, moved by `shift` from `low` and stopped at the end of the range.

        MixGRPO's l <- min(l + s, T - w) (2507.21802).
        """
        if not (0 <= low <= high - size and shift >= 0):
            raise ValueError(f"a window of {size} steps moved by {shift} does not fit into steps {low} .. {high - 1}")
        return cls(min(low + shift, high - size), size)

    @classmethod
    def growing(cls, first: int, last: int, end: int, progress: float) -> Window:
        """Return the steps before `end`: `first` of them at progress 0, growing one by one to `last` of them at 1.

        The last - first + 1 sizes take equal parts of the run (B2-DiffuRL's backward progressive training,
        2503.11240).
        """
        if not 0 < first <= last <= end:
            raise ValueError(
                f"a window cannot grow from {first} to {last} of the {end} steps before its end; expected "
                "0 < first <= last <= end"
            )
        size = min(last, first + int(progress * (last - first + 1)))
        return cls(end - size, size)

    @classmethod
    def noisy(cls, stds: Tensor, floor: float = 0.01) -> Window:
        """Return the first run of steps whose std (`transition_std`) is at least `floor`, without the last step.

        Where a grid ends in an almost empty step, interpolating kernels enter it with a std of 1e-3, and such
        a decision would dominate every likelihood ratio.
        """
        noisy = (stds[:-1] >= floor).tolist()
        start = noisy.index(True) if True in noisy else 0
        size = noisy[start:].index(False) if False in noisy[start:] else len(noisy) - start
        return cls(start, size)

    @property
    def indices(self) -> list[int]:
        """The steps in their order."""
        passed = [0, *itertools.accumulate(self.gaps)] if self.gaps else [0] * self.size
        return [self.start + i + passed[i] for i in range(self.size)]

    def __contains__(self, step: int) -> bool:
        return step in self.indices

    def check(self, steps: int) -> None:
        """Raise ValueError unless a run of `steps` has these steps, and its last is not among them."""
        last = self.indices[-1] if self.size else -1
        if self.size and last > steps - 2:
            raise ValueError(
                f"a window of steps {self.start} .. {last} does not fit a run of {steps} steps: the last, to "
                f"t = 0, is never a decision, so it must end at step {steps - 2} or before"
            )
