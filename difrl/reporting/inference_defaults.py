"""inference.json in a run folder: the default guidance of inference with this run.

`difrl evaluate --write-default` writes it; `difrl sample`, `open_run` and the report read it. Training and its evaluations
ignore it, so their numbers are those of the trained model itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text

NAME = "inference.json"


class InferenceDefaultsError(UserError):
    """An inference.json that cannot be read."""


@dataclass(frozen=True)
class InferenceDefaults:
    """Guidance that samples of a run have by default, and the reason for it."""

    rlg: float = 1.0
    first_steps: int = 0
    adaptive: float | None = None
    why: str = ""

    def write(self, folder: Path) -> Path:
        """Write inference.json. An earlier one survives a full disk."""
        path = folder / NAME
        atomic_write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def read_inference_defaults(folder: Path) -> InferenceDefaults | None:
    """Return the defaults of a run, or None without an inference.json. Raise InferenceDefaultsError if it is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        found = InferenceDefaults(**json.loads(path.read_text(encoding="utf-8")))
        return InferenceDefaults(
            float(found.rlg), int(found.first_steps), found.adaptive and float(found.adaptive), found.why
        )
    except (ValueError, TypeError) as error:
        raise InferenceDefaultsError(
            f'{path} cannot be read ({error}); expected e.g. {{"rlg": 1.5}}. Delete it, or write it again with '
            f"`difrl evaluate {folder} --write-default 1.5`"
        ) from error
