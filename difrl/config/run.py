"""A run whose settings are consistent."""

from __future__ import annotations

from pydantic import model_validator

from difrl.config.checks import ConfigConflictError, find_conflicts
from difrl.config.schema.run import RunSections


class RunConfig(RunSections):
    """The config of a run, without settings that exclude each other."""

    @model_validator(mode="after")
    def _check_conflicts(self) -> RunConfig:
        if found := find_conflicts(self):
            raise ConfigConflictError(found)
        return self


def samples_base_at_end(config: RunConfig) -> bool:
    """Return whether the end of the run draws from the pretrained weights, which full training must then keep."""
    return config.data.evaluation is not None and config.eval.every > 0 and bool(config.eval.rlg or config.eval.show)
