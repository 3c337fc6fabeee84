"""difrl: reinforcement-learning fine-tuning of image generators with one core.

import difrl

config = difrl.read_config("configs/quickstart.yaml", ["train.steps=20", "output_dir=runs/example"])
difrl.train(config)
run = difrl.open_run("runs/example")
images = run.sample(["a red circle left of a blue square"], per_prompt=4, rlg=1.5).images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewards.compat import ensure_torchvision

if TYPE_CHECKING:
    from difrl.config import RunConfig
    from difrl.inference import Opened, open_run
    from difrl.reading import read_config
    from difrl.report import write_report
    from difrl.running import train

ensure_torchvision()

# Imported when first used, so that `difrl --help` does not wait for diffusers.
_HOMES = {
    "Opened": "difrl.inference",
    "RunConfig": "difrl.config",
    "open_run": "difrl.inference",
    "read_config": "difrl.reading",
    "train": "difrl.running",
    "write_report": "difrl.report",
}

__all__ = ["Opened", "RunConfig", "open_run", "read_config", "train", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'difrl' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)
