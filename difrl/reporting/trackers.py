"""Trackers, which copy the metrics of a run to other places than metrics.jsonl; `trackers: [NAME, …]` in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.runtime.registry import Registry


class Tracker(Protocol):
    """A destination of metrics. Only the first process of a run has trackers."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; values may be NaN or infinite.

        A step is written a second time, with its evaluation, if the run stopped between the two.
        """

    def close(self) -> None:
        """Finish writing. The run calls this once, also after an exception."""


TrackerFactory = Callable[[RunConfig, int], Tracker]
"""(settings of the run, steps already done) -> tracker.

The number of steps is 0 for a new run. A resumed run repeats every later step, so a tracker drops what it recorded of those.
"""

TRACKERS = Registry[TrackerFactory]("tracker", "difrl.trackers")


def register_tracker(name: str, factory: TrackerFactory) -> TrackerFactory:
    """Make a tracker available to recipes as `name`. Raise ValueError if another tracker has that name."""
    return TRACKERS.register(name, factory)


def find_trackers(config: RunConfig) -> Sequence[TrackerFactory]:
    """Return the factories of the trackers of a recipe, each once. Raise ConfigError if a name is unknown."""
    names = dict.fromkeys([*config.trackers, *(["tensorboard"] if config.tensorboard else [])])
    try:
        return [TRACKERS[name] for name in names]
    except LookupError as error:
        raise ConfigError(f"trackers: {error}") from error


class TensorBoard:
    """Event files in tensorboard/ of the run folder."""

    def __init__(self, config: RunConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


register_tracker("tensorboard", TensorBoard)
