"""One run, whose parts fit together."""

from __future__ import annotations

from pydantic import model_validator

from difrl.config.checks import ConfigConflictError, find_conflicts
from difrl.config.schema.run import RunSections


class RunConfig(RunSections):
    """One run."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        if found := find_conflicts(self):
            raise ConfigConflictError(found)
        return self


def shows_base(config: RunConfig) -> bool:
    """Whether the end of the run draws from the pretrained weights again, which full training has to keep for that."""
    return config.data.evaluation is not None and config.eval.every > 0 and bool(config.eval.rlg or config.eval.show)
