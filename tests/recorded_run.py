"""`python -m tests.recorded_run CONFIG.yaml`: a run that also keeps its rollouts, for the tests of several processes.

Beside what a run writes there are context-R.json, with what process R knew of the others, and rollout-R-K.safetensors,
the K-th draw of process R.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from difrl.config.load import read_config
from difrl.data.rollout import Rollout
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.reporting.terminal import SilentDisplay
from difrl.runtime.distributed import DistributedContext
from difrl.training.run import train


def main(path: Path) -> None:
    """Train as the config describes."""
    config, processes = read_config(path), DistributedContext()
    folder = path.parent
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    context = {
        "rank": processes.rank,
        "count": processes.count,
        "torch": torch.distributed.get_world_size() if together else 1,
        "device": processes.device.type,
    }
    (folder / f"context-{processes.rank}.json").write_text(json.dumps(context))
    draw, drawn = DiffusionPolicy.rollout, []

    def recorded(policy: DiffusionPolicy, *args: object) -> Rollout:
        rollout = draw(policy, *args)  # type: ignore[arg-type]
        assert rollout.images is not None
        tensors = {"samples": rollout.samples, "images": rollout.images, "latents": rollout.replay_data["latents"]}
        drawn.append({name: value.contiguous() for name, value in tensors.items()})
        return rollout

    with mock.patch.object(DiffusionPolicy, "rollout", recorded):
        train(config, display=SilentDisplay(), processes=processes)
    for number, tensors in enumerate(drawn):
        save_file(tensors, folder / f"rollout-{processes.rank}-{number}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
