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

from difrl.runtime.import_messages import leave_out_import_messages
from difrl.runtime.renamed_modules import install_renamed_modules
from difrl.runtime.shadowed_modules import check_own_packages

check_own_packages("rewards", "samplers")

from rewards.compat import install_torchvision_hook  # noqa: E402

if TYPE_CHECKING:
    from difrl.config import RunConfig
    from difrl.config.load import read_config
    from difrl.inference.loaded_run import LoadedRun, open_run
    from difrl.reporting.html import write_report
    from difrl.training.run import train

leave_out_import_messages()
install_torchvision_hook()
install_renamed_modules()

# Imported when first used, so that `difrl --help` does not wait for diffusers.
_HOMES = {
    "LoadedRun": "difrl.inference.loaded_run",
    "RunConfig": "difrl.config",
    "open_run": "difrl.inference.loaded_run",
    "read_config": "difrl.config.load",
    "train": "difrl.training.run",
    "write_report": "difrl.reporting.html",
}

__all__ = ["LoadedRun", "RunConfig", "open_run", "read_config", "train", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'difrl' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)
